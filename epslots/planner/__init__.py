"""The decisions of a layer's step, for all ranks: integer arrays in, integer arrays out."""
