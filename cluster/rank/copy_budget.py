"""``CopyBudget``: how much of the caches that are handed over a rank copies between two steps. Pure decisions.

    budget.observe_step(seconds)            # after each step
    pieces = budget.pieces()                # between two steps, for each of the rank's hand-overs
    budget.take(nbytes)
    budget.observe_copy(nbytes, seconds)    # when they are copied

A step gives hand-overs ``STEP_SHARE`` of its time, or of its target: as many bytes as are copied in it at the measured speed.
The simulator decides by it, too.
"""

from __future__ import annotations

from epslots.piece_sizes import BYTES_IN_FLIGHT, PIECE_BYTES

STEP_SHARE = 0.2
"""Of a step's time, for copies of hand-overs. On a CPU a step is so much later; on a GPU they go beside it, and fetches of
experts wait behind them for so long."""
FIRST_BYTES_S = 2e9
"""Bytes a second, before a copy was measured: a slow CPU's."""
_KEPT = 0.8  # weight of what was measured before


class CopyBudget:
    """The budget of one rank, for all its hand-overs together.

    Args:
        target_s: seconds that a step may take (``step_target_ms``); None = as long as it takes. Also an attribute.

    Attributes:
        bytes_s: bytes a second, lately.
    """

    def __init__(self, target_s: float | None = None) -> None:
        self.bytes_s = FIRST_BYTES_S
        self.target_s = target_s
        self._step_s = 0.0
        self._measured = False
        self._taken = 0
        """Bytes since the last step."""

    def aim_at(self, target_s: float | None) -> None:
        """Take the target of the engine that the rank has loaded. Measured speeds stay."""
        self.target_s = target_s

    @property
    def step_bytes(self) -> int:
        """Bytes between two steps: from one piece to ``BYTES_IN_FLIGHT``."""
        step_s = self._step_s if self.target_s is None else self.target_s
        return max(PIECE_BYTES, min(BYTES_IN_FLIGHT, int(STEP_SHARE * step_s * self.bytes_s)))

    def pieces(self) -> int:
        """Pieces that a hand-over may copy now. One at least: or it would starve beside another one."""
        return max(1, (self.step_bytes - self._taken) // PIECE_BYTES)

    def take(self, nbytes: int) -> None:
        """Note bytes that are copied before the next step."""
        self._taken += nbytes

    def observe_step(self, seconds: float) -> None:
        """Note a step's duration."""
        self._step_s = seconds + _KEPT * (self._step_s - seconds) if self._step_s else seconds
        self._taken = 0

    def observe_copy(self, nbytes: int, seconds: float) -> None:
        """Note how long so many bytes took; from any thread."""
        if nbytes < PIECE_BYTES // 2:
            return  # it tells of fixed costs
        now = nbytes / max(seconds, 1e-9)
        self.bytes_s = now + _KEPT * (self.bytes_s - now) if self._measured else now
        self._measured = True
