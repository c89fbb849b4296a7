"""``SlotExchange``: the exchange of memory between a batcher's row cache and the experts of its rank, step by step.

    exchange.follow()                 # between steps: cells of ceded slots may be used
    exchange.grow(tokens)             # running requests can't go on without so many free cells
    exchange.note_waiting(tokens)     # a request waits for so many, and for nothing else
    exchange.count(...)               # after a step
    change = exchange.decide(...)     # where a window of steps is ``due`` (``cache_share.py``)
    exchange.change(change)           # if it can

A growing cache gets its slots first, and uses their cells then; a shrinking one closes its cells, and gives their slots back
then. In a group, either comes with the next step (``group/slot_ceding.py``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import nn

from epslots.arrays import FloatArray, IntArray
from epslots.errors import ConfigError, StoreError
from epslots.generation.cache_share import CacheShare, ShareWindow
from epslots.generation.cell_memory import CellMemory
from epslots.generation.cell_table import CellTable
from epslots.group.cost_probe import measure_alone
from epslots.group.slot_ceding import SlotCeding
from epslots.models.cache_slots import CacheSlots
from epslots.placement.slot_quotas import slot_gains
from epslots.runtime import plan_of, runtime_of

WINDOW_STEPS = 32
_MEMORY_WINDOWS = 8
"""Stack distances of so many windows ago that counted some, and reused beginnings, count a third."""


@dataclass
class _Sums:
    """Of the steps of a window."""

    steps: int = 0
    seconds: float = 0.0
    running: int = 0
    held: int = 0
    waiting: int = 0
    first: int = 0
    lack: int = 0
    tokens: int = 0


class SlotExchange:
    """The levels of one row cache.

    Args:
        model: loaded with ``kv_tokens="auto"``.
        memory: the slots that cells are in.
        cells: of the cache's tensors that keep every token.

    Attributes:
        sizes: of the exchange.
        asked: whether slots were asked for that come with the group's next step.
        due: whether a window has ended.
    """

    def __init__(self, model: nn.Module, memory: CellMemory, cells: CellTable) -> None:
        runtime = runtime_of(model)
        self.sizes = memory.sizes
        self._memory, self._cells = memory, cells
        self._ceding = SlotCeding(model)
        self._share = CacheShare(self.sizes)
        self._telemetry = runtime.telemetry
        loader = runtime.ceding_loader
        first = runtime.runners[loader.store_layers[0]]
        self._fetch_s = measure_alone(loader, first.experts, on_cpu=False).host_fetch / 1e9
        self._runners = [runtime.runners[index] for index in self.sizes.layers]
        self._experts_L = np.array([runner.cache.num_experts for runner in self._runners])
        self._target = self._ceding.levels
        self._sums, self._waits = _Sums(), (0, 0, 0)
        self._last_reuse, self._last_uses = self._telemetry.reuse()
        self._reuse_LD: FloatArray = np.zeros((len(self.sizes.layers), self._last_reuse.shape[1]))
        self._uses = self._reused_s = 0.0
        self._sample_weight = self._reuse_weight = 0.0
        """Sums of the weights of windows in these."""
        self._last_reused = 0
        self.follow()

    @property
    def tokens(self) -> int:
        """Tokens that the cache holds now."""
        return self.sizes.tokens(self._cells.open_levels)

    @property
    def levels(self) -> int:
        """Slots that each layer has ceded now."""
        return self._ceding.levels

    @property
    def ceded_slots(self) -> int:
        """Slots of all layers that hold cells now."""
        return self.levels * len(self.sizes.layers)

    @property
    def asked(self) -> bool:
        return self._target > self._ceding.levels

    def follow(self) -> None:
        """Use the cells of all slots that are ceded by now, and that weren't asked back. Called between steps."""
        self._open_cells()  # before slots go back
        try:
            self._ceding.ask(self._target)
        except StoreError:
            self._target = max(self._target, self.levels)  # what couldn't go back stays the cache's
            raise
        finally:
            self._open_cells()

    def _open_cells(self) -> None:
        level = min(self._target, self.levels)
        if self._cells.open_levels != level:
            self._cells.open_to(level)

    def grow(self, tokens: int) -> bool:
        """Get free cells for so many tokens, by as many levels as it takes. False if they come later, or never."""
        needed = self.tokens + tokens - self._cells.free
        if self.tokens < needed <= self.sizes.most_tokens:
            self._target = max(self._target, self.sizes.levels_for(needed))
            self.follow()
        return self._cells.free >= tokens

    def note_waiting(self, tokens: int, *, others: int = 0, their_tokens: int = 0) -> None:
        """Note that a request waits only for free cells, and how many it needs.

        Behind it wait others, for which there are rows, with so many tokens.
        """
        self._waits = max(1, tokens - self._cells.free), others, their_tokens

    def count(self, *, seconds: float, running: int, held: int) -> None:
        """Note a step.

        Args:
            running: requests that have rows.
            held: cells that running requests hold.
        """
        sums = self._sums
        sums.steps += 1
        sums.seconds += seconds
        sums.running += running
        sums.held = max(sums.held, held)
        lack, others, tokens = self._waits
        self._waits = 0, 0, 0
        sums.first += lack > 0
        sums.waiting += (lack > 0) + others
        sums.lack += lack
        sums.tokens += tokens

    @property
    def due(self) -> bool:
        return self._sums.steps >= WINDOW_STEPS

    def decide(self, *, fixed_s: float, kept: int, reused: int, token_s: float) -> int:
        """Decide at a window's end: experts cede one more slot a layer (1), use one again (-1), or neither (0).

        Args:
            fixed_s: seconds of a step that don't grow with its requests.
            kept: cells that hold nothing but beginnings for later requests.
            reused: tokens of prompts that such beginnings have saved since the start.
            token_s: seconds of a prompt's token.
        """
        sums = self._sums
        fetches = self._fetches()
        self._reused_s += (reused - self._last_reused) * token_s - self._reused_s / _MEMORY_WINDOWS
        self._reuse_weight += 1 - self._reuse_weight / _MEMORY_WINDOWS
        window = ShareWindow(
            steps=sums.steps,
            seconds=sums.seconds,
            fixed_s=fixed_s,
            running=sums.running / sums.steps,
            waiting=sums.waiting / sums.steps,
            lack=sums.lack / max(1, sums.first),
            tokens=sums.tokens / max(1, sums.waiting - sums.first),
            held=sums.held,
            kept=kept,
            reused_s=self._reused_s / self._reuse_weight,
            saved_s=fetches[0] if fetches else 0.0,
            lost_s=fetches[1] if fetches else 0.0,
            sampled=fetches is not None,
        )
        self._sums, self._last_reused = _Sums(), reused
        return 0 if self.asked else self._share.change(window, self._target)

    def is_in_the_way(self, row: int, change: int) -> bool:
        """Whether a row holds a cell in the slots that would go back by a decision."""
        return self._cells.reaches_above(row, self._target + change)

    def change(self, change: int) -> None:
        """Carry out a decision, unless a cell is held in the slots that would go back. Called between steps.

        Raises:
            StoreError: a record that was in flight, or completes a layer, can't be read. Its slots stay ceded.
        """
        if self._cells.held_levels <= self._target + change:
            self._target += change
            self.follow()

    def _fetches(self) -> tuple[float, float] | None:
        """Seconds of fetches that one more slot a layer would save in a window, and that one less would cost.

        None if no use was sampled yet. Windows without uses say nothing: captured steps count none.
        """
        reuse_LD, uses = self._telemetry.reuse()
        layers = list(self.sizes.layers)
        new_LD: IntArray = (reuse_LD - self._last_reuse)[layers]
        if new_LD.any():
            self._reuse_LD += new_LD - self._reuse_LD / _MEMORY_WINDOWS
            self._uses += float((uses - self._last_uses)[layers].sum()) - self._uses / _MEMORY_WINDOWS
            self._sample_weight += 1 - self._sample_weight / _MEMORY_WINDOWS
            self._last_reuse, self._last_uses = reuse_LD, uses
        sampled = float(self._reuse_LD.sum())
        if not sampled:
            return None
        histogram_LD = self._reuse_LD.round().astype(np.int64)[:, : int(self._experts_L.max()) + 1]
        gains = np.pad(slot_gains(histogram_LD, self._experts_L), ((0, 0), (0, 1)))
        # A group's ranks may have more slots than there are experts: further ones save no miss, as the last column says.
        slots_L = np.array([int(runner.planner.state.quota_R.sum()) for runner in self._runners])
        more_L, less_L = slots_L.clip(max=gains.shape[1] - 1), (slots_L - 1).clip(max=gains.shape[1] - 1)
        rows = np.arange(len(slots_L))
        # Gains are of sampled uses, summed over windows.
        scale = self._uses / sampled / self._sample_weight * self._fetch_s
        return float(gains[rows, more_L].sum()) * scale, float(gains[rows, less_L].sum()) * scale

    def close(self) -> None:
        """Give all slots back; no cell is held any more."""
        self._target = 0
        try:
            self.follow()
        finally:
            self._memory.close()


def exchange_sizes(model: nn.Module) -> CacheSlots:
    """The sizes of the exchange that a model was loaded for.

    Raises:
        ConfigError: it was loaded with a number of ``kv_tokens``, or not by ``epslots.load``.
    """
    plan = plan_of(model)
    if plan is None or plan.cache_slots is None:
        raise ConfigError(
            "kv_tokens='auto': the model was loaded without it; allowed: a number, or load with kv_tokens='auto'"
        )
    return plan.cache_slots


def open_cells(model: nn.Module, sizes: CacheSlots) -> CellMemory:
    """The slots of a model as cells.

    Raises:
        ConfigError: another engine keeps its requests there.
    """
    runtime = runtime_of(model)
    return CellMemory(runtime.ceding_loader.pool, sizes, runtime.plan.shape.cache)
