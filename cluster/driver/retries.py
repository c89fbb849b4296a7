"""When a failed attempt is repeated, and when its failure is logged. Pure: times are arguments."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Pace:
    """Seconds.

    Attributes:
        first_s: before the second attempt; doubled with each further failure.
        most_s: the longest wait between two attempts.
        tell_every_s: between two log messages about one row of failures.
    """

    first_s: float = 1.0
    most_s: float = 60.0
    tell_every_s: float = 60.0


@dataclass(frozen=True)
class Verdict:
    """The consequences of a failure.

    Attributes:
        wait_s: before the next attempt.
        tell: log the failure.
        give_up: make no further attempt.
    """

    wait_s: float
    tell: bool
    give_up: bool


class Retries:
    """Counts failures in a row, and decides about the next attempt.

    Args:
        give_up_after_s: seconds from the first failure of a row to the last attempt; None = no end.

    Attributes:
        failures: in a row.
    """

    def __init__(self, pace: Pace, give_up_after_s: float | None = None) -> None:
        self._pace, self._give_up_after_s = pace, give_up_after_s
        self._since_s = self._told_s = 0.0
        self.failures = 0

    def failed(self, now_s: float) -> Verdict:
        """Note a failed attempt."""
        if not self.failures:
            self._since_s = now_s
        tell = not self.failures or now_s - self._told_s >= self._pace.tell_every_s
        if tell:
            self._told_s = now_s
        doublings = min(self.failures, 30)
        self.failures += 1
        wait_s = min(self._pace.first_s * 2**doublings, self._pace.most_s)
        if self._give_up_after_s is None:
            return Verdict(wait_s, tell, give_up=False)
        left_s = self._give_up_after_s - (now_s - self._since_s)
        return Verdict(max(0.0, min(wait_s, left_s)), tell, give_up=left_s <= 0)

    def reset(self) -> None:
        """Note a successful attempt, or a call for another attempt now."""
        self.failures = 0
