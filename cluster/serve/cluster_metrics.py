"""Prometheus metrics of the ranks: queue, cache, expert slots, groups. Read from the latest sample when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from cluster.reports import ClusterState, ClusterStats, GroupReport, GroupStats
from cluster.serve.live_window import computed_pairs
from epslots.telemetry import LayerStats


@dataclass(frozen=True)
class ServiceSample:
    """Numbers of one moment.

    Attributes:
        state: the driver's; None until the cluster has started.
        stats: the ranks' latest; None until they have answered once.
        recoveries: times that the group has formed anew.
        log_lines_lost: lines of the access log that found no room.
    """

    state: ClusterState | None = None
    stats: ClusterStats | None = None
    recoveries: int = 0
    log_lines_lost: int = 0


_LAYER_COUNTERS = {
    "expert_hits": ("hits", "Uses of an expert that found it in a slot."),
    "expert_misses": ("misses", "Uses of an expert that had to fetch it first."),
    "expert_evictions": ("evictions", "Experts that lost their slot to a fetch."),
    "expert_passes": ("passes", "Passes over part of a layer's experts."),
    "expert_cpu_misses": ("cpu_misses", "Misses that the host's CPU computed."),
    "expert_prefetches": ("prefetches", "Experts fetched before the layer's router had asked for them."),
    "expert_prefetches_taken_back": ("taken_back", "Those taken back: their step needed others, and no link had begun them."),
    "expert_prefetches_late": ("late", "Hits on prefetched experts whose fetch was still in flight."),
    "expert_migrations": ("migrations", "Experts fetched by migrations."),
    "expert_disk_bytes": ("disk_bytes", "Bytes of experts read from the disk, where host_memory bounds RAM."),
    "expert_stall_seconds": ("stall_s", "Seconds that hosts spent on demand fetches."),
    "expert_wait_seconds": ("wait_s", "Seconds that ranks waited for other ranks' counts."),
    "expert_pairs_sent": ("pairs_sent", "Pairs of token and expert that another rank computed."),
}
"""Our names, the counters of ``LayerStats``, and their meanings."""

_G = TypeVar("_G", GroupReport, GroupStats)
_Meaning = tuple[type[CounterMetricFamily | GaugeMetricFamily], Callable[[_G], float], str]
"""A metric's kind, its value, and its text."""
_GROUP_GAUGES: dict[str, _Meaning[GroupReport]] = {
    "ranks": (GaugeMetricFamily, lambda group: group.ranks, "Ranks of the group that serve."),
    "formed": (GaugeMetricFamily, lambda group: group.formed, "1 if the group serves; 0 while it forms or its ranks load."),
    "epoch": (GaugeMetricFamily, lambda group: group.epoch, "Number of the group; it grows when a rank is lost or joins."),
    "hand_overs_running": (GaugeMetricFamily, lambda group: group.handing_over, "Hand-overs under way from or to its ranks."),
}
_GROUP_COUNTERS: dict[str, _Meaning[GroupStats]] = {
    "requests": (GaugeMetricFamily, lambda group: group.requests, "Requests that its ranks have."),
    "kv_cache_usage_perc": (GaugeMetricFamily, lambda group: group.engine.kv_usage, "Share of its caches in use; 1 = all."),
    "kv_cache_tokens": (GaugeMetricFamily, lambda group: group.engine.kv_tokens, "Tokens that its caches have room for now."),
    "prompt_tokens": (CounterMetricFamily, lambda group: group.engine.prompt_tokens, "Prompt tokens that it computed."),
    "new_tokens": (CounterMetricFamily, lambda group: group.engine.new_tokens, "New tokens that it returned."),
    "expert_hits": (CounterMetricFamily, lambda group: group.hits, "Uses of an expert that found it in a slot."),
    "expert_misses": (CounterMetricFamily, lambda group: group.misses, "Uses of an expert that had to fetch it first."),
}
"""By our names: of what the driver knows of a group, and of what its ranks have counted."""


