"""``epslots placement``: replay, plan and show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from epslots.cli.placement import placement_app, read_loads
from epslots.errors import ConfigError
from epslots.placement.balance import balancedness, holders, rank_loads
from epslots.placement.placement_file import read_placement
from epslots.placement.planner import RankHardware
from epslots.simulation.placement_replay import Planner, replay, replay_costs, start_placement, uses_by_chance
from epslots.simulation.traffic import SyntheticTraffic, generate

TRAFFIC = SyntheticTraffic(kind="still", layers=2, experts=16, top_k=2, windows=10, prompts=30, tokens=60, whim=0.3)


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(placement_app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def loads(tmp_path: Path) -> Path:
    path = tmp_path / "loads.npz"
    np.savez(path, loads=generate(TRAFFIC, 0))
    return path


def replayed(*arguments: object) -> dict[str, Any]:
    result = json.loads(invoke("replay", *arguments, "--json"))
    assert isinstance(result, dict)
    return result


def test_replay_scores_both_planners_on_the_next_window(loads: Path):
    found = replayed(loads, "--ranks", 4, "--slots", 5)
    assert (found["windows"], found["layers"], found["experts"], found["ranks"], found["slots"]) == (10, 2, 16, 4, 5)
    for name in ("ours", "eplb"):
        one = found[name]
        assert len(one["per_window"]["balance"]) == 9
        assert one["balance"] == pytest.approx(np.mean(one["per_window"]["balance"]))
        assert 0.5 < one["balance"] <= one["balance_live"] + 1e-6 and one["balance_live"] <= 1
        assert one["experts_moved"] == sum(one["per_window"]["experts_moved"]) > 0
        assert one["ms_per_window"] > 0
    # Traffic that stays as it is: better balance, hardly any moves.
    assert 1 - found["ours"]["balance"] < 0.9 * (1 - found["eplb"]["balance"])
    assert found["ours"]["experts_moved"] < 0.3 * found["eplb"]["experts_moved"]


def test_the_scores_are_those_of_the_next_window():
    """The placement after window w, scored on window w + 1, worked out by hand."""
    windows = generate(TRAFFIC, 1)[:4]
    start = start_placement(2, 16, 4, 5)
    ticks = iter(range(100))
    planner = Planner(start, RankHardware(np.zeros(4, np.int64), np.full(4, 1000), replay_costs(windows, 4)))
    scores = replay(windows, start, planner, lambda: float(next(ticks)))
    placements = [start, *(proposal.placement for proposal in planner.proposals)]
    for number in range(3):
        held = holders(placements[number + 1])
        assert scores.balance[number] == pytest.approx(balancedness(rank_loads(held, windows[number + 1])))
        assert scores.copies[number] == (held & ~holders(placements[number])).sum()
    assert scores.seconds == [1.0, 1.0, 1.0]


def test_dear_copies_stay_where_they_are(loads: Path):
    found = replayed(loads, "--ranks", 4, "--slots", 5, "--copy-share", 1000)
    assert found["ours"]["experts_moved"] == 0 and found["ours"]["kept"] == 9


def test_fewer_slots_than_experts_and_nodes(loads: Path):
    found = replayed(loads, "--ranks", 4, "--slots", 2)
    assert found["eplb"] is None and 0 < found["ours"]["balance"] <= 1
    assert replayed(loads, "--ranks", 4, "--slots", 5, "--nodes", 2)["nodes"] == 2
    assert "ours" in invoke("replay", loads, "--ranks", 4, "--slots", 5, "--flat")


def test_a_placement_planned_from_loads_levels_them(loads: Path, tmp_path: Path):
    output = tmp_path / "made.placement"
    text = invoke("plan", loads, "--ranks", 4, "--slots", 5, "-o", output)
    found = read_placement(output)
    assert found.version == 1 and (found.wanted_LRE.sum(2) == 5).all() and str(output) in text
    windows = read_loads(loads, 1)
    assert min(balancedness(rank_loads(holders(found), window)) for window in windows) > 0.8


def test_plan_reads_a_routing_trace(tmp_path: Path):
    path, output = tmp_path / "trace.npz", tmp_path / "made.placement"
    ids = np.array([[[0, 1], [2, -1]], [[1, 3], [2, -1]], [[1, 0], [0, -1]]], np.int16)
    np.savez(path, expert_ids=ids, starts=np.array([0]), num_experts=np.array([4, 3]))
    assert read_loads(path, 2).tolist() == [[[1, 2, 0, 1], [0, 0, 2, 0]], [[1, 1, 0, 0], [1, 0, 0, 0]]]
    invoke("plan", path, "--ranks", 2, "--slots", 3, "--output", output)
    assert read_placement(output).home_LE.shape == (2, 4)


def test_show_draws_a_placement(loads: Path, tmp_path: Path):
    made, picture = tmp_path / "made.placement", tmp_path / "made.png"
    invoke("plan", loads, "--ranks", 4, "--slots", 5, "-o", made)
    text = invoke("show", made, "--loads", loads, "--layer", 1, "--plot", picture)
    assert "layer 1: 16 experts" in text and "5 copies" in text and "as placed" in text and str(picture) in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "balance" in invoke("show", made)


def test_what_is_wrong_is_said_in_a_line(loads: Path, tmp_path: Path):
    other = tmp_path / "other.npz"
    np.savez(other, loads=np.ones((3, 2, 5), np.int64))
    made = tmp_path / "made.placement"
    invoke("plan", loads, "--ranks", 4, "--slots", 5, "-o", made)
    text = tmp_path / "text.npz"
    text.write_text("no archive")
    flat, one, negative = tmp_path / "flat.npz", tmp_path / "one.npz", tmp_path / "negative.npz"
    np.savez(flat, loads=np.ones((3, 2)))
    np.savez(one, loads=np.ones((1, 2, 5), np.int64))
    np.savez(negative, loads=-np.ones((3, 2, 5), np.int64))
    for arguments, message in (
        (("replay", tmp_path / "none.npz", "--ranks", 2, "--slots", 2), "none.npz: no such file"),
        (("replay", text, "--ranks", 2, "--slots", 2), "is not a file of loads, or a routing trace"),
        (("replay", flat, "--ranks", 2, "--slots", 2), r"must be int64 \[windows, layers, experts\]"),
        (("replay", one, "--ranks", 2, "--slots", 2), "2 or more are needed"),
        (("replay", negative, "--ranks", 2, "--slots", 2), r"allowed: 0 to 2\*\*40"),
        (("replay", loads, "--ranks", 2, "--slots", 8, "--nodes", 3), "--nodes 3"),
        (("show", made, "--layer", 2), "allowed: 0 to 1"),
        (("show", made, "--loads", other), "must be of one model"),
        (("show", made, "--plot", tmp_path / "no" / "folder.png"), "a folder that exists"),
    ):
        with pytest.raises(ConfigError, match=message):
            invoke(*arguments)


def test_uses_by_chance():
    """As many steps as independent throws hit."""
    random = np.random.default_rng(0)
    hits = [len(np.unique(random.integers(0, 50, 80))) for _ in range(2000)]
    assert uses_by_chance(np.array([[0, 80]]), 50).tolist()[0] == [0, pytest.approx(np.mean(hits), abs=1)]


def trace_of(path: Path, experts: list[int], ids: np.ndarray) -> Path:
    np.savez(path, expert_ids=ids.astype(np.int16), starts=np.array([0]), num_experts=np.array(experts))
    return path


def test_layers_of_different_sizes_and_ids_of_none(tmp_path: Path):
    """Id -1 stands for an expert without weights, and is no rank's load."""
    generator = np.random.default_rng(0)
    ids = np.stack([generator.integers(0, 6, (200, 2)), generator.integers(0, 8, (200, 2))], 1)
    ids[:, 0][ids[:, 0] >= 4] = -1
    file = trace_of(tmp_path / "trace.npz", [4, 8], ids)
    loads = read_loads(file, 50)
    assert loads.shape == (4, 2, 8) and not loads[:, 0, 4:].any()
    assert loads[:, 0].sum() == (ids[:, 0] >= 0).sum() and loads[:, 1].sum() == 400
    invoke("plan", file, "--ranks", 2, "--slots", "75%", "--output", tmp_path / "two.placement")
    placement = read_placement(tmp_path / "two.placement")
    assert placement.num_experts_L.tolist() == [4, 8] and placement.quota_LR.tolist() == [[3, 3], [6, 6]]


