"""Sizes of the pieces that a hand-over's connection carries."""

PIECE_BYTES = 16 << 20
"""Bytes of a piece, at most: some milliseconds of a CPU's time, for which a step waits that lets a hand-over copy."""
BYTES_IN_FLIGHT = 8 * PIECE_BYTES
"""Bytes of a hand-over's pieces that are on the way, at most, and that are copied between two steps. Both ends have memory for
as many: on the host, and on a GPU."""