class ClusterCollector(Collector):
    """Makes metrics of the latest sample.

    Args:
        prefix: of all names.
        model: the label ``model_name``.
        sample: returns the latest sample.
    """

    def __init__(self, prefix: str, model: str, sample: Callable[[], ServiceSample]) -> None:
        self._prefix, self._model, self._sample = prefix, model, sample

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering asks for no sample."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The metrics of the cluster as a whole."""
        sample = self._sample()
        yield self._counter("group_recoveries", sample.recoveries, "Times that the group of ranks has formed anew.")
        yield self._counter("log_lines_lost", sample.log_lines_lost, "Lines of the access log that found no room.")
        if sample.state is not None:
            yield from self._of_state(sample.state)
        if sample.stats is not None:
            yield from self._of_requests(sample.stats)
            yield from self._of_experts(sample.stats)

    def _of_state(self, state: ClusterState) -> Iterator[Metric]:
        yield self._gauge("num_requests_running", state.running, "Requests that a rank has.")
        yield self._gauge("num_requests_waiting", state.queued, "Requests that wait for a rank with room.")
        yield self._gauge("num_requests_free", state.free, "Requests that the queue has room for.")
        yield self._gauge("ranks", state.ranks, "Ranks that serve.")
        yield self._gauge("epoch", state.epoch, "Number of the newest group of ranks.")
        yield from self._by_group(state.groups, _GROUP_GAUGES)

    def _of_requests(self, stats: ClusterStats) -> Iterator[Metric]:
        engine = stats.engine
        yield self._gauge("kv_cache_usage_perc", engine.kv_usage, "Share of the caches in use; 1 = all.")
        yield self._gauge("kv_cache_tokens", engine.kv_tokens, "Tokens that the caches have room for now.")
        yield self._gauge("slots_ceded", engine.ceded_slots, "Slots of experts that hold a part of them, by kv_tokens=auto.")
        yield self._counter("num_preemptions", engine.preempted, "Times that a request gave up its place in the cache.")
        yield self._counter("prefix_cache_hits", engine.reused_tokens, "Prompt tokens that the cache held already.")
        queries = engine.prompt_tokens + engine.reused_tokens
        yield self._counter("prefix_cache_queries", queries, "Prompt tokens that were looked up in the cache.")
        yield self._counter("engine_steps", engine.steps, "Forward passes over requests.")
        yield self._counter("engine_steps_replayed", engine.replayed_steps, "Those replayed from a CUDA graph, of all ranks.")
        crowded = "Decoding steps without a CUDA graph, because they could need more experts than a layer has slots."
        yield self._counter("engine_steps_crowded", engine.crowded_steps, crowded)
        ragged = "Decoding steps without a CUDA graph, because one request is far longer than most others."
        yield self._counter("engine_steps_ragged", engine.ragged_steps, ragged)
        yield self._gauge("graph_bytes", engine.graph_bytes, "Device memory that capturing CUDA graphs took, of all ranks.")
        failed = "Captures of CUDA graphs that ran out of memory; each is tried again."
        yield self._counter("captures_failed", engine.failed_captures, failed)
        longest = "Longest time that a request is without its first token; it grows where lower priorities starve."
        yield self._gauge("longest_wait_seconds", stats.longest_wait_s, longest)
        yield self._gauge("ranks_missing", len(stats.missing), "Ranks that should serve, and don't now.")
        yield self._gauge("groups", stats.groups, "Groups of ranks: each is a whole model.")
        yield from self._by_group(stats.by_group(), _GROUP_COUNTERS)
        hand_overs = stats.hand_overs
        yield self._counter("hand_overs", hand_overs.done, "Requests that went on at a decode rank, with their cache.")
        failed = "Hand-overs that failed, or whose request had ended: it went on where it was, or was computed again."
        yield self._counter("hand_overs_failed", hand_overs.failed, failed)
        yield self._counter("hand_over_bytes", hand_overs.nbytes, "Bytes of the caches that were handed over.")
        yield self._counter("hand_over_seconds", hand_overs.seconds, "Time in which requests stood still for hand-overs.")
        memory = GaugeMetricFamily(
            f"{self._prefix}rank_memory_bytes", "Resident memory.", labels=["model_name", "rank", "group", "role"]
        )
        for rank in stats.ranks:
            memory.add_metric([self._model, str(rank.rank), str(rank.group), rank.role], rank.memory_bytes)
        yield memory
        uncaptured = GaugeMetricFamily(
            f"{self._prefix}rank_uncaptured",
            "1 for a rank on a GPU that decodes without CUDA graphs, with the reason.",
            labels=["model_name", "rank", "obstacle"],
        )
        for rank in stats.ranks:
            if rank.engine.capture_obstacle is not None:
                uncaptured.add_metric([self._model, str(rank.rank), rank.engine.capture_obstacle], 1)
        yield uncaptured

    def _of_experts(self, stats: ClusterStats) -> Iterator[Metric]:
        total = stats.total
        for name, (counter, text) in _LAYER_COUNTERS.items():
            yield self._counter(name, total.total(counter), text)
        moved = CounterMetricFamily(
            f"{self._prefix}expert_bytes", "Bytes of experts that came into slots.", labels=["model_name", "source"]
        )
        moved.add_metric([self._model, "host"], total.total("host_bytes"))
        moved.add_metric([self._model, "peer"], total.total("peer_bytes"))
        yield moved
        yield self._counter("rank_steps", total.steps, "Forward passes, each counted once for every rank.")
        yield self._counter("zero_miss_steps", total.zero_miss_steps, "Those of rank_steps without a miss in any layer.")
        yield self._gauge("expert_slots", total.total("slots"), "Expert slots of all ranks and layers.")
        yield self._gauge("expert_balance", balance(stats), "Mean load of the ranks over the largest one's; 1 = equal loads.")
        if stats.controller is not None:
            yield self._gauge("placement_version", stats.controller.placement, "Version of the newest placement.")
            yield self._counter("controllers_started", stats.controller.started, "Controllers that were started.")
            yield self._counter("placements_refused", stats.controller.placements_rejected, "Placements that a rank rejected.")

    def layers_page(self) -> bytes:
        """The metrics of each MoE layer, in Prometheus' text format."""
        registry = CollectorRegistry()
        registry.register(_LayerCollector(self._prefix, self._model, self._sample()))
        found: bytes = generate_latest(registry)
        return found

    def _by_group(self, groups: Sequence[_G], meanings: Mapping[str, _Meaning[_G]]) -> Iterator[Metric]:
        """A metric of each meaning, with a sample of each group."""
        for name, (kind, read, text) in meanings.items():
            family = kind(f"{self._prefix}group_{name}", text, labels=["model_name", "group", "role"])
            for group in groups:
                family.add_metric([self._model, str(group.number), group.role], read(group))
            yield family

    def _counter(self, name: str, value: float, text: str) -> CounterMetricFamily:
        family = CounterMetricFamily(self._prefix + name, text, labels=["model_name"])
        family.add_metric([self._model], value)
        return family

    def _gauge(self, name: str, value: float, text: str) -> GaugeMetricFamily:
        family = GaugeMetricFamily(self._prefix + name, text, labels=["model_name"])
        family.add_metric([self._model], value)
        return family


class _LayerCollector(Collector):
    """Makes metrics of each layer, under names of their own: sums over layers stay right."""

    def __init__(self, prefix: str, model: str, sample: ServiceSample) -> None:
        self._prefix, self._model, self._stats = prefix, model, sample.stats

    def collect(self) -> Iterator[Metric]:
        layers: tuple[LayerStats, ...] = () if self._stats is None else self._stats.total.layers
        for name, (counter, text) in _LAYER_COUNTERS.items():
            family = CounterMetricFamily(f"{self._prefix}layer_{name}", text, labels=["model_name", "layer"])
            for layer in layers:
                family.add_metric([self._model, layer.layer], getattr(layer, counter))
            yield family


def balance(stats: ClusterStats) -> float:
    """Mean of the ranks' computed pairs over the largest, in their group, averaged over layers and groups; 1.0 without any."""
    found = []
    for group in stats.by_group():
        for rows in zip(*(rank.stats.layers for rank in group.ranks), strict=False):
            loads = [computed_pairs(row) for row in rows]
            if max(loads, default=0) > 0:
                found.append(sum(loads) / len(loads) / max(loads))
    return sum(found) / len(found) if found else 1.0
