"""``LiveFrame``: all that the live page shows at a time, made of what is known. Pure.

The page's scripts read these fields by name (``static/main.js`` and the panels that it feeds).
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from cluster.messages.controller import Explanation
from cluster.messages.rank import LayerPlacement
from cluster.reports import ClusterState, ClusterStats
from cluster.serve.cluster_metrics import balance
from cluster.serve.latencies import Quantiles
from cluster.serve.live_window import LiveWindow
from cluster.serve.placement_words import placement_words
from epslots.rank_groups import Role


@dataclass(frozen=True)
class Known:
    """The service's knowledge at one moment.

    Attributes:
        phase: of the service's life.
        model: its name in requests.
        chat: whether the model has a chat template.
        state: the driver's; None until the cluster has started.
        stats: the ranks' latest; None until they have answered once.
        stats_age_s: seconds since they answered.
        recoveries: times that the group has formed anew.
        explanations: the controller's latest, by group; None if it has told none.
        ttft_s, per_token_s: of the requests that ended in the last minute.
    """

    phase: str
    model: str
    chat: bool
    state: ClusterState | None
    stats: ClusterStats | None
    stats_age_s: float | None
    recoveries: int
    explanations: tuple[Explanation | None, ...]
    ttft_s: Quantiles | None
    per_token_s: Quantiles | None


class LiveRates(msgspec.Struct, frozen=True, kw_only=True):
    """The last seconds' traffic.

    Attributes:
        seconds: how many.
        new_tokens, prompt_tokens: a second.
        hit_rate: hits per use; None without a use.
        zero_miss: share of the ranks' steps that were zero-miss steps; None without a step.
        host_bytes, peer_bytes: of experts that came into slots, a second.
    """

    seconds: float
    new_tokens: float
    prompt_tokens: float
    hit_rate: float | None
    zero_miss: float | None
    host_bytes: float
    peer_bytes: float


class LiveTotals(msgspec.Struct, frozen=True, kw_only=True):
    """Numbers since the ranks loaded the model, and those of now; each is a metric's.

    Attributes:
        new_tokens: that ranks returned.
        hit_rate: hits per use; 1 before the first.
        zero_miss: share of the ranks' steps that were zero-miss steps; 1 before the first.
        kv_usage: share of the caches in use.
        preempted: times that a request gave up its place in the cache.
        balance: mean load of the ranks over the largest one's.
    """

    new_tokens: int
    hit_rate: float
    zero_miss: float
    kv_usage: float
    preempted: int
    balance: float


class LiveRank(msgspec.Struct, frozen=True, kw_only=True):
    """One rank.

    Attributes:
        rank: its number.
        group, role: of its group.
        where: node and process.
        requests: that it serves.
        computed: pairs that it computed a second; None before two samples.
        memory_bytes: resident memory of its process.
    """

    rank: int
    group: int
    role: Role
    where: str
    requests: int
    computed: float | None
    memory_bytes: int


class LiveGroup(msgspec.Struct, frozen=True, kw_only=True):
    """One group of ranks.

    Attributes:
        number: of the group, from 0.
        role: what it serves.
        formed: it serves now; else it forms, or its ranks load.
        epoch: number of its process group; -1 before the first.
        serving: number of its ranks that serve.
        requests: that its ranks serve, as of their last answer.
        handing_over: hand-overs under way from or to its ranks.
        placement: version of its newest placement; -1 without a controller.
        controller: that plans its placement: its state; "" without one.
    """

    number: int
    role: Role
    formed: bool
    epoch: int
    serving: int
    requests: int
    handing_over: int
    placement: int
    controller: str


class LiveHandOvers(msgspec.Struct, frozen=True, kw_only=True):
    """Hand-overs since the start.

    Attributes:
        done, failed: number of them.
        mean_s, mean_bytes: of those that are done; 0 without one.
    """

    done: int
    failed: int
    mean_s: float
    mean_bytes: float


class LiveFrame(msgspec.Struct, frozen=True, kw_only=True):
    """The page's figures of the service as a whole.

    Attributes:
        at: seconds since 1970.
        phase, model, chat, recoveries: the fields of ``Known``.
        serving: number of ranks that serve.
        epoch: number of their group.
        running, waiting, places: requests that a rank has, that wait, and that there is room for.
        failure: whether the cluster can't go on.
        age_s: seconds since the ranks answered.
        ttft_s, per_token_s: P50 and P99 of the last minute's requests.
        layers: number of MoE layers.
        groups: each group of ranks.
        hand_overs: between groups; None if they have no roles.
        ranks: those that answered last.
        missing: a line for each rank that doesn't serve.
        placement: each group's placement and the controller's last decision about it, in sentences.
    """

    at: float
    phase: str
    model: str
    chat: bool
    serving: int
    epoch: int
    recoveries: int
    running: int
    waiting: int
    places: int
    failure: bool
    age_s: float | None
    rates: LiveRates | None
    totals: LiveTotals | None
    ttft_s: Quantiles | None
    per_token_s: Quantiles | None
    layers: int
    groups: tuple[LiveGroup, ...]
    hand_overs: LiveHandOvers | None
    ranks: tuple[LiveRank, ...]
    missing: tuple[str, ...]
    placement: tuple[str, ...]


class LiveLayer(msgspec.Struct, frozen=True, kw_only=True):
    """The page's figures of one MoE layer.

    Attributes:
        number: of the layer, from 0.
        name: the experts module's path in the model.
        experts: how many it has.
        seconds: that ``pairs`` are of.
        pairs: by rank of the first group and expert, pairs of its own tokens, wherever computed; None before two samples.
        holders: the ranks that hold the expert in a slot, by expert; None if no rank told.
        slots: number of slots, by rank.
    """

    number: int
    name: str
    experts: int
    seconds: float
    pairs: tuple[tuple[int, ...], ...] | None
    holders: tuple[tuple[int, ...], ...] | None
    slots: tuple[int, ...] | None


def frame_of(known: Known, window: LiveWindow, at: float) -> LiveFrame:
    """The frame of a moment.

    Args:
        window: the ranks' counters over the last seconds; its newest sample is of ``known.stats``.
        at: seconds since 1970.
    """
    state, stats = known.state, known.stats
    changes = window.changes()
    return LiveFrame(
        at=at,
        phase=known.phase,
        model=known.model,
        chat=known.chat,
        serving=0 if state is None else state.ranks,
        epoch=-1 if state is None else state.epoch,
        recoveries=known.recoveries,
        running=0 if state is None else state.running,
        waiting=0 if state is None else state.queued,
        places=0 if state is None else state.places,
        failure=state is not None and state.failure is not None,
        age_s=known.stats_age_s,
        rates=None if changes is None else _rates(changes, window.seconds),
        totals=None if stats is None else _totals(stats),
        ttft_s=known.ttft_s,
        per_token_s=known.per_token_s,
        layers=0 if stats is None else len(stats.total.layers),
        groups=() if state is None else _groups(state, stats),
        hand_overs=None if stats is None else _hand_overs(stats),
        ranks=() if stats is None else _ranks(stats, changes, window.seconds),
        missing=() if stats is None else stats.missing,
        placement=() if stats is None else placement_words(stats, known.explanations),
    )


def _rates(changes: list[dict[str, float]], seconds: float) -> LiveRates:
    total = {name: sum(rank[name] for rank in changes) for name in changes[0]} if changes else {}

    def share(part: str, of: float) -> float | None:
        return total[part] / of if of else None

    def speed(name: str) -> float:
        return total.get(name, 0) / seconds

    return LiveRates(
        seconds=seconds,
        new_tokens=speed("new_tokens"),
        prompt_tokens=speed("prompt_tokens"),
        hit_rate=share("hits", total.get("hits", 0) + total.get("misses", 0)),
        zero_miss=share("zero_miss_steps", total.get("steps", 0)),
        host_bytes=speed("host_bytes"),
        peer_bytes=speed("peer_bytes"),
    )


def _totals(stats: ClusterStats) -> LiveTotals:
    return LiveTotals(
        new_tokens=stats.engine.new_tokens,
        hit_rate=stats.total.hit_rate,
        zero_miss=stats.total.zero_miss_share,
        kv_usage=stats.engine.kv_usage,
        preempted=stats.engine.preempted,
        balance=balance(stats),
    )


def _groups(state: ClusterState, stats: ClusterStats | None) -> tuple[LiveGroup, ...]:
    counted = {} if stats is None else {group.number: group for group in stats.by_group()}
    controllers = () if stats is None else stats.controllers
    return tuple(
        LiveGroup(
            number=group.number,
            role=group.role,
            formed=group.formed,
            epoch=group.epoch,
            serving=group.ranks,
            requests=counted[group.number].requests if group.number in counted else 0,
            handing_over=group.handing_over,
            placement=controllers[group.number].placement if group.number < len(controllers) else -1,
            controller=controllers[group.number].state if group.number < len(controllers) else "",
        )
        for group in state.groups
    )


def _hand_overs(stats: ClusterStats) -> LiveHandOvers | None:
    if all(rank.role == "mixed" for rank in stats.ranks):
        return None
    counts = stats.hand_overs
    done = max(1, counts.done)
    return LiveHandOvers(done=counts.done, failed=counts.failed, mean_s=counts.seconds / done, mean_bytes=counts.nbytes / done)


def _ranks(stats: ClusterStats, changes: list[dict[str, float]] | None, seconds: float) -> tuple[LiveRank, ...]:
    return tuple(
        LiveRank(
            rank=rank.rank,
            group=rank.group,
            role=rank.role,
            where=rank.where,
            requests=rank.requests,
            computed=None if changes is None else changes[number]["computed"] / seconds,
            memory_bytes=rank.memory_bytes,
        )
        for number, rank in enumerate(stats.ranks)
    )


def layer_of(known: Known, window: LiveWindow, number: int) -> LiveLayer | None:
    """The page's figures of a layer; None if the ranks haven't answered, or there is no such layer."""
    stats = known.stats
    if stats is None or number >= len(stats.total.layers):
        return None
    layer, loads = stats.total.layers[number], window.loads(number)
    slots = _slots(stats, layer.layer)
    shown = None if slots is None else len(slots.slots)  # ranks of the first group, whose slots were asked for
    return LiveLayer(
        number=number,
        name=layer.layer,
        experts=layer.num_experts,
        seconds=0.0 if loads is None else loads.seconds,
        pairs=None if loads is None else loads.pairs[:shown],
        holders=None if slots is None else slots.holders,
        slots=None if slots is None else slots.slots,
    )


def _slots(stats: ClusterStats, name: str) -> LayerPlacement | None:
    layers = () if stats.placement is None else stats.placement.layers
    return next((layer for layer in layers if layer.layer == name), None)
