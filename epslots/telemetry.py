"""Counters of one rank's layers since loading, counted beside the hot path, and windows cut from them.

To add a counter, add a field to ``LayerStats`` and count it with ``Telemetry.count``. The table, sums over ranks, messages and
JSON follow from the field. Controllers receive the counters that are fields of ``LoadWindow``, too.

Legend of shape suffixes: L MoE layers, E experts of the largest layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from epslots.arrays import BoolArray, IntArray
from epslots.compiled import compiled
from epslots.layout import LayerSpec
from epslots.load_window import LoadWindow
from epslots.planner.reuse_distance import count_distances

if TYPE_CHECKING:
    import torch


class LayerStats(msgspec.Struct, frozen=True):
    """Counters of one MoE layer on one rank since loading. One *use* is one expert that the rank computes in one step."""

    layer: str
    """The experts module's path in the model."""
    num_experts: int
    slots: int
    """Slots that the layer has, of ``num_experts``."""
    tokens_per_expert: tuple[int, ...]
    """(token, k) pairs of this rank's tokens routed to each expert, computed on any rank."""
    steps: int
    """Forward passes with at least one token on any rank."""
    hits: int
    """Uses that found the expert in a slot."""
    misses: int
    """Uses that had to fetch it first."""
    passes: int
    """Passes over part of the layer's experts; equal to ``steps`` when the slots suffice."""
    cpu_misses: int
    """Misses that weren't fetched, but computed on the host's CPU."""
    evictions: int
    """Experts that lost their slot to a fetch."""
    host_bytes: int
    """Bytes fetched from the host store, first filling included."""
    disk_bytes: int
    """Bytes read from the disk, where ``host_memory`` bounds the store's RAM; for fetches, prefetches and the host's CPU."""
    peer_bytes: int
    """Bytes fetched from other ranks' slots."""
    pairs_sent: int
    """(token, k) pairs of this rank's tokens that other ranks computed."""
    pairs_received: int
    """Pairs of other ranks' tokens that this rank computed."""
    prefetches: int
    """Experts fetched before the layer's router had asked for them. Their bytes count above."""
    taken_back: int
    """Of these, how many were taken back: the layer's step didn't need them, and the link hadn't begun with them."""
    late: int
    """Hits on prefetched experts whose fetch was still in flight."""
    stall_s: float
    """Seconds the host spent on demand fetches (on CUDA: queueing them; the copies run beside it)."""
    migrations: int
    """Experts fetched by migrations, at the end of a step. Their bytes count above."""
    migration_s: float
    """Seconds the host spent on migrations."""
    cpu_s: float
    """Seconds the host's CPU spent computing experts."""
    layer_s: float
    """Seconds the host spent in the layer (on CUDA: queueing its work, and waiting for counts)."""
    wait_s: float
    """Part of ``layer_s``: waiting for other ranks' counts."""
    compute_s: float
    """Part of ``layer_s``: a CPU's computing, without waits for experts and ranks. 0 on CUDA, where it isn't known."""

    @property
    def bytes_fetched(self) -> int:
        """Bytes of experts that came into slots, from the host store and from other ranks."""
        return self.host_bytes + self.peer_bytes

    @property
    def hit_rate(self) -> float:
        """Hits per use; 1.0 before the first use."""
        return _hit_rate(self.hits, self.misses)


def _hit_rate(hits: int, misses: int) -> float:
    return hits / (hits + misses) if hits + misses else 1.0


class Stats(msgspec.Struct, frozen=True):
    """The counters of every MoE layer, their sums, and a rank's steps as a whole.

    Of several ranks, ``steps`` and ``zero_miss_steps`` are sums: a group's step counts once for each rank, as a zero-miss step
    for those that missed in no layer. Steps in which no rank missed at all are fewer: as many as the smallest
    ``zero_miss_steps`` of a rank at most.
    """

    layers: tuple[LayerStats, ...]
    steps: int = 0
    """Forward passes, those included in which only other ranks had tokens."""
    zero_miss_steps: int = 0
    """Steps in which the rank missed in no layer."""

    def total(self, counter: str) -> Any:
        """The sum over layers of a number of ``LayerStats``, by its name."""
        return sum(getattr(layer, counter) for layer in self.layers)

    @property
    def hits(self) -> int:
        return self.total("hits")

    @property
    def misses(self) -> int:
        return self.total("misses")

    @property
    def hit_rate(self) -> float:
        """Hits per use over all layers; 1.0 before the first use."""
        return _hit_rate(self.hits, self.misses)

    @property
    def zero_miss_share(self) -> float:
        """Zero-miss steps per step; 1.0 before the first step."""
        return self.zero_miss_steps / self.steps if self.steps else 1.0

    @property
    def bytes_fetched(self) -> int:
        return self.total("bytes_fetched")

    @property
    def stall_s(self) -> float:
        return self.total("stall_s")


