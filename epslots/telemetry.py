"""What one rank's layers did: counters kept beside the hot path, and the table people read.

To add a counter, add a field to ``LayerStats`` and count it with ``Telemetry.count``: sums over ranks, messages and JSON
follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import torch

from epslots.arrays import BoolArray, IntArray
from epslots.layout import LayerSpec
from epslots.load_window import LoadWindow
from epslots.planner.reuse_distance import count_distances


class LayerStats(msgspec.Struct, frozen=True):
    """Counters of one MoE layer on one rank since loading. One *use* is one expert that the rank computes in one step.

    Attributes:
        layer: the experts module's path in the model.
        slots: slots that the layer has, of ``num_experts``.
        tokens_per_expert: (token, k) pairs of this rank's tokens routed to each expert, whoever computes them.
        steps: forward passes with at least one token, on whichever rank.
        hits: uses that found the expert in a slot.
        misses: uses that had to fetch it first.
        passes: passes over part of the layer's experts; equal to ``steps`` when the slots suffice.
        hosted: misses that weren't fetched, but computed by the host's CPU.
        evictions: experts that gave way to a fetch.
        host_bytes: bytes fetched from the host store, first filling included.
        peer_bytes: bytes fetched from other ranks' slots.
        pairs_sent: (token, k) pairs of this rank's tokens that other ranks computed.
        pairs_received: pairs of other ranks' tokens that this rank computed.
        prefetches: experts fetched before the layer's router had asked for them. Their bytes count above.
        late: hits of these whose fetch was still under way.
        stall_s: seconds the host spent on demand fetches (on CUDA: queueing them; the copies run beside it).
        moves: experts fetched for a placement's sake, at the end of a step. Their bytes count above.
        move_s: seconds the host spent on these.
        hosted_s: seconds the host's CPU spent on experts that weren't fetched.
        layer_s: seconds the host spent in the layer (on CUDA: queueing its work, and waiting for counts).
        wait_s: of these, waiting for other ranks' counts.
    """

    layer: str
    num_experts: int
    slots: int
    tokens_per_expert: tuple[int, ...]
    steps: int
    hits: int
    misses: int
    passes: int
    hosted: int
    evictions: int
    host_bytes: int
    peer_bytes: int
    pairs_sent: int
    pairs_received: int
    prefetches: int
    late: int
    stall_s: float
    moves: int
    move_s: float
    hosted_s: float
    layer_s: float
    wait_s: float

    @property
    def bytes_fetched(self) -> int:
        """Bytes of experts that came into slots, wherever from."""
        return self.host_bytes + self.peer_bytes

    @property
    def hit_rate(self) -> float:
        """Hits per use; 1.0 before the first use."""
        return self.hits / (self.hits + self.misses) if self.hits + self.misses else 1.0


class Stats(msgspec.Struct, frozen=True):
    """The counters of every MoE layer, and their sums."""

    layers: tuple[LayerStats, ...]

    @property
    def hits(self) -> int:
        return sum(layer.hits for layer in self.layers)

    @property
    def misses(self) -> int:
        return sum(layer.misses for layer in self.layers)

    @property
    def hit_rate(self) -> float:
        """Hits per use over all layers; 1.0 before the first use."""
        return self.hits / (self.hits + self.misses) if self.hits + self.misses else 1.0

    @property
    def bytes_fetched(self) -> int:
        return sum(layer.bytes_fetched for layer in self.layers)

    @property
    def stall_s(self) -> float:
        return sum(layer.stall_s for layer in self.layers)


# Fields of LayerStats that tell of the layer; all others are counters.
_OF_THE_LAYER = {"layer", "num_experts", "slots", "tokens_per_expert"}
# All ranks of a group make the same steps: these don't add up. Fields that differ on no rank stay as they are.
_LARGEST_OF_RANKS = {"steps", "passes"}
_SAME_ON_RANKS = {"layer", "num_experts"}
COUNTERS: dict[str, float] = {
    field.name: field.type() for field in msgspec.structs.fields(LayerStats) if field.name not in _OF_THE_LAYER
}
"""Every counter of a layer by name, at 0 or 0.0."""


def sum_over_ranks(stats: Sequence[Stats]) -> Stats:
    """The sums of all ranks' counters, layer by layer; of ``steps`` and ``passes`` the largest."""
    return Stats(tuple(map(_sum_layer, zip(*(rank.layers for rank in stats), strict=True))))


def _sum_layer(ranks: tuple[LayerStats, ...]) -> LayerStats:
    changes: dict[str, Any] = {}
    for name in ranks[0].__struct_fields__:
        values = [getattr(rank, name) for rank in ranks]
        if name in _LARGEST_OF_RANKS:
            changes[name] = max(values)
        elif name == "tokens_per_expert":
            changes[name] = tuple(map(sum, zip(*values, strict=True)))
        elif name not in _SAME_ON_RANKS:
            changes[name] = sum(values)
    return msgspec.structs.replace(ranks[0], **changes)


