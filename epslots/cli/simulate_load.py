"""``epslots simulate --rate``: requests that arrive at groups of ranks. Its options, and its table.

Another package simulates them, by an entry point:

[project.entry-points."epslots.simulators"]
load = "cluster.simulation.figures:simulate_load"
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Optional, cast

import typer

from epslots.cli.column_table import Columns, column_table
from epslots.cli.extensions import load_extension
from epslots.cli.options import DecodeRanksOption, PrefillRanksOption
from epslots.config import DEFAULT_BATCH_TOKENS, DEFAULT_REQUESTS, EngineConfig
from epslots.errors import ConfigError, shown
from epslots.rank_groups import RankGroups, divide_ranks
from epslots.simulation.load import LoadFigures, SimulateLoad, Workload
from epslots.simulation.timing import HAND_OVER_FIXED_S
from epslots.streams import table_console
from epslots.units import format_bytes, parse_bytes, parse_count

GROUP, NAME = "epslots.simulators", "load"
_PLAIN_WIDTH = 170


@dataclass(frozen=True)
class DivisionOptions:
    """The division of the ranks."""

    PANEL: ClassVar[str] = "Groups and roles"

    groups: Annotated[
        Optional[int],
        typer.Option(min=1, help="Groups of the ranks, each a whole model. Default: as few as --group-size allows."),
    ] = None
    prefill_ranks: PrefillRanksOption = 0
    decode_ranks: DecodeRanksOption = 0

    def division(self, ranks: int, group_size: int) -> RankGroups:
        """The ranks in groups. ConfigError: the numbers don't go together."""
        groups = -(-ranks // group_size) if self.groups is None else self.groups
        found = divide_ranks(ranks, groups, self.prefill_ranks, self.decode_ranks)
        assert found is not None
        return found


@dataclass(frozen=True)
class ArrivalOptions:
    """The requests of ``--rate``."""

    PANEL: ClassVar[str] = "Requests that arrive (with --rate)"

    rate: Annotated[
        Optional[str],
        typer.Option(help="Requests a second, of all ranks, at random times; several (100,200,400) give a curve."),
    ] = None
    requests: Annotated[int, typer.Option(min=1, help="Requests of each rate; the middle ones are measured.")] = 1000
    prompt_tokens: Annotated[str, typer.Option(help="Tokens of a prompt: a number, or the least and the most: 200-3000.")] = (
        "1000"
    )
    new_tokens: Annotated[str, typer.Option(help="New tokens of a request, alike.")] = "200"
    shared_tokens: Annotated[int, typer.Option(min=0, help="Tokens of each prompt's beginning that others have, too.")] = 0
    shared_prompts: Annotated[int, typer.Option(min=1, help="Different beginnings.")] = 1

    def workloads(self) -> list[Workload]:
        """The load of each rate. ConfigError: a number is out of range."""
        assert self.rate is not None
        lengths = _pair("--prompt-tokens", self.prompt_tokens), _pair("--new-tokens", self.new_tokens)
        return [
            Workload(_rate(given), self.requests, *lengths, self.shared_tokens, self.shared_prompts)
            for given in self.rate.split(",")
        ]


@dataclass(frozen=True)
class EngineOptions:
    """The engine of each rank, and what its caches weigh."""

    PANEL: ClassVar[str] = "The engines (with --rate)"

    kv_tokens: Annotated[int, typer.Option(min=1, help="Tokens that each rank's KV cache keeps.")] = 65_536
    max_requests: Annotated[int, typer.Option(min=1, help="Requests that a rank runs at a time.")] = DEFAULT_REQUESTS
    max_batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one step of a rank.")] = DEFAULT_BATCH_TOKENS
    step_target_ms: Annotated[
        Optional[float],
        typer.Option(help="Milliseconds that a step may take, about: long prompts are cut for it. Slow to simulate."),
    ] = None
    layers: Annotated[
        Optional[int],
        typer.Option(min=1, help="MoE layers of the model, which those of the trace stand for. Default: the trace's."),
    ] = None
    kv_token_bytes: Annotated[
        str, typer.Option(help="A token's cache in all layers; default: 48 layers of 2 x 4 heads x 128 numbers in bf16.")
    ] = "96KiB"
    hand_over_ms: Annotated[
        float, typer.Option(min=0, max=1e6, help="Milliseconds of a hand-over's messages, beside its bytes.")
    ] = HAND_OVER_FIXED_S * 1e3

    speeds: Annotated[
        str, typer.Option(help="Speeds of the ranks in turn, 1 = usual: 1,1,0.5. --controller learns them, as those of CPUs.")
    ] = "1"

    @property
    def rank_speeds(self) -> tuple[float, ...]:
        """The speeds. ConfigError: one is no number."""
        try:
            return tuple(map(float, self.speeds.split(",")))
        except ValueError as error:
            raise ConfigError(f"--speeds {self.speeds!r}: allowed: numbers, separated by commas") from error

    @property
    def engine(self) -> EngineConfig:
        """The settings of each rank's engine. ConfigError: one is out of range."""
        return EngineConfig(
            kv_tokens=self.kv_tokens,
            max_requests=self.max_requests,
            max_batch_tokens=self.max_batch_tokens,
            step_target_ms=self.step_target_ms,
        )

    @property
    def token_bytes(self) -> int:
        return parse_bytes(self.kv_token_bytes, "--kv-token-bytes")


def find_simulator() -> SimulateLoad:
    """The installed simulator of requests.

    Raises:
        ConfigError: there is none, or it can't be imported.
    """
    return cast(SimulateLoad, load_extension(GROUP, NAME, "--rate", "simulates requests"))


def _rate(given: str) -> float:
    try:
        return float(given)
    except ValueError:
        raise ConfigError(f"--rate {given!r}; allowed: requests a second, separated by commas") from None


def _pair(name: str, given: str) -> tuple[int, int]:
    least, _, most = given.partition("-")
    first, last = parse_count(least), parse_count(most or least)
    if first is None or last is None:
        raise ConfigError(f"{name} {shown(given)}; allowed: a number of tokens, or the least and the most: 200-3000")
    return first, last


def _by_role(values: dict[str, float]) -> str:
    return " | ".join(f"{value:.3g}" for value in values.values())


_COLUMNS: Columns[LoadFigures] = (
    ("requests/s", lambda one: f"{one.rate:,g}"),
    ("TTFT P50 ms", lambda one: f"{one.ttft_ms.p50:,.1f}"),
    ("P99", lambda one: f"{one.ttft_ms.p99:,.1f}"),
    ("TPOT P50 ms", lambda one: f"{one.tpot_ms.p50:.2f}"),
    ("P99", lambda one: f"{one.tpot_ms.p99:.2f}"),
    ("gap P99", lambda one: f"{one.gap_ms.p99:.2f}"),
    ("tokens/s", lambda one: f"{one.tokens_per_s:,.0f}"),
    ("reused", lambda one: f"{one.reused:.0%}"),
    ("hand-overs", lambda one: f"{one.hand_overs:,}"),
    ("bytes", lambda one: format_bytes(one.hand_over_bytes)),
    ("P99 ms", lambda one: "-" if one.hand_over_ms is None else f"{one.hand_over_ms.p99:.1f}"),
    ("imbalance", lambda one: _by_role(one.step_skew)),
    ("keeps up", lambda one: "yes" if one.kept_up else "no"),
)


def print_load(division: RankGroups, figures: Sequence[LoadFigures]) -> None:
    """Print a row for each rate."""
    roles = f", {division.groups_of('prefill')} of them for prompts" if division.prefill_ranks else ""
    title = f"{division.ranks} ranks in {division.groups} groups{roles}: simulated"
    caption = (
        "TTFT: arrival to first token. TPOT: time per further token, of each request; gap: between two of its tokens on one "
        "rank. imbalance: tokens of a step's busiest rank over the mean of those that have some"
        + (", prefill | decode" if roles else "")
    )
    table_console(_PLAIN_WIDTH).print(column_table(title, _COLUMNS, figures, caption))
