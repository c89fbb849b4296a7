"""Counters as tables that people read, on standard error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from rich.markup import escape
from rich.table import Table

from epslots.generation.engine_stats import EngineStats, sum_engines
from epslots.generation.requests import TokenLogprobs
from epslots.streams import table_console
from epslots.telemetry import LayerStats, Stats
from epslots.units import format_bytes


class OneRankStats(Protocol):
    """Counters of one rank, and where it is."""

    @property
    def rank(self) -> int: ...
    @property
    def where(self) -> str: ...
    @property
    def stats(self) -> Stats: ...
    @property
    def engine(self) -> EngineStats: ...


class RanksStats(Protocol):
    """Counters of all ranks, and their sums."""

    @property
    def ranks(self) -> Sequence[OneRankStats]: ...
    @property
    def total(self) -> Stats: ...


def stats_table(stats: Stats, *, link: str | None = None) -> Table:
    """One row for each MoE layer, and their sums. ``link`` is the emulated link, which the caption names."""
    table = Table(title="expert slots", title_justify="left", caption_justify="left")
    table.add_column("layer")
    for heading in ("slots", "steps", "hit rate", "misses", "passes/step", "evictions", "fetched", "stall", "hottest"):
        table.add_column(heading, justify="right")
    for layer in stats.layers:
        table.add_row(
            layer.layer,
            f"{layer.slots}/{layer.num_experts}",
            f"{layer.steps:,}",
            _hit_rate(layer),
            f"{layer.misses:,}",
            f"{layer.passes / max(1, layer.steps):.2f}",
            f"{layer.evictions:,}",
            format_bytes(layer.bytes_fetched),
            f"{layer.stall_s:.3f} s",
            _hottest(layer),
        )
    table.add_section()
    table.add_row(
        "all layers",
        f"{stats.total('slots')}/{stats.total('num_experts')}",
        "",
        _hit_rate(stats),
        f"{stats.misses:,}",
        "",
        f"{stats.total('evictions'):,}",
        format_bytes(stats.bytes_fetched),
        f"{stats.stall_s:.3f} s",
        "",
    )
    table.caption = (
        "hit rate: uses of an expert that found it in a slot; hottest: the expert with the most tokens, and its share\n"
        f"zero-miss steps, in which a rank missed in no layer: {_zero_miss(stats)}"
    )
    if read := stats.total("disk_bytes"):
        table.caption += f"\nread from the disk, for fetches and prefetches: {format_bytes(read)}"
    if link is not None:
        table.caption += f"\nthe link was emulated: {link}"
    return table


def _hit_rate(counters: LayerStats | Stats) -> str:
    """Of a rank or layer that used no expert there is none to show: the counters' own 1.0 would read as a good one."""
    return f"{counters.hit_rate:.1%}" if counters.hits + counters.misses else "-"


def _zero_miss(stats: Stats) -> str:
    return f"{stats.zero_miss_steps:,} of {stats.steps:,} ({stats.zero_miss_share:.1%})"


def _hottest(layer: LayerStats) -> str:
    total = sum(layer.tokens_per_expert)
    if not total:
        return "-"
    most = max(layer.tokens_per_expert)
    return f"#{layer.tokens_per_expert.index(most)} {most / total:.1%}"


def ranks_table(ranks: Sequence[OneRankStats]) -> Table:
    """One row for each rank: what its slots did, and what it computed for others."""
    table = Table(title="ranks", title_justify="left", caption_justify="left")
    table.add_column("rank")
    table.add_column("where")
    for heading in (
        "slots",
        "hit rate",
        "misses",
        "zero-miss steps",
        "from host",
        "from peers",
        "pairs sent",
        "received",
        "stall",
    ):
        table.add_column(heading, justify="right")
    for one in ranks:
        total = one.stats.total
        table.add_row(
            str(one.rank),
            one.where,
            f"{total('slots')}/{total('num_experts')}",
            _hit_rate(one.stats),
            f"{one.stats.misses:,}",
            _zero_miss(one.stats),
            format_bytes(total("host_bytes")),
            format_bytes(total("peer_bytes")),
            f"{total('pairs_sent'):,}",
            f"{total('pairs_received'):,}",
            f"{one.stats.stall_s:.3f} s",
        )
    table.caption = "pairs: (token, k) that a rank had others compute, and computed for others"
    if any(read := [one.stats.total("disk_bytes") for one in ranks]):
        table.caption += f"\nread from the disk by each rank: {', '.join(map(format_bytes, read))}"
    return table


