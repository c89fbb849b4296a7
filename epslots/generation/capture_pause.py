"""The pause after a capture that ran out of memory. Pure.

Memory comes back when graphs of other sizes are freed, or when another process gives some back. Neither is announced.
"""

from __future__ import annotations

# Decoding steps until the next try; twice as many after each that fails, up to the last.
FIRST_PAUSE, LONGEST_PAUSE = 64, 4096

REASON = "a capture ran out of memory; it is tried again after some steps"


class CapturePause:
    """Counts the steps until captures are tried again.

    Attributes:
        failures: captures that ran out of memory.
    """

    def __init__(self) -> None:
        self.failures = 0
        self._left, self._next = 0, FIRST_PAUSE

    @property
    def reason(self) -> str | None:
        """Why nothing is captured now, as a sentence's end; None if it may be."""
        return REASON if self._left else None

    def passes(self) -> bool:
        """Count a step that would be captured; whether it is to be."""
        self._left = max(0, self._left - 1)
        return not self._left

    def begin(self) -> None:
        """A capture ran out of memory."""
        self.failures += 1
        # The step that passes comes after so many others.
        self._left, self._next = self._next + 1, min(2 * self._next, LONGEST_PAUSE)

    def end(self) -> None:
        """Memory has become free: the next step is captured."""
        self._left = 0

    def reset(self) -> None:
        """A capture succeeded: the next pause is a short one again."""
        self._left, self._next = 0, FIRST_PAUSE