class Telemetry:
    """Counters of all layers of one rank. Layers that never miss count on the device and cost no synchronisation."""

    def __init__(self, layers: Sequence[LayerSpec], slots: Sequence[int], device: torch.device) -> None:
        self._layers = tuple(layers)
        self._slots = list(slots)
        count = len(self._layers)
        experts = max(layer.num_experts for layer in layers)
        # One row more than experts: ids beyond the last expert (experts that carry no weights) are counted there.
        self._tokens = np.zeros((count, experts + 1), np.int64)
        self._device_tokens = torch.zeros((count, experts + 1), dtype=torch.int64, device=device)
        self._device_uses = torch.zeros(count, dtype=torch.int64, device=device)
        # Views made once: indexing a tensor costs as much as adding to it.
        self._device_rows = [row[: layer.num_experts + 1] for row, layer in zip(self._device_tokens, layers, strict=True)]
        self._device_use = list(self._device_uses)
        self._counts = [dict(COUNTERS) for _ in self._layers]
        self._uses = np.zeros((count, experts), np.int64)
        self._reuse = np.zeros((count, experts + 1), np.int64)

    def count(self, layer: int, **amounts: float) -> None:
        """Add to counters of a layer, by their names in ``LayerStats``."""
        counts = self._counts[layer]
        for name, amount in amounts.items():
            counts[name] += amount

    def count_resident(self, layer: int, counts: torch.Tensor) -> None:
        """A step of a layer with every expert resident: ``counts`` int64 [experts + 1] on the device."""
        self._device_rows[layer].add_(counts)
        self._device_use[layer].add_(torch.count_nonzero(counts[:-1]))
        own = self._counts[layer]
        own["steps"] += 1
        own["passes"] += 1

    def count_device(self, layer: int, *, steps: int, misses: int) -> None:
        """What a device did by itself: steps that were replayed without the host, and misses among the uses of
        ``count_resident``, which takes all for hits.
        """
        self.count(layer, steps=steps, passes=steps, hits=-misses, misses=misses)

    def count_step(self, layer: int, counts: np.ndarray, hits: int, misses: int, passes: int) -> None:
        """A step of a layer that may miss: ``counts`` int64 [experts + 1] on the host."""
        self._tokens[layer, : len(counts)] += counts
        self.count(layer, steps=1, hits=hits, misses=misses, passes=passes)

    def count_uses(self, layer: int, used_E: BoolArray) -> None:
        """The experts that a step uses on whichever rank. Layers that miss nothing on any rank don't say."""
        self._uses[layer, : len(used_E)] += used_E

    def count_reuse(self, layer: int, distances: IntArray) -> None:
        """Stack distances of some step's uses (``reuse_distance.py``)."""
        count_distances(self._reuse[layer], distances)

    def set_slots(self, layer: int, slots: int) -> None:
        """The layer has so many slots from now on."""
        self._slots[layer] = slots

    def snapshot(self) -> Stats:
        """All counters as they are now. Synchronises with the device."""
        tokens = self._tokens + self._device_tokens.cpu().numpy()
        return Stats(
            tuple(
                LayerStats(
                    layer=spec.name,
                    num_experts=spec.num_experts,
                    slots=self._slots[i],
                    tokens_per_expert=tuple(tokens[i, : spec.num_experts].tolist()),
                    **counts,  # type: ignore[arg-type]
                )
                for i, (spec, counts) in enumerate(zip(self._layers, self._all_counts(), strict=True))
            )
        )

    def totals(self) -> Totals:
        """What windows are cut from, as it is now. Synchronises with the device."""
        counts = self._all_counts()
        return Totals(
            steps=int(max(layer["steps"] for layer in counts)),
            arrays=(self._tokens[:, :-1] + self._device_tokens[:, :-1].cpu().numpy(), self._uses.copy(), self._reuse.copy()),
            counts={name: [layer[name] for layer in counts] for name in _OF_WINDOWS},
        )

    def _all_counts(self) -> list[dict[str, float]]:
        """The counters of each layer, with the uses that were counted on the device."""
        uses = self._device_uses.tolist()
        return [counts | {"hits": counts["hits"] + more} for counts, more in zip(self._counts, uses, strict=True)]


# Counters of each layer that a window has.
_OF_WINDOWS = [name for name in LoadWindow.__struct_fields__ if name in COUNTERS.keys() - {"steps"}]


@dataclass(frozen=True)
class Totals:
    """Counters since loading: arrays in the order of a ``LoadWindow``'s fields, the others by name and layer."""

    steps: int
    arrays: tuple[IntArray, ...]
    counts: dict[str, list[float]]


class WindowMeter:
    """Cuts one rank's telemetry into windows."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self._last = telemetry.totals()

    def cut(self, seconds: float) -> LoadWindow:
        """What was counted since the last cut, which was so long ago."""
        last, self._last = self._last, self._telemetry.totals()
        now = self._last
        tokens, uses, reuse = (np.subtract(a, b, dtype="<i8").tobytes() for a, b in zip(now.arrays, last.arrays, strict=True))
        counts: dict[str, Any] = {
            name: tuple(a - b for a, b in zip(values, last.counts[name], strict=True)) for name, values in now.counts.items()
        }
        # A prefetch of the last window may have been given up in this one.
        counts["host_bytes"] = tuple(max(0, more) for more in counts["host_bytes"])
        return LoadWindow(steps=now.steps - last.steps, seconds=seconds, tokens=tokens, uses=uses, reuse=reuse, **counts)
