"""What one rank's layers did: counters kept beside the hot path, and the table people read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec
import numpy as np
import torch

from epslots.placement.windows import Window
from epslots.records import LayerSpec
from epslots.step.eviction import IntArray
from epslots.step.residency import BoolArray
from epslots.step.reuse import count_distances

Number = TypeVar("Number", int, float)


class LayerStats(msgspec.Struct, frozen=True):
    """Counters of one MoE layer on one rank since loading. One *use* is one expert that the rank computes in one step.

    Attributes:
        layer: the experts module's path in the model.
        slots: slots that the layer has, of ``num_experts``.
        tokens_per_expert: (token, k) pairs of this rank's tokens routed to each expert, whoever computes them.
        steps: forward passes with at least one token, on whichever rank.
        hits: uses that found the expert in a slot.
        misses: uses that had to fetch it first.
        waves: passes over part of the layer's experts; equal to ``steps`` when the slots suffice.
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
    waves: int
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
        self._steps, self._hits, self._misses, self._waves, self._evictions = ([0] * count for _ in range(5))
        self._host_bytes, self._peer_bytes, self._sent, self._received, self._moves = ([0] * count for _ in range(5))
        self._prefetches, self._late = [0] * count, [0] * count
        self._stall_s, self._move_s, self._layer_s, self._wait_s, self._hosted_s = ([0.0] * count for _ in range(5))
        self._hosted = [0] * count
        self._uses = np.zeros((count, experts), np.int64)
        self._reuse = np.zeros((count, experts + 1), np.int64)

    def count_resident(self, layer: int, counts: torch.Tensor) -> None:
        """A step of a layer with every expert resident: ``counts`` int64 [experts + 1] on the device."""
        self._device_rows[layer].add_(counts)
        self._device_use[layer].add_(torch.count_nonzero(counts[:-1]))
        self._steps[layer] += 1
        self._waves[layer] += 1

    def count_device(self, layer: int, *, steps: int, misses: int) -> None:
        """What a device did by itself: steps that were replayed without the host, and misses among the uses of
        ``count_resident``, which takes all for hits.
        """
        self._steps[layer] += steps
        self._waves[layer] += steps
        self._hits[layer] -= misses
        self._misses[layer] += misses

    def count_step(self, layer: int, counts: np.ndarray, hits: int, misses: int, waves: int) -> None:
        """A step of a layer that may miss: ``counts`` int64 [experts + 1] on the host."""
        self._tokens[layer, : len(counts)] += counts
        self._steps[layer] += 1
        self._hits[layer] += hits
        self._misses[layer] += misses
        self._waves[layer] += waves

    def count_fetches(self, layer: int, *, host_bytes: int, peer_bytes: int, evictions: int) -> None:
        """Fetches, on demand or to fill slots at the start."""
        self._host_bytes[layer] += host_bytes
        self._peer_bytes[layer] += peer_bytes
        self._evictions[layer] += evictions

    def count_exchange(self, layer: int, *, sent: int, received: int) -> None:
        """Pairs computed for and by other ranks."""
        self._sent[layer] += sent
        self._received[layer] += received

    def count_uses(self, layer: int, used_E: BoolArray) -> None:
        """The experts that a step uses on whichever rank. Layers that miss nothing on any rank don't say."""
        self._uses[layer, : len(used_E)] += used_E

    def count_reuse(self, layer: int, distances: IntArray) -> None:
        """Stack distances of some step's uses (``reuse.py``)."""
        count_distances(self._reuse[layer], distances)

    def count_move(self, layer: int, moves: int, seconds: float) -> None:
        """Part in a step's moves, which may be to give copies away."""
        self._moves[layer] += moves
        self._move_s[layer] += seconds

    def count_prefetches(self, layer: int, experts: int) -> None:
        """Experts that are fetched ahead."""
        self._prefetches[layer] += experts

    def count_late(self, layer: int, experts: int) -> None:
        """Uses of experts that were fetched ahead, and hadn't landed."""
        self._late[layer] += experts

    def count_hosted(self, layer: int, experts: int, seconds: float) -> None:
        """Misses computed by the host's CPU."""
        self._hosted[layer] += experts
        self._hosted_s[layer] += seconds

    def count_time(self, layer: int, seconds: float) -> None:
        """Time in a layer."""
        self._layer_s[layer] += seconds

    def count_wait(self, layer: int, seconds: float) -> None:
        """Time that a layer waited for other ranks' counts."""
        self._wait_s[layer] += seconds

    def set_slots(self, layer: int, slots: int) -> None:
        """The layer has so many slots from now on."""
        self._slots[layer] = slots

    def count_stall(self, layer: int, seconds: float) -> None:
        """Time that a step waited for fetches."""
        self._stall_s[layer] += seconds

    def snapshot(self) -> Stats:
        """All counters as they are now. Synchronises with the device."""
        tokens = self._tokens + self._device_tokens.cpu().numpy()
        uses = self._device_uses.tolist()
        return Stats(
            tuple(
                LayerStats(
                    layer=spec.name,
                    num_experts=spec.num_experts,
                    slots=self._slots[i],
                    tokens_per_expert=tuple(tokens[i, : spec.num_experts].tolist()),
                    steps=self._steps[i],
                    hits=self._hits[i] + uses[i],
                    misses=self._misses[i],
                    waves=self._waves[i],
                    hosted=self._hosted[i],
                    evictions=self._evictions[i],
                    host_bytes=self._host_bytes[i],
                    peer_bytes=self._peer_bytes[i],
                    pairs_sent=self._sent[i],
                    pairs_received=self._received[i],
                    prefetches=self._prefetches[i],
                    late=self._late[i],
                    stall_s=self._stall_s[i],
                    moves=self._moves[i],
                    move_s=self._move_s[i],
                    hosted_s=self._hosted_s[i],
                    layer_s=self._layer_s[i],
                    wait_s=self._wait_s[i],
                )
                for i, spec in enumerate(self._layers)
            )
        )

    def totals(self) -> Totals:
        """What windows are cut from, as it is now. Synchronises with the device."""
        uses = self._device_uses.tolist()
        return Totals(
            steps=max(self._steps),
            arrays=(self._tokens[:, :-1] + self._device_tokens[:, :-1].cpu().numpy(), self._uses.copy(), self._reuse.copy()),
            lists=(
                [hits + resident for hits, resident in zip(self._hits, uses, strict=True)],
                *(list(counts) for counts in (self._misses, self._host_bytes, self._peer_bytes)),
            ),
            times=(list(self._layer_s), list(self._wait_s)),
        )


