"""``IdleTracker``: which sleeping ranks of a group to wake, so that none waits in a step that others sleep through. Pure."""

from __future__ import annotations

from collections.abc import Hashable, Sequence


class IdleTracker:
    """Decides which ranks to wake.

    A rank falls asleep by itself when a step's header says that no rank has work. A rank that gets a request then begins the
    next step, and waits in it for the others.

    All ranks of an epoch fall asleep at the same step. So it is enough to remember the step up to which they were woken: a
    rank that sleeps before that step, or reports so later, is woken as well.
    """

    def __init__(self) -> None:
        self.epoch = -1
        self._asleep: dict[Hashable, int] = {}
        self._woken_to = 0

    def begin(self, epoch: int) -> None:
        """A new epoch: all its ranks are awake."""
        self.epoch = epoch
        self._asleep.clear()
        self._woken_to = 0

    def fell_asleep(self, worker: Hashable, epoch: int, step: int) -> None:
        """A rank reports that no rank had work in ``step``."""
        if epoch == self.epoch:
            self._asleep[worker] = step

    def wake(self, outstanding: bool) -> tuple[int, Sequence[Hashable]]:
        """The step to make ranks run to, and the ranks to wake for it; ``outstanding``: some rank has requests."""
        if outstanding and self._asleep:
            self._woken_to = max(self._woken_to, max(self._asleep.values()) + 1)
        late = [worker for worker, step in self._asleep.items() if step < self._woken_to]
        for worker in late:
            del self._asleep[worker]
        return self._woken_to, late
