"""Clusters that aren't here: the same decisions on recorded or generated traffic, and their step times."""
