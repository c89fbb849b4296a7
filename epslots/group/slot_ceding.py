"""A rank's layers cede slots to its KV cache, and use them again.

A rank alone does so at once, a rank of a group with the next step's header.

A rank asks, all ranks of its group enter the change in their tables before the same step (``rank_group.py``), and the rank
itself changes its slots. ``generation/slot_exchange.py`` asks.
"""

from __future__ import annotations

from torch import nn

from epslots.group.rank_group import group_of
from epslots.runtime import runtime_of


class SlotCeding:
    """The slots that a rank's layers have ceded.

    Args:
        model: loaded with ``kv_tokens="auto"``, on one rank or one of several.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._runtime = model, runtime_of(model)
        self._loader = self._runtime.ceding_loader

    @property
    def levels(self) -> int:
        """Slots that each layer has ceded now."""
        return self._loader.pool.levels

    @property
    def grouped(self) -> bool:
        """Whether a change comes with the next step."""
        return group_of(self._model) is not None

    def ask(self, levels: int) -> None:
        """Let each layer cede so many slots. Cells of those that it uses again must be free. Called between steps.

        Raises:
            StoreError: a record that was in flight, or completes a layer, can't be read.
        """
        group = group_of(self._model)
        if group is not None:
            group.lockstep.cede(levels)
            return
        if levels == self.levels:
            return
        self._runtime.telemetry.collect()  # the device may decide about slots
        with self._loader.pool.lock:
            while self.levels < levels:
                self._loader.wait_all()
                self._runtime.cede_level([self._evict(index) for index in self._loader.store_layers])
            while self.levels > levels:
                self._loader.wait_all()  # a fetch that fails does so before anything changes
                self._runtime.take_back_level(complete=True)

    def _evict(self, index: int) -> int:
        """Take a slot from a layer's plans; returns the expert that is evicted, -1 = none."""
        runner = self._runtime.runners[index]
        runner.planner.refresh(runner.cache.slot_of_E)
        return runner.planner.state.resize(0, -1, runner.scores())