def requests_table(ranks: Sequence[OneRankStats]) -> Table:
    """One row for each rank: what its engine did for requests."""
    table = Table(title="requests", title_justify="left", caption_justify="left")
    for heading in (
        "rank",
        "steps",
        "replayed",
        "prompt tokens",
        "reused",
        "new tokens",
        "preempted",
        "running",
        "waiting",
        "cache used",
    ):
        table.add_column(heading, justify="right")
    for one in ranks:
        engine = one.engine
        table.add_row(
            str(one.rank),
            f"{engine.steps:,}",
            f"{engine.replayed_steps:,}",
            f"{engine.prompt_tokens:,}",
            f"{engine.reused_tokens:,}",
            f"{engine.new_tokens:,}",
            f"{engine.preempted:,}",
            f"{engine.running:,}",
            f"{engine.waiting:,}",
            f"{engine.kv_usage:.1%} of {engine.kv_tokens:,}"
            + (f" (up to {engine.kv_most_tokens:,}; {engine.ceded_slots:,} slots ceded)" if engine.exchanges_memory else ""),
        )
    table.caption = "reused: tokens of prompts that the cache held; preempted: requests that lost their place in it for a time"
    if len(ranks) > 1 and (skew := sum_engines([one.engine for one in ranks]).step_skew):
        table.caption += f"\ntokens of a step's most loaded rank over the mean of those that have some: {skew:.2f}"
    for one in ranks:
        if one.engine.capture_obstacle is not None:
            table.caption += escape(f"\nrank {one.rank} decodes without CUDA graphs: {one.engine.capture_obstacle}")
        elif one.engine.whole_obstacle is not None:
            table.caption += escape(
                f"\nrank {one.rank} decodes by CUDA graphs between MoE layers: {one.engine.whole_obstacle}"
            )
        for steps, why in (
            (one.engine.crowded_steps, "they could need more experts than a layer has slots"),
            (one.engine.ragged_steps, "one request is far longer than the others"),
        ):
            if steps:
                table.caption += f"\nrank {one.rank} made {steps:,} decoding steps without CUDA graphs: {why}"
    return table


def print_stats(stats: RanksStats, *, link: str | None = None) -> None:
    """Print the counters to standard error: of each rank, and of each layer, summed over ranks.

    Args:
        link: the emulated link, if there was one.
    """
    console = table_console(140, stderr=True)
    if len(stats.ranks) > 1:
        console.print(ranks_table(stats.ranks))
    console.print(requests_table(stats.ranks))
    console.print(stats_table(stats.total, link=link))


def print_logprobs(title: str, logprobs: Sequence[TokenLogprobs], text_of: Callable[[int], str]) -> None:
    """Print log-probabilities to standard error: a row for each token, with the likeliest tokens at its place.

    Args:
        text_of: a token's text.
    """
    table = Table(title=title, title_justify="left")
    table.add_column("token", justify="right")
    table.add_column("text")
    table.add_column("log-probability", justify="right")
    table.add_column("likeliest")
    for row in logprobs:
        likeliest = ", ".join(f"{text_of(token)!r} {logprob:.3f}" for token, logprob in row.top)
        table.add_row(str(row.token), escape(repr(text_of(row.token))), f"{row.logprob:.3f}", escape(likeliest))
    table_console(140, stderr=True).print(table)
