"""``epslots simulate``: the step times of a cluster, from a routing trace and a machine's bandwidths."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, NamedTuple, Optional

import msgspec
import typer

from epslots.arrays import IntArray
from epslots.cli.column_table import Columns, column_table
from epslots.cli.option_groups import takes_groups
from epslots.cli.options import POLICY_HELP
from epslots.cli.simulate_load import ArrivalOptions, DivisionOptions, EngineOptions, find_simulator, print_load
from epslots.cli.trace import slots_of_layers
from epslots.compiled import prepare
from epslots.errors import ConfigError, shown
from epslots.given_files import read_given
from epslots.placement.placement import MOST_RANKS, Placement
from epslots.placement.placement_file import read_placement
from epslots.planner.cache_policy import DEFAULT_POLICY, POLICIES
from epslots.progress import counting
from epslots.rank_groups import RankGroups
from epslots.simulation.grouped_cluster import GroupedCluster
from epslots.simulation.simulate import GROUP_SIZE, Outcome, RecordedTraffic, SimulatedCluster, simulate
from epslots.simulation.timing import DEFAULT_DEVICE, DEVICES, HandOverTiming, Timing, hand_over_of, timing_of
from epslots.streams import table_console
from epslots.units import format_bytes, parse_bytes, parse_count

_LANES_MAX = 2**22
_TIMING_FILE_BYTES_MAX = 1 << 20
_NUMBER_MAX = 10**6
_PLAIN_WIDTH = 150
_DEFAULT_RANKS = 8


class Times(NamedTuple):
    """The model of time: of steps, and of hand-overs."""

    steps: Timing
    hand_over: HandOverTiming


@dataclass(frozen=True)
class ClusterOptions:
    """The simulated cluster."""

    PANEL: ClassVar[str] = "The cluster"

    ranks: Annotated[Optional[int], typer.Option(min=1, max=MOST_RANKS, help="Ranks. Default: those of both roles, or 8.")] = (
        None
    )
    nodes: Annotated[int, typer.Option(min=1, help="Nodes that the ranks are on.")] = 1
    slots: Annotated[str, typer.Option("--slots", "-s", help="Slots of each layer on each rank: 16, or 25%.")] = "25%"
    policy: Annotated[str, typer.Option(help=POLICY_HELP)] = DEFAULT_POLICY
    group_size: Annotated[int, typer.Option(min=1, help="Most ranks of an expert-parallel group.")] = GROUP_SIZE
    placement: Annotated[Optional[Path], typer.Option(help="A .placement to begin with, for the ranks of a group.")] = None
    controller: Annotated[bool, typer.Option("--controller/--static", help="Decide on placements as traffic goes on.")] = False
    window_steps: Annotated[int, typer.Option(min=1, help="With --controller: steps of a window of telemetry.")] = 50

    def division(self, given: DivisionOptions) -> RankGroups:
        """The ranks in groups. ConfigError: the numbers don't go together."""
        both = given.prefill_ranks + given.decode_ranks if given.prefill_ranks and given.decode_ranks else _DEFAULT_RANKS
        return given.division(both if self.ranks is None else self.ranks, self.group_size)

    def simulated(self, division: DivisionOptions, quota_L: IntArray, timing: Timing, expert_bytes: int) -> SimulatedCluster:
        """The cluster with ``quota_L`` slots on a rank. ConfigError: the placement file is for other slots."""
        ranks = _DEFAULT_RANKS if self.ranks is None else self.ranks
        return SimulatedCluster(
            ranks=ranks,
            nodes=self.nodes,
            quota_L=quota_L,
            timing=timing,
            expert_bytes=expert_bytes,
            policy=POLICIES[self.policy],
            group_size=self.group_size if division.groups is None else self.division(division).group_size,
            placement=self._first_placement(int(quota_L.sum())),
            window_steps=self.window_steps if self.controller else 0,
        )

    def serving(
        self, division: DivisionOptions, engine: EngineOptions, quota_L: IntArray, times: Times, expert_bytes: int
    ) -> GroupedCluster:
        """The cluster for requests that arrive. ConfigError: a setting doesn't go with these."""
        if self.placement is not None:
            raise ConfigError("--placement with --rate: experts are dealt by slots at first; leave one out")
        return GroupedCluster(
            division=self.division(division),
            nodes=self.nodes,
            quota_L=quota_L,
            timing=times.steps,
            hand_over=times.hand_over,
            expert_bytes=expert_bytes,
            kv_token_bytes=engine.token_bytes,
            policy=POLICIES[self.policy],
            engine=engine.engine,
            depth=1.0 if engine.layers is None else engine.layers / len(quota_L),
            window_steps=self.window_steps if self.controller else 0,
            speeds=engine.rank_speeds,
        )

    def _first_placement(self, slots: int) -> Placement | None:
        if self.placement is None:
            return None
        found = read_placement(self.placement)
        given = set(found.quota_LR.sum(0).tolist())
        if given != {slots}:
            raise ConfigError(
                f"{self.placement} is for {sorted(given)} slots on a rank, all layers together; "
                f"--slots {self.slots} is {slots}"
            )
        return found