@dataclass(frozen=True)
class Totals:
    """Counters since loading, in the order of a ``Window``'s fields."""

    steps: int
    arrays: tuple[IntArray, ...]
    lists: tuple[list[int], ...]
    times: tuple[list[float], ...]


class WindowMeter:
    """Cuts one rank's telemetry into windows."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self._last = telemetry.totals()

    def cut(self, seconds: float) -> Window:
        """What was counted since the last cut, which was so long ago."""
        last, self._last = self._last, self._telemetry.totals()
        now = self._last
        tokens, uses, reuse = (np.subtract(a, b, dtype="<i8").tobytes() for a, b in zip(now.arrays, last.arrays, strict=True))
        hits, misses, host_bytes, peer_bytes = (_less(a, b) for a, b in zip(now.lists, last.lists, strict=True))
        host_bytes = tuple(max(0, more) for more in host_bytes)  # a prefetch of the last window may have been given up in this
        layer_s, wait_s = (_less(a, b) for a, b in zip(now.times, last.times, strict=True))
        return Window(
            steps=now.steps - last.steps,
            seconds=seconds,
            tokens=tokens,
            uses=uses,
            reuse=reuse,
            hits=hits,
            misses=misses,
            host_bytes=host_bytes,
            peer_bytes=peer_bytes,
            layer_s=layer_s,
            wait_s=wait_s,
        )


def _less(now: Sequence[Number], last: Sequence[Number]) -> tuple[Number, ...]:
    return tuple(a - b for a, b in zip(now, last, strict=True))