# Fields of LayerStats that describe the layer; all others are counters.
_DESCRIPTION = {"layer", "num_experts", "slots", "tokens_per_expert"}
COUNTERS: dict[str, float] = {
    field.name: field.type() for field in msgspec.structs.fields(LayerStats) if field.name not in _DESCRIPTION
}
"""Every counter of a layer by name, at 0 or 0.0."""
# All ranks of a group make the same steps: the largest of these is the sum. The layer itself is the same on all ranks.
_LARGEST_OF_RANKS = {"steps", "passes"}
_SAME_ON_RANKS = {"layer", "num_experts"}


def sum_over_ranks(stats: Sequence[Stats]) -> Stats:
    """The sums of all ranks' counters, layer by layer; of a layer's ``steps`` and ``passes`` the largest."""
    return Stats(
        tuple(map(_sum_layer, zip(*(rank.layers for rank in stats), strict=True))),
        steps=sum(rank.steps for rank in stats),
        zero_miss_steps=sum(rank.zero_miss_steps for rank in stats),
    )


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
    """Counters of all layers of one rank. Layers that never miss count on the device and cost no synchronisation.

    Attributes:
        device: of the counters there.
    """

    def __init__(self, layers: Sequence[LayerSpec], slots: Sequence[int], device: torch.device) -> None:
        import torch

        self._layers = tuple(layers)
        self._slots = list(slots)
        count, experts = len(self._layers), max(layer.num_experts for layer in layers)
        self.device = device
        self._collect_by: Callable[[], None] | None = None
        self._steps = self._missed_steps = 0
        self._missed = False
        """Whether a layer has missed in the step under way."""
        # The table [counter][layer]; lists, because adding to a numpy item takes twice as long.
        self._counts = {name: [zero] * count for name, zero in COUNTERS.items()}
        self._uses_LE = np.zeros((count, experts), np.int64)
        self._reuse_LD = np.zeros((count, experts + 1), np.int64)
        # Ids from the last expert on (experts without weights) are counted in one column more.
        self._tokens_LX = np.zeros((count, experts + 1), np.int64)
        self._device_tokens_LX = torch.zeros((count, experts + 1), dtype=torch.int64, device=device)
        self._device_hits_L = torch.zeros(count, dtype=torch.int64, device=device)
        # Views made once: indexing a tensor costs as much as adding to it.
        tokens_X = [row[: layer.num_experts + 1] for row, layer in zip(self._device_tokens_LX, layers, strict=True)]
        self._device_views = list(zip(tokens_X, self._device_hits_L, strict=True))

    def count(self, layer: int, **amounts: float) -> None:
        """Add to counters of a layer, by their names in ``LayerStats``."""
        counts = self._counts
        for name, amount in amounts.items():
            counts[name][layer] += amount

    def counted(self, layer: int, name: str) -> float:
        """A counter of a layer that is counted on the host, by its name."""
        return self._counts[name][layer]

    def count_resident(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Count a step of a layer with every expert resident.

        Returns:
            Counters on the device that the step is to be added to: pairs of each expert, int64 [experts + 1], and hits, int64
            [], experts that have any.
        """
        if layer == 0:
            self._begin_step()
        self._counts["steps"][layer] += 1
        self._counts["passes"][layer] += 1
        return self._device_views[layer]

    def count_planned(self, layer: int, *, hits: int, misses: int, passes: int) -> None:
        """Count a step of a layer that may miss. The steps of the first layer are the rank's."""
        if layer == 0:
            self._begin_step()
        if misses and not self._missed:
            self._missed = True
            self._missed_steps += 1
        self.count(layer, steps=1, hits=hits, misses=misses, passes=passes)

    def _begin_step(self) -> None:
        self._steps += 1
        self._missed = False

    def count_steps(self, *, steps: int, missed: int) -> None:
        """Count steps of the rank that no layer has counted.

        Args:
            steps: their number.
            missed: steps, these or others, in which a layer missed, and which no layer has counted as such.
        """
        self._steps += steps
        self._missed_steps += missed

    def count_uses(self, layer: int, counts: IntArray, used_E: BoolArray) -> None:
        """Count pairs and used experts of a step, in a layer that may miss.

        Args:
            counts: int64 [experts + 1] on the host, pairs of this rank's tokens.
            used_E: the experts that it uses on any rank.
        """
        _add(self._tokens_LX[layer], counts, self._uses_LE[layer], used_E)

    def count_reuse(self, layer: int, distances: IntArray) -> None:
        """Count stack distances of a step's uses, int64 [uses] (``reuse_distance.py``)."""
        count_distances(self._reuse_LD[layer], distances)

    def reuse(self) -> tuple[IntArray, IntArray]:
        """Stack distances that the host has counted, int64 [L, E + 1].

        With them, the uses that they are a sample of, int64 [L].
        """
        return self._reuse_LD.copy(), self._uses_LE.sum(1)

    def set_slots(self, layer: int, slots: int) -> None:
        """Note the layer's number of slots from now on."""
        self._slots[layer] = slots

    def snapshot(self) -> Stats:
        """All counters as they are now. Synchronises with the device."""
        self.collect()
        counts, tokens_LX = self._all_counts(), self._all_tokens()
        return Stats(
            tuple(
                LayerStats(
                    layer=spec.name,
                    num_experts=spec.num_experts,
                    slots=self._slots[i],
                    tokens_per_expert=tuple(tokens_LX[i, : spec.num_experts].tolist()),
                    **{name: values[i] for name, values in counts.items()},  # type: ignore[arg-type]
                )
                for i, spec in enumerate(self._layers)
            ),
            steps=self._steps,
            zero_miss_steps=self._steps - self._missed_steps,
        )

    def totals(self) -> dict[str, np.ndarray]:
        """The counters that windows are cut from, by their names in ``LoadWindow``. Synchronises with the device.

        Returns:
            [L] of each number, int64 or float64; int64 [L, E] of tokens and uses, [L, E + 1] of stack distances.
        """
        self.collect()
        counts = self._all_counts()
        arrays = {"tokens": self._all_tokens()[:, :-1], "uses": self._uses_LE.copy(), "reuse": self._reuse_LD.copy()}
        return arrays | {name: np.array(counts[name]) for name in _WINDOW_COUNTERS}

    def collect_by(self, collect: Callable[[], None] | None) -> None:
        """Call ``collect`` before counters are read: a part counts elsewhere meanwhile; None = no longer."""
        self._collect_by = collect

    def collect(self) -> None:
        """Have a part that counts elsewhere, and decides there about slots, bring everything up to date."""
        if self._collect_by is not None:
            self._collect_by()

    def _all_counts(self) -> dict[str, list[float]]:
        """The table, with the hits that were counted on the device."""
        hits = [a + b for a, b in zip(self._counts["hits"], self._device_hits_L.tolist(), strict=True)]
        return self._counts | {"hits": hits}

    def _all_tokens(self) -> IntArray:
        """Tokens of each layer and expert, host's and device's, int64 [L, E + 1]."""
        tokens_LX: IntArray = self._tokens_LX + self._device_tokens_LX.cpu().numpy()
        return tokens_LX


@compiled("void(int64[::1], int64[::1], int64[::1], b1[::1])")
def _add(tokens_X: IntArray, counts: IntArray, uses_E: IntArray, used_E: BoolArray) -> None:
    """Add to the totals of a layer, whose rows may be longer."""
    for number in range(len(counts)):
        tokens_X[number] += counts[number]
    for expert in range(len(used_E)):
        uses_E[expert] += used_E[expert]


_WINDOW_COUNTERS = [name for name in LoadWindow.__struct_fields__ if name in COUNTERS]


class WindowMeter:
    """Cuts one rank's telemetry into windows."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self._last = telemetry.totals()

    def cut(self, seconds: float) -> LoadWindow:
        """The counts since the last cut, ``seconds`` ago."""
        last, now = self._last, self._telemetry.totals()
        self._last = now
        counts = {name: total - last[name] for name, total in now.items()}
        counts["steps"] = now["steps"].max() - last["steps"].max()
        return LoadWindow(seconds=seconds, **{name: _encode(count) for name, count in counts.items()})


def _encode(count: np.ndarray) -> Any:
    """A count as a field of ``LoadWindow``: a number, a tuple [L], or the bytes of an array [L, any number]."""
    if count.ndim == 2:
        return count.astype("<i8").tobytes()
    return tuple(count.tolist()) if count.ndim else count.item()