@dataclass(frozen=True)
class TrafficOptions:
    """The work of each rank."""

    PANEL: ClassVar[str] = "Full batches (without --rate)"

    batch: Annotated[str, typer.Option(help="Sequences of each rank at a time; several (1,8,64) give a curve.")] = "8"
    steps: Annotated[int, typer.Option(min=1, help="Steps that count.")] = 200
    warm_up: Annotated[int, typer.Option(min=0, help="Steps before these.")] = 50

    def batches(self, ranks: int) -> list[int]:
        """The sequences of a rank, for each simulation. ConfigError: they are no numbers, or too many."""
        found = [_positive("--batch", given) for given in self.batch.split(",")]
        if max(found) * ranks > _LANES_MAX:
            raise ConfigError(f"--batch {max(found)} on {ranks} ranks: allowed: {_LANES_MAX} sequences in all")
        return found


@dataclass(frozen=True)
class TimeOptions:
    """Bandwidths and times."""

    PANEL: ClassVar[str] = "The model of time"

    machine: Annotated[str, typer.Option(help=f"Bandwidths: {', '.join(DEVICES)}.")] = DEFAULT_DEVICE
    timing: Annotated[
        Optional[Path],
        typer.Option(help="Measured times instead: JSON with the fields of epslots.simulation.timing.Timing, in ns."),
    ] = None
    expert_bytes: Annotated[str, typer.Option(help="An expert's size; default: 3 x 2048 x 768 weights in bf16.")] = "9MiB"
    row_bytes: Annotated[str, typer.Option(help="A hidden state's size; default: 2048 in bf16.")] = "4KiB"
    layer_us: Annotated[float, typer.Option(min=0, max=1e6, help="Microseconds of a layer besides its experts.")] = 40.0
    token_us: Annotated[float, typer.Option(min=0, max=1e6, help="The same for each token of a rank.")] = 0.05

    def model(self) -> Timing:
        """The measured times of the file, or those of the machine's data sheet. ConfigError: the file can't be read."""
        device, layer_ns, token_ns = DEVICES[self.machine], round(self.layer_us * 1e3), round(self.token_us * 1e3)
        times = timing_of(device, parse_bytes(self.expert_bytes), parse_bytes(self.row_bytes), layer_ns, token_ns)
        return times if self.timing is None else _read_timing(self.timing)


