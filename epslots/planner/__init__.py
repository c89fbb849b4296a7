"""What a layer's step decides, for all ranks: integer arrays in, integer arrays out."""
