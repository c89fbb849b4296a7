"""``Epochs``: numbers of process groups."""

from __future__ import annotations


class Epochs:
    """Numbers of process groups. No two groups of a cluster have the same, and each is greater than the last."""

    def __init__(self) -> None:
        self.newest = -1

    def next(self) -> int:
        """A number for the next group."""
        self.newest += 1
        return self.newest

    def follow(self, epoch: int) -> None:
        """Go on after a number that is taken."""
        self.newest = max(self.newest, epoch)
