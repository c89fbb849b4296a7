"""Quantised formats of checkpoints, one module each: the names on disk, and the matrix that they stand for."""
