"""Whether experts cede one more slot per layer to the KV cache, or use one again. Decided once a window of steps. Pure.

A *level* is one slot of each layer. Both sides are weighed in seconds of a window of steps:

    one more level      requests that wait would run, too: the fixed time of a step is divided among more of them
    one level less      further misses that a slot saves each layer, and the price of a fetch

Misses follow from stack distances (``planner/reuse_distance.py``), seconds from the fit of ``chunk_size.py``. With falling
gains, memory is divided best where marginal gains are equal (Stone, Turek and Wolf, IEEE Transactions on Computers 1992). A
window changes one level at most, and back only after some calm windows. ``slot_exchange.py`` measures the windows. It also
lets running requests have the cells that they can't go on without.
"""

from __future__ import annotations

from dataclasses import dataclass

from epslots.models.cache_slots import CacheSlots

MARGIN = 1.25
"""A change has to gain so many times what it loses."""
WORTH = 0.002
"""Share of a window's time that experts have to gain by a level, or it stays: moving it costs evictions later."""
CALM_WINDOWS = 4
"""Windows in a row that have to speak for giving a level back."""


@dataclass(frozen=True)
class ShareWindow:
    """A window of steps of one rank.

    Attributes:
        steps: in which requests ran.
        seconds: of these.
        fixed_s: seconds of a step that don't grow with its requests.
        running: mean requests of a step.
        waiting: mean requests that waited only for cells, and had rows if these came.
        lack: mean cells that the first of these lacked.
        tokens: mean cells that each of the others needs.
        held: the most cells that running requests held, or needed in a step.
        kept: cells that hold beginnings for later requests, at the end.
        reused_s: seconds of prompts that such beginnings saved.
        saved_s: seconds of fetches that one more slot a layer would save.
        lost_s: seconds of further fetches with one slot a layer less.
        sampled: whether these two are known: captured steps sample no use, nor do layers that hold all experts.
    """

    steps: int
    seconds: float
    fixed_s: float = 0.0
    running: float = 0.0
    waiting: float = 0.0
    lack: float = 1.0
    tokens: float = 1.0
    held: int = 0
    kept: int = 0
    reused_s: float = 0.0
    saved_s: float = 0.0
    lost_s: float = 0.0
    sampled: bool = True


class CacheShare:
    """Decides for one rank, and remembers calm windows.

    Args:
        sizes: of the exchange.
    """

    def __init__(self, sizes: CacheSlots) -> None:
        self._sizes = sizes
        self._calm = 0

    def change(self, window: ShareWindow, levels: int) -> int:
        """1: cede one more slot a layer from now on; -1: use one again; 0: stay.

        Args:
            levels: slots that each layer has ceded.
        """
        calm = levels > 0 and self._is_calm(window, levels)
        self._calm = self._calm + 1 if calm else 0
        worth = cache_gain_s(window, self._sizes) > MARGIN * window.lost_s
        # Without a sample nothing is weighed: experts cede to requests that wait all the time.
        if levels < self._sizes.most_levels and worth and (window.sampled or window.waiting >= 1):
            self._calm = 0
            return 1
        if self._calm >= CALM_WINDOWS:
            return -1
        return 0

    def _is_calm(self, window: ShareWindow, levels: int) -> bool:
        """Whether experts would gain more by a level than the cache loses; it loses none that requests need."""
        if not window.sampled or window.waiting or window.held > self._sizes.tokens(levels - 1):
            return False
        room = self._sizes.tokens(levels - 1) - window.held
        given_up = max(0, window.kept - room)
        reuse_s = window.reused_s * given_up / window.kept if window.kept else 0.0
        return window.saved_s > max(MARGIN * reuse_s, WORTH * window.seconds)


def cache_gain_s(window: ShareWindow, sizes: CacheSlots) -> float:
    """Seconds of the window that one more level would have saved.

    With m more requests beside b running ones, W steps of f + c x b seconds make the same tokens as W x b / (b + m) steps of
    f + c x (b + m) seconds: W x f x m / (b + m) seconds less. A level may be too small for a whole request.
    """
    lack, rest = max(1.0, window.lack), sizes.level_tokens - window.lack
    fit = sizes.level_tokens / lack if rest < 0 else 1 + rest / max(1.0, window.tokens)
    more = min(window.waiting, fit)
    together = window.running + more
    return window.steps * window.fixed_s * more / together if together else 0.0
