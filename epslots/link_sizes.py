"""Sizes of what a hand-over's link carries."""

PIECE_BYTES = 16 << 20
"""Bytes of a piece, at most: some milliseconds of a CPU's time, which no step is spared that makes way for a hand-over."""
BYTES_IN_FLIGHT = 8 * PIECE_BYTES
"""Bytes of pieces that are on the way: some are written while others are read."""
