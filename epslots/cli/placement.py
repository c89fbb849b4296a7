"""``epslots placement replay | plan | show``: judge the planner on recorded loads, make a placement, look at one."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Optional

import typer

from epslots.cli.column_table import Columns, column_table
from epslots.cli.option_groups import takes_groups
from epslots.errors import ConfigError
from epslots.placement.placement import MOST_RANKS
from epslots.streams import table_console

if TYPE_CHECKING:
    from epslots.arrays import IntArray
    from epslots.placement.planner import RankHardware
    from epslots.planner.cost_model import Costs
    from epslots.simulation.placement_replay import Scores
    from epslots.trace import Trace

placement_app = typer.Typer(help="Plan where experts live; show and score such placements.", no_args_is_help=True)

# A proposal makes a bounded number of moves; offline there is time for more.
OFFLINE_ROUNDS = 8
_PLAIN_WIDTH = 120
_ONE_WINDOW = 2**40  # tokens: all of a trace

LoadsArgument = Annotated[
    Path, typer.Argument(help="An .npz: loads, int64 of (windows, layers, experts), or a routing trace.")
]


@dataclass(frozen=True)
class RanksOptions:
    """The ranks that are planned for."""

    PANEL: ClassVar[str] = "The ranks"

    ranks: Annotated[int, typer.Option("--ranks", min=1, max=MOST_RANKS, help="Ranks.")]
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="Nodes that the ranks are spread over, one after another.")] = 1
    flat: Annotated[bool, typer.Option("--flat", help="Pay no attention to nodes.")] = False

    def shape(self, costs: Costs) -> RankHardware:
        """Ranks of one speed, spread evenly over the nodes. ConfigError: there are more nodes than ranks."""
        import numpy as np

        from epslots.placement.planner import RankHardware

        if self.nodes > self.ranks:
            raise ConfigError(f"--nodes {self.nodes}: allowed: 1 to the {self.ranks} ranks")
        return RankHardware(np.arange(self.ranks) * self.nodes // self.ranks, np.full(self.ranks, 1000), costs)


@dataclass(frozen=True)
class WindowOptions:
    """The windows of the loads."""

    PANEL: ClassVar[str] = "The windows"

    steps: Annotated[
        int, typer.Option("--steps", min=1, help="Steps of a window; matters where slots don't suffice for all experts.")
    ] = 256
    window: Annotated[int, typer.Option("--window", min=1, help="Tokens of a window, where a routing trace is given.")] = 4096


@placement_app.command()
@takes_groups
def replay(
    loads: LoadsArgument,
    ranks: RanksOptions,
    windows: WindowOptions,
    slots: Annotated[int, typer.Option("--slots", min=1, help="Slots of each rank and layer.")],
    copy_share: Annotated[
        Optional[float],
        typer.Option(min=0.0, help="Cost of fetching a copy, as a share of a rank's mean load of a window; default 0.002."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Score the planner beside EPLB on recorded loads: plan after each window, score on the next.

    epslots placement replay LOADS.npz --ranks 8 --slots 17 --json
    """
    from epslots.bench.eplb import copies_held, eplb
    from epslots.progress import counting
    from epslots.simulation.placement_replay import COPY_SHARE, Planner, replay_costs, start_placement
    from epslots.simulation.placement_replay import replay as run

    loads_WLE = read_loads(loads, windows.window)
    count, layers, experts = loads_WLE.shape
    if count < 2:
        raise ConfigError(
            f"{loads} has {count} window; 2 or more are needed to score a plan on the next. A trace is cut into windows of "
            f"--window {windows.window} tokens: give fewer, or record more"
        )
    start = start_placement(layers, experts, ranks.ranks, slots)
    share = COPY_SHARE if copy_share is None else copy_share
    planner = Planner(start, ranks.shape(replay_costs(loads_WLE, ranks.ranks, share)), windows.steps, ranks.flat)
    plans: dict[str, Any] = {"ours": planner}
    if ranks.ranks * slots >= experts:
        plans["eplb"] = lambda tokens_LE: copies_held(eplb(tokens_LE, ranks.ranks, slots), ranks.ranks, experts)
    scores = {}
    for name, plan_window in plans.items():
        with counting(f"windows, {name}", count - 1) as advance:
            scores[name] = run(loads_WLE, start, plan_window, time.perf_counter, advance)
    if not as_json:
        title = f"{count} windows: planned after each, scored on the next"
        table_console(_PLAIN_WIDTH).print(column_table(title, _SCORES, scores.items()))
        return
    shape = {
        "windows": count,
        "layers": layers,
        "experts": experts,
        "ranks": ranks.ranks,
        "slots": slots,
        "nodes": ranks.nodes,
    }
    result = shape | {name: _summary(one) for name, one in scores.items()}
    result["ours"]["kept"] = sum(proposal.keep for proposal in planner.proposals)
    result.setdefault("eplb", None)  # it can't leave an expert out
    typer.echo(json.dumps(result))


