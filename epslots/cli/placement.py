"""``epslots placement``: judge the planner on recorded loads, make a placement from a record, look at one."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from epslots.errors import ConfigError
from epslots.placement.placement import MOST_RANKS
from epslots.streams import table_console

if TYPE_CHECKING:
    from epslots.arrays import IntArray
    from epslots.placement.planner import RankHardware
    from epslots.simulation.placement_replay import Scores
    from epslots.trace import Trace

placement_app = typer.Typer(help="Placements: where experts should live.", no_args_is_help=True)

# A proposal makes a bounded number of moves; offline there is time for more.
OFFLINE_ROUNDS = 8

LoadsArgument = Annotated[
    Path, typer.Argument(help="An .npz: loads, int64 of (windows, layers, experts), or a routing trace.")
]
RanksOption = Annotated[int, typer.Option("--ranks", min=1, max=MOST_RANKS, help="Ranks.")]
SlotsOption = Annotated[int, typer.Option("--slots", min=1, help="Slots of each rank and layer.")]
NodesOption = Annotated[int, typer.Option("--nodes", min=1, help="Nodes that the ranks are spread over, one after another.")]
FlatOption = Annotated[bool, typer.Option("--flat", help="Pay no attention to nodes.")]
StepsOption = Annotated[
    int, typer.Option("--steps", min=1, help="Steps of a window; matters where slots don't suffice for all experts.")
]
WindowOption = Annotated[int, typer.Option("--window", min=1, help="Tokens of a window, where a routing trace is given.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]


@placement_app.command()
def replay(
    loads: LoadsArgument,
    ranks: RanksOption,
    slots: SlotsOption,
    nodes: NodesOption = 1,
    flat: FlatOption = False,
    copy_share: Annotated[
        Optional[float],
        typer.Option(min=0.0, help="What fetching a copy costs, as a share of a rank's mean load of a window; default 0.002."),
    ] = None,
    steps: StepsOption = 256,
    window: WindowOption = 4096,
    as_json: JsonOption = False,
) -> None:
    """Plan after each window and score on the next: our planner beside EPLB, replanned on each window.

    epslots placement replay LOADS.npz --ranks 8 --slots 17 --json
    """
    from epslots.bench.eplb import copies_held, eplb
    from epslots.progress import ProgressDisplay
    from epslots.simulation.placement_replay import COPY_SHARE, Planner, replay_costs, start_placement
    from epslots.simulation.placement_replay import replay as run

    loads_WLE = read_loads(loads, window)
    windows, layers, experts = loads_WLE.shape
    if windows < 2:
        raise ConfigError(
            f"{loads} has {windows} window; 2 or more are needed to score a plan on the next. A trace is cut into windows of "
            f"--window {window} tokens: give fewer, or record more"
        )
    start = start_placement(layers, experts, ranks, slots)
    share = COPY_SHARE if copy_share is None else copy_share
    planner = Planner(start, fleet_of(ranks, nodes, replay_costs(loads_WLE, ranks, share)), steps, flat)
    plans: dict[str, Any] = {"ours": planner}
    if ranks * slots >= experts:
        plans["eplb"] = lambda tokens_LE: copies_held(eplb(tokens_LE, ranks, slots), ranks, experts)
    scores = {}
    for name, plan_window in plans.items():
        with ProgressDisplay()(f"windows, {name}", windows - 1) as advance:
            scores[name] = run(loads_WLE, start, plan_window, time.perf_counter, advance)
    shape = {"windows": windows, "layers": layers, "experts": experts, "ranks": ranks, "slots": slots, "nodes": nodes}
    result = shape | {name: _summary(one) for name, one in scores.items()}
    result["ours"]["kept"] = sum(proposal.keep for proposal in planner.proposals)
    result.setdefault("eplb", None)  # it can't leave an expert out
    if as_json:
        typer.echo(json.dumps(result))
    else:
        _print_scores(scores, windows)


@placement_app.command()
def plan(
    record: LoadsArgument,
    ranks: RanksOption,
    slots: Annotated[str, typer.Option("--slots", help='Slots of each rank and layer: a number, or a share such as "25%".')],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .placement to write.")],
    nodes: NodesOption = 1,
    flat: FlatOption = False,
    steps: StepsOption = 256,
    window: WindowOption = 4096,
    learn_slots: Annotated[
        bool,
        typer.Option(
            "--learn-slots/--equal-slots",
            help="From a routing trace: more slots to layers that gain more. Experts of all layers must be alike.",
        ),
    ] = False,
) -> None:
    """Make a placement once, from a routing trace or recorded loads, to be loaded at the start.

    epslots placement plan trace.npz --ranks 8 --slots 17 --output all.placement
    """
    import numpy as np

    from epslots.cli.trace import slots_of_layers
    from epslots.compiled import prepare
    from epslots.placement.balance import balancedness, holders, rank_loads
    from epslots.placement.placement import default_placement
    from epslots.placement.placement_file import write_placement
    from epslots.placement.planner import propose
    from epslots.placement.slot_quotas import deal_quotas, improve_quotas
    from epslots.planner.cache_policy import DEFAULT_POLICY, POLICIES
    from epslots.simulation.cache_replay import reuse_histogram
    from epslots.simulation.placement_replay import expected_of_all, replay_costs

    loads_WLE, trace = _read_record(record, window)
    _, layers, experts = loads_WLE.shape
    experts_L = np.full(layers, experts) if trace is None else trace.num_experts
    quota_LR = np.repeat(slots_of_layers(slots, experts_L)[:, None], ranks, 1)
    start = default_placement(experts_L.tolist(), quota_LR)
    if trace is not None and learn_slots:
        prepare()
        histogram_LD = reuse_histogram(trace.expert_ids, experts_L, POLICIES[DEFAULT_POLICY])
        better_L = improve_quotas(quota_LR.sum(1), histogram_LD, experts_L, np.full(layers, ranks), experts_L * ranks)
        quota_LR = deal_quotas(better_L, quota_LR.sum(0), experts_L, quota_LR)
    # Nothing is moved: the copies are where they are from the start.
    fleet = fleet_of(ranks, nodes, replay_costs(loads_WLE, ranks, 0.0))
    found, expected = start, expected_of_all(loads_WLE, steps)
    for _ in range(OFFLINE_ROUNDS):
        proposal = propose(found, expected, fleet, quota_LR, flat=flat)
        found = proposal.placement
        if proposal.keep:
            break
    found = replace(found, version=1)
    write_placement(found, output)
    windows = [[balancedness(rank_loads(holders(one), window_LE)) for window_LE in loads_WLE] for one in (start, found)]
    before, after = (sum(one) / len(one) for one in windows)
    typer.echo(
        f"{output}: {int(found.wanted_LRE.sum())} copies are to stay resident, and every expert has a home; balance over the "
        f"record's windows {before:.3f} -> {after:.3f}"
    )


@placement_app.command()
def show(
    placement: Annotated[Path, typer.Argument(help="A .placement.")],
    loads: Annotated[
        Optional[Path], typer.Option("--loads", help="Recorded loads or a routing trace to show it with; default: all alike.")
    ] = None,
    layer: Annotated[int, typer.Option("--layer", "-l", min=0, help="The layer to show.")] = 0,
    plot: Annotated[Optional[Path], typer.Option("--plot", help="A .png to draw into as well.")] = None,
) -> None:
    """Which ranks hold which experts, and ranks' loads against those of experts dealt by slots.

    epslots placement show all.placement --loads LOADS.npz --layer 3 --plot layer3.png
    """
    import numpy as np

    from epslots.cli.heat_map import plot_map, text_map
    from epslots.placement.placement_file import read_placement

    found = read_placement(placement)
    if layer >= len(found.num_experts_L):
        raise ConfigError(f"--layer {layer}: allowed: 0 to {len(found.num_experts_L) - 1}")
    experts = int(found.num_experts_L[layer])
    tokens_E = np.ones(experts, np.int64)
    if loads is not None:
        loads_WLE = read_loads(loads, 2**40)
        if loads_WLE.shape[1:] != found.home_LE.shape:
            raise ConfigError(
                f"{loads} has {loads_WLE.shape[1]} layers of {loads_WLE.shape[2]} experts, {placement} has "
                f"{found.home_LE.shape[0]} of {found.home_LE.shape[1]}: they must be of one model"
            )
        tokens_E = loads_WLE.sum(0)[layer, :experts]
    else:
        typer.echo("all experts taken to be used alike; --loads shows it with recorded traffic")
    typer.echo("\n".join(text_map(found, layer, tokens_E)))
    if plot is not None:
        if not plot.absolute().parent.is_dir():
            raise ConfigError(f"--plot {plot}: give a file in a folder that exists")
        plot_map(found, layer, tokens_E, plot)
        typer.echo(f"saved {plot}")


def read_loads(path: Path, window: int) -> IntArray:
    """Loads of windows from a file of loads, or from a routing trace cut into windows of so many tokens: int64 [W, L, E].

    Raises:
        ConfigError: the file holds neither.
    """
    return _read_record(path, window)[0]


def _read_record(path: Path, window: int) -> tuple[IntArray, Trace | None]:
    """The loads of windows, and the routing trace if they come from one."""
    import numpy as np

    from epslots.npz import read_arrays
    from epslots.simulation.placement_replay import check_loads

    arrays = read_arrays(path, "a file of loads, or a routing trace")
    if "loads" in arrays:
        return check_loads(arrays["loads"]), None
    from epslots.trace import Trace

    trace = Trace.of_arrays(arrays, str(path))
    experts_L1 = trace.num_experts[:, None]
    experts = int(trace.num_experts.max(initial=1))
    layers = len(trace.num_experts)
    parts = []
    for start in range(0, len(trace.expert_ids), window):
        ids_TLK = trace.expert_ids[start : start + window].astype(np.int64)
        cells = (ids_TLK + experts * np.arange(layers)[:, None])[(ids_TLK >= 0) & (ids_TLK < experts_L1)]
        parts.append(np.bincount(cells, minlength=layers * experts).reshape(layers, experts))
    if not parts:
        raise ConfigError(f"{path} is a routing trace without a token")
    return np.stack(parts), trace


def fleet_of(ranks: int, nodes: int, costs: Any) -> RankHardware:
    """Ranks of one speed on so many nodes, one after another."""
    import numpy as np

    from epslots.placement.planner import RankHardware

    if nodes > ranks:
        raise ConfigError(f"--nodes {nodes}: allowed: 1 to the {ranks} ranks")
    return RankHardware(np.arange(ranks) * nodes // ranks, np.full(ranks, 1000), costs)


def _summary(scores: Scores) -> dict[str, Any]:
    windows = len(scores.balance)
    return {
        "balance": sum(scores.balance) / windows,
        "balance_live": sum(scores.balance_live) / windows,
        "experts_moved": sum(scores.copies),
        "ms_per_window": 1000 * sum(scores.seconds) / windows,
        "per_window": {
            "balance": scores.balance,
            "balance_live": scores.balance_live,
            "experts_moved": scores.copies,
            "ms": [1000 * second for second in scores.seconds],
        },
    }


def _print_scores(scores: dict[str, Scores], windows: int) -> None:
    from rich.table import Table

    table = Table(title=f"{windows} windows: planned after each, scored on the next", title_justify="left")
    table.add_column("planner")
    for heading in ("balance", "split live", "imbalance", "experts moved", "ms per window"):
        table.add_column(heading, justify="right")
    for name, one in scores.items():
        row = _summary(one)
        table.add_row(
            name,
            f"{row['balance']:.4f}",
            f"{row['balance_live']:.4f}",
            f"{1 - row['balance']:.4f}",
            str(row["experts_moved"]),
            f"{row['ms_per_window']:.1f}",
        )
    table_console(120).print(table)
