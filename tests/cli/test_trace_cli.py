"""``epslots trace replay`` as its users meet it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from epslots.planner.cache_policy import POLICIES
from epslots.simulation.cache_replay import replay
from epslots.trace import Trace

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def trace(tmp_path: Path) -> tuple[Path, Trace]:
    generator = np.random.default_rng(0)
    weights = generator.dirichlet(np.full(12, 0.5), size=2)
    ids = np.stack(
        [[generator.choice(12, 3, replace=False, p=(w + 0.01) / (w + 0.01).sum()) for w in weights] for _ in range(90)]
    ).astype(np.int16)
    trace = Trace(ids, np.array([0, 20, 50]), np.array([12, 12]))
    trace.save(tmp_path / "trace.npz")
    return tmp_path / "trace.npz", trace


def test_hit_rates_of_all_policies(run: Run, trace: tuple[Path, Trace]):
    path, recorded = trace
    code, out, _ = run("trace", "replay", path, "--slots", "4,50%,12", "--policy", "all", "--json")
    assert code == 0
    found = json.loads(out)
    assert list(found["hit_rates"]) == [*POLICIES, "belady"]
    expected = replay(recorded.expert_ids, recorded.num_experts, np.array([[4, 4], [6, 6], [12, 12]]), POLICIES["lfu"])
    assert found["hit_rates"]["lfu"] == dict(zip(["4", "50%", "12"], expected.hit_rates, strict=True))
    for policy in POLICIES:
        assert found["hit_rates"][policy]["4"] <= found["hit_rates"]["belady"]["4"] < 1
        by_layer = found["hit_rates_by_layer"][policy]["50%"]
        assert found["hit_rates"][policy]["50%"] == pytest.approx(np.mean(by_layer)), "both layers are used as often"
    for layer, row in enumerate(found["reuse"]):
        assert row["uses"] == 90 * 3
        assert row["first_uses"] == len(np.unique(recorded.expert_ids[:, layer]))
        assert sum(row["histogram"]) == row["uses"] - row["first_uses"] and len(row["histogram"]) == 12
        assert 0 <= row["median"] <= row["p90"] <= row["p99"] < 12


def test_batches(run: Run, trace: tuple[Path, Trace]):
    found = json.loads(run("trace", "replay", trace[0], "--batch", 3, "--policy", "lru,lrfu", "--json")[1])
    assert (found["steps"], found["batch"], list(found["hit_rates"])) == (40, 3, ["lru", "lrfu", "belady"])
    assert list(found["hit_rates"]["lru"]) == ["25%"]


def test_tables_for_people(run: Run, trace: tuple[Path, Trace]):
    code, out, _ = run("trace", "replay", trace[0], "--slots", "4,12")
    assert code == 0
    assert "3 sequences, 90 tokens" in out and "belady" in out and "first uses" in out
    assert "{" not in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--slots", "0"), "slots='0' leaves no slot"),
        (("--slots", "4,x%"), "slots='x%': allowed"),
        (("--slots", "4,2GiB"), "slots='2GiB': allowed here: a positive int"),
        (("--policy", "best"), "--policy 'best': allowed: all, lru, lfu, lrfu, adaptive"),
    ],
)
def test_what_can_not_be(run: Run, trace: tuple[Path, Trace], options: tuple[str, str], message: str):
    code, out, err = run("trace", "replay", trace[0], *options)
    assert code == 2 and not out
    assert message in err and "Traceback" not in err


def test_files_that_are_no_traces(run: Run, tmp_path: Path):
    empty = tmp_path / "empty.npz"
    Trace(np.zeros((0, 2, 1), np.int16), np.zeros(0, np.int64), np.array([4, 4])).save(empty)
    (tmp_path / "text.npz").write_text("no trace")
    for path, message in (
        (empty, "holds no token"),
        (tmp_path / "text.npz", "not a routing trace"),
        (tmp_path / "x", "no such file"),
    ):
        code, _, err = run("trace", "replay", path)
        assert code == 2 and message in err