def test_slots_go_to_the_layers_that_need_them(tmp_path: Path):
    """Layer 0 uses two experts only, layer 1 all of them in turn."""
    ids = np.stack([np.arange(900) % 2, np.arange(900) % 8], 1)[:, :, None]
    file = trace_of(tmp_path / "trace.npz", [8, 8], ids)
    invoke("plan", file, "--ranks", 2, "--slots", 3, "--learn-slots", "--output", tmp_path / "two.placement")
    quota_LR = read_placement(tmp_path / "two.placement").quota_LR
    assert quota_LR.sum(0).tolist() == [6, 6] and quota_LR[1].sum() > quota_LR[0].sum()


@pytest.mark.parametrize("damage", ["truncated", "one array", "no field", "text"])
def test_files_that_are_something_else(damage: str, loads: Path, tmp_path: Path):
    path = tmp_path / "bad.npz"
    match damage:
        case "truncated":
            path.write_bytes(loads.read_bytes()[:-40])
        case "one array":
            path = tmp_path / "bad.npy"
            np.save(path, np.zeros(3))
        case "no field":
            np.savez(path, other=np.zeros(3))
        case "text":
            path.write_text("loads")
    with pytest.raises(ConfigError, match="is not a"):
        read_loads(path, 10)


def test_very_large_loads(tmp_path: Path):
    path = tmp_path / "large.npz"
    np.savez(path, loads=generate(TRAFFIC, 0) * 2**30)
    assert replayed(path, "--ranks", 4, "--slots", 5)["ours"]["balance"] > 0.5


@pytest.mark.parametrize("command", ["plan", "replay"])
@pytest.mark.parametrize("ranks", [-1, 0, 1025, 1_000_000, 2**70])
def test_numbers_of_ranks_that_are_refused(command: str, ranks: int, loads: Path):
    result = CliRunner().invoke(placement_app, [command, str(loads), "--ranks", str(ranks), "--slots", "4"])
    assert result.exit_code == 2 and "'--ranks'" in result.output