@placement_app.command()
@takes_groups
def plan(
    loads: LoadsArgument,
    ranks: RanksOptions,
    windows: WindowOptions,
    slots: Annotated[str, typer.Option("--slots", help='Slots of each rank and layer: a number, or a share such as "25%".')],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .placement to write.")],
    learn_slots: Annotated[
        bool,
        typer.Option(
            "--learn-slots/--equal-slots",
            help="From a routing trace: more slots to layers that gain more. Experts of all layers must be alike.",
        ),
    ] = False,
) -> None:
    """Plan a placement from a routing trace or recorded loads, for ranks to begin with.

    epslots placement plan trace.npz --ranks 8 --slots 17 --output all.placement
    """
    import numpy as np

    from epslots.cli.trace import slots_of_layers
    from epslots.placement.balance import balancedness, holders, rank_loads
    from epslots.placement.placement import default_placement
    from epslots.placement.placement_file import write_placement
    from epslots.placement.planner import propose
    from epslots.simulation.placement_replay import expected_of_all, replay_costs

    loads_WLE, trace = _read_loads(loads, windows.window)
    _, layers, experts = loads_WLE.shape
    experts_L = np.full(layers, experts) if trace is None else trace.num_experts
    quota_LR = np.repeat(slots_of_layers(slots, experts_L)[:, None], ranks.ranks, 1)
    start = default_placement(experts_L.tolist(), quota_LR)
    if trace is not None and learn_slots:
        quota_LR = _learned_quotas(trace, quota_LR)
    # Copies cost nothing: no rank has to fetch one later.
    shape = ranks.shape(replay_costs(loads_WLE, ranks.ranks, 0.0))
    found, expected = start, expected_of_all(loads_WLE, windows.steps)
    for _ in range(OFFLINE_ROUNDS):
        proposal = propose(found, expected, shape, quota_LR, flat=ranks.flat)
        found = proposal.placement
        if proposal.keep:
            break
    found = replace(found, version=1)
    write_placement(found, output)
    balances = [[balancedness(rank_loads(holders(one), window_LE)) for window_LE in loads_WLE] for one in (start, found)]
    before, after = (sum(one) / len(one) for one in balances)
    typer.echo(
        f"{output}: {int(found.wanted_LRE.sum())} copies are to stay resident, and every expert has a home; balance over "
        f"the loads' windows {before:.3f} -> {after:.3f}"
    )


def _learned_quotas(trace: Trace, quota_LR: IntArray) -> IntArray:
    """Each rank's slots, dealt to the layers whose uses in the trace gain most from one, int64 [L, R]."""
    import numpy as np

    from epslots.compiled import prepare
    from epslots.placement.slot_quotas import deal_quotas, improve_quotas
    from epslots.planner.cache_policy import DEFAULT_POLICY, POLICIES
    from epslots.simulation.cache_replay import reuse_histogram

    prepare()
    experts_L, (layers, ranks) = trace.num_experts, quota_LR.shape
    histogram_LD = reuse_histogram(trace.expert_ids, experts_L, POLICIES[DEFAULT_POLICY])
    better_L = improve_quotas(quota_LR.sum(1), histogram_LD, experts_L, np.full(layers, ranks), experts_L * ranks)
    return deal_quotas(better_L, quota_LR.sum(0), experts_L, quota_LR)


@placement_app.command()
def show(
    placement: Annotated[Path, typer.Argument(help="A .placement.")],
    loads: Annotated[
        Optional[Path], typer.Option("--loads", help="Recorded loads or a routing trace to show it with; default: all alike.")
    ] = None,
    layer: Annotated[int, typer.Option("--layer", "-l", min=0, help="The layer to show.")] = 0,
    plot: Annotated[Optional[Path], typer.Option("--plot", help="A .png to draw into as well.")] = None,
) -> None:
    """Show which ranks hold the experts of a layer, and the ranks' loads before and after.

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
        loads_WLE = read_loads(loads, _ONE_WINDOW)
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
    """Loads of windows, int64 [W, L, E], from a file of loads, or from a routing trace cut into windows.

    Args:
        window: tokens of a trace's window.

    Raises:
        ConfigError: the file holds neither.
    """
    return _read_loads(path, window)[0]


def _read_loads(path: Path, window: int) -> tuple[IntArray, Trace | None]:
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


def _summary(scores: Scores) -> dict[str, Any]:
    return {
        "balance": _mean(scores.balance),
        "balance_live": _mean(scores.balance_live),
        "experts_moved": sum(scores.copies),
        "ms_per_window": 1000 * _mean(scores.seconds),
        "per_window": {
            "balance": scores.balance,
            "balance_live": scores.balance_live,
            "experts_moved": scores.copies,
            "ms": [1000 * second for second in scores.seconds],
        },
    }


_SCORES: Columns[tuple[str, Scores]] = (
    ("planner", lambda row: row[0]),
    ("balance", lambda row: f"{_mean(row[1].balance):.4f}"),
    ("split live", lambda row: f"{_mean(row[1].balance_live):.4f}"),
    ("imbalance", lambda row: f"{1 - _mean(row[1].balance):.4f}"),
    ("experts moved", lambda row: str(sum(row[1].copies))),
    ("ms per window", lambda row: f"{1000 * _mean(row[1].seconds):.1f}"),
)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
