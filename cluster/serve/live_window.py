"""``LiveWindow``: the ranks' counters over the last seconds, from successive samples. Pure.

Counters are a process's, since it loaded the model. A rank that is replaced begins at zero: its process is compared with the
first sample that has it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from cluster.reports import ClusterStats, RankStats
from epslots.telemetry import LayerStats

SPAN_S = 5.0

_COUNTERS: Mapping[str, Callable[[RankStats], float]] = {
    "new_tokens": lambda rank: rank.engine.new_tokens,
    "prompt_tokens": lambda rank: rank.engine.prompt_tokens,
    "hits": lambda rank: rank.stats.hits,
    "misses": lambda rank: rank.stats.misses,
    "steps": lambda rank: rank.stats.steps,
    "zero_miss_steps": lambda rank: rank.stats.zero_miss_steps,
    "host_bytes": lambda rank: rank.stats.total("host_bytes"),
    "peer_bytes": lambda rank: rank.stats.total("peer_bytes"),
    "computed": lambda rank: sum(map(computed_pairs, rank.stats.layers)),
}
"""The counters that are compared, by name; "computed" are pairs that the rank computed, its own and other ranks'."""


def computed_pairs(layer: LayerStats) -> int:
    """Pairs of token and expert that a rank computed in a layer."""
    return sum(layer.tokens_per_expert) - layer.pairs_sent + layer.pairs_received


@dataclass(frozen=True)
class LiveSample:
    """The counters of one moment.

    Attributes:
        at_s: when the ranks answered, on a monotonic clock.
        ranks: each rank's process, in order.
        counts: counters by process.
        loads: by layer and process, the pairs of the process's own tokens for each expert.
    """

    at_s: float
    ranks: tuple[str, ...]
    counts: Mapping[str, Mapping[str, float]]
    loads: Mapping[int, Mapping[str, Sequence[int]]]

    @classmethod
    def of(cls, stats: ClusterStats, at_s: float, layers: Iterable[int]) -> LiveSample:
        """The part of the ranks' counters that is kept.

        Args:
            layers: numbers of the MoE layers whose loads are kept.
        """
        return cls(
            at_s=at_s,
            ranks=tuple(rank.where for rank in stats.ranks),
            counts={rank.where: {name: read(rank) for name, read in _COUNTERS.items()} for rank in stats.ranks},
            loads={
                layer: {rank.where: rank.stats.layers[layer].tokens_per_expert for rank in stats.ranks}
                for layer in layers
                if layer < len(stats.total.layers)
            },
        )


@dataclass(frozen=True)
class LayerLoads:
    """A layer's load over some seconds.

    Attributes:
        pairs: by rank and expert, pairs of the rank's own tokens, wherever they were computed.
    """

    seconds: float
    pairs: tuple[tuple[int, ...], ...]


class LiveWindow:
    """The samples of the last ``SPAN_S`` seconds, oldest first; two are kept in any case."""

    def __init__(self) -> None:
        self._samples: deque[LiveSample] = deque()

    def add(self, sample: LiveSample) -> None:
        """Add a sample, if it is newer than the last."""
        samples = self._samples
        if samples and sample.at_s <= samples[-1].at_s:
            return
        samples.append(sample)
        while len(samples) > 2 and samples[-1].at_s - samples[0].at_s > SPAN_S:
            samples.popleft()

    @property
    def seconds(self) -> float:
        """From the oldest sample to the newest."""
        return self._samples[-1].at_s - self._samples[0].at_s if self._samples else 0.0

    def changes(self) -> list[dict[str, float]] | None:
        """By rank, in order, how much each counter has grown; None with fewer than two samples."""
        if len(self._samples) < 2:
            return None
        newest = self._samples[-1]
        found = []
        for process in newest.ranks:
            first = next(sample.counts[process] for sample in self._samples if process in sample.counts)
            # A prefetch that was counted may have been cancelled since.
            found.append({name: max(0, count - first[name]) for name, count in newest.counts[process].items()})
        return found

    def loads(self, layer: int) -> LayerLoads | None:
        """A layer's loads; None with fewer than two samples of it."""
        having = [sample for sample in self._samples if layer in sample.loads]
        if len(having) < 2:
            return None
        pairs = []
        for process in having[-1].ranks:
            first = next(sample.loads[layer][process] for sample in having if process in sample.loads[layer])
            now = having[-1].loads[layer][process]
            pairs.append(tuple(count - before for count, before in zip(now, first, strict=True)))
        return LayerLoads(having[-1].at_s - having[0].at_s, tuple(pairs))