@takes_groups
def simulate_command(
    trace: Annotated[Path, typer.Argument(help="A routing trace (.npz), from `epslots trace record`.")],
    cluster: ClusterOptions,
    division: DivisionOptions,
    traffic: TrafficOptions,
    arrivals: ArrivalOptions,
    engine: EngineOptions,
    time: TimeOptions,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Simulate a cluster of 1 to 1,024 ranks on a routing trace.

        epslots simulate trace.npz --ranks 4 --nodes 2 --slots 10 --batch 1,16,64

    Shown are step times, balance, hit rates and bytes.
    Planner, caches and placements are those that ranks run; only time is a model.
    Each rank decodes a batch of the trace's sequences, a token of each in a step.
    Bandwidths of data sheets rank choices; to predict a machine, give --timing.

    With --rate, requests arrive, and groups of ranks serve them, by roles if there are some:

        epslots simulate trace.npz --prefill-ranks 4 --decode-ranks 12 --rate 50,100,200 --prompt-tokens 200-3000 --layers 48

    Shown are the times to the first and to each further token, tokens/s, and hand-overs.
    Scheduler, hand-overs, batches and controller are the cluster's own, too.
    """
    if cluster.policy not in POLICIES:
        raise ConfigError(f"--policy {cluster.policy!r}: allowed: {', '.join(POLICIES)}")
    if time.machine not in DEVICES:
        raise ConfigError(f"--machine {time.machine!r}: allowed: {', '.join(DEVICES)}")
    if arrivals.rate is not None:
        _simulate_load(trace, cluster, division, arrivals, engine, time, as_json=as_json)
        return
    if division.prefill_ranks:
        raise ConfigError(
            f"--prefill-ranks {division.prefill_ranks}; allowed with --rate: roles are those of arriving requests"
        )
    batches = traffic.batches(_DEFAULT_RANKS if cluster.ranks is None else cluster.ranks)
    size, timing = parse_bytes(time.expert_bytes), time.model()
    shape, slots = _read(trace, cluster.slots)
    simulated = cluster.simulated(division, slots, timing, size)
    prepare()
    with counting("simulate", len(batches) * (traffic.steps + traffic.warm_up) * len(simulated.groups())) as advance:
        outcomes = [simulate(shape, simulated, one, traffic.steps, traffic.warm_up, advance) for one in batches]
    if as_json:
        settings = {"trace": str(trace), "policy": cluster.policy, "expert_bytes": size, "timing": timing}
        typer.echo(json.dumps(msgspec.to_builtins({**settings, "curve": outcomes}), indent=1))
    else:
        _print(outcomes)


def _read(trace: Path, slots: str) -> tuple[RecordedTraffic, IntArray]:
    """A trace, and the slots of its layers."""
    from epslots.trace import Trace

    found = Trace.load(trace)
    return RecordedTraffic(found.expert_ids, found.starts, found.num_experts), slots_of_layers(slots, found.num_experts)


def _simulate_load(
    trace: Path,
    cluster: ClusterOptions,
    division: DivisionOptions,
    arrivals: ArrivalOptions,
    engine: EngineOptions,
    time: TimeOptions,
    *,
    as_json: bool,
) -> None:
    workloads, size = arrivals.workloads(), parse_bytes(time.expert_bytes)
    times = Times(time.model(), hand_over_of(DEVICES[time.machine], engine.hand_over_ms / 1e3))
    run = find_simulator()
    traffic, slots = _read(trace, cluster.slots)
    served = cluster.serving(division, engine, slots, times, size)
    prepare()
    with counting("simulate", sum(one.requests for one in workloads)) as advance:
        figures = [run(served, traffic, one, advance) for one in workloads]
    if as_json:
        settings = {"trace": str(trace), "policy": cluster.policy, "division": served.division, "timing": times._asdict()}
        typer.echo(json.dumps(msgspec.to_builtins({**settings, "curve": figures}), indent=1))
    else:
        print_load(served.division, figures)


def _positive(name: str, given: str) -> int:
    if not 0 < (parse_count(given) or 0) < _NUMBER_MAX:
        raise ConfigError(f"{name} {shown(given)}: allowed: numbers from 1, below {_NUMBER_MAX:,}, separated by commas")
    return int(given)


def _read_timing(path: Path) -> Timing:
    try:
        return msgspec.json.decode(read_given(path, _TIMING_FILE_BYTES_MAX), type=Timing)
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}") from error
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ConfigError(f"{path} holds no timing: {error}") from error


def _bytes_of_a_step(outcome: Outcome, source: str) -> str:
    """Bytes that a rank fetches in a step from "host" or "peers", for placements included."""
    parts = outcome.bytes_by_source
    return format_bytes((parts[source] + parts[f"{source}_for_placements"]) // (outcome.ranks * outcome.steps))


_COLUMNS: Columns[Outcome] = (
    ("batch of a rank", lambda one: str(one.batch)),
    ("P50 ms", lambda one: f"{one.step_ms.p50:.3f}"),
    ("P99 ms", lambda one: f"{one.step_ms.p99:.3f}"),
    ("tokens/s", lambda one: f"{one.tokens_per_s:,.0f}"),
    ("balance", lambda one: f"{one.balance:.3f}"),
    ("hit rate", lambda one: f"{one.hit_rate:.1%}"),
    ("from host", lambda one: _bytes_of_a_step(one, "host")),
    ("from peers", lambda one: _bytes_of_a_step(one, "peers")),
    ("placements", lambda one: str(one.placements)),
)


def _print(outcomes: Sequence[Outcome]) -> None:
    first = outcomes[0]
    title = f"{first.ranks} ranks on {first.nodes} nodes in groups of {first.ranks // first.groups}: {first.steps} steps"
    caption = "from host, from peers: bytes a rank fetches in a step, for placements included"
    table_console(_PLAIN_WIDTH).print(column_table(title, _COLUMNS, outcomes, caption))
