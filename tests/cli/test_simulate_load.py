"""``epslots simulate --rate``: requests that arrive at groups of ranks, from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest

from epslots.cli import extensions, simulate_load
from epslots.trace import Trace
from tests.support.entry_points import named_only

Run = Callable[..., tuple[int, str, str]]
FEW = ("--requests", 40, "--prompt-tokens", "20-60", "--new-tokens", "10-20", "--slots", 4, "--kv-tokens", 500)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    ids = np.random.default_rng(1).integers(0, 8, (90, 2, 2)).astype(np.int16)
    Trace(ids, np.array([0, 30]), np.array([8, 8])).save(tmp_path / "trace.npz")
    return tmp_path / "trace.npz"


def test_roles_by_rate(run: Run, trace: Path):
    options = ("--prefill-ranks", 2, "--decode-ranks", 2, "--rate", "20,40", *FEW)
    code, out, _ = run("simulate", trace, *options, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["division"] == {"ranks": 4, "groups": 2, "prefill_ranks": 2}
    assert [one["rate"] for one in found["curve"]] == [20.0, 40.0]
    assert all(one["hand_overs"] > 0 and one["ttft_ms"]["p50"] > 0 for one in found["curve"])
    code, out, _ = run("simulate", trace, *options)
    assert code == 0 and "4 ranks in 2 groups, 1 of them for prompts: simulated" in out


def test_groups_of_full_batches(run: Run, trace: Path):
    code, out, _ = run("simulate", trace, "--ranks", 4, "--groups", 2, "--slots", 4, "--steps", 3, "--warm-up", 0, "--json")
    assert code == 0 and json.loads(out)["curve"][0]["groups"] == 2


def test_layers_of_the_trace_stand_for_more(run: Run, trace: Path):
    def step_ms(layers: int) -> float:
        options = ("--ranks", 2, "--rate", 5, "--layers", layers, *FEW)
        code, out, _ = run("simulate", trace, *options, "--json")
        assert code == 0
        return float(json.loads(out)["curve"][0]["gap_ms"]["p50"])

    assert step_ms(20) == pytest.approx(10 * step_ms(2), rel=0.2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prefill-ranks", "2"), "--prefill-ranks 2; allowed with --rate"),
        (("--rate", "fast"), "--rate 'fast'; allowed: requests a second"),
        (("--rate", "0"), "rate=0.0; allowed: requests a second, more than 0"),
        (("--rate", "5", "--prompt-tokens", "many"), "--prompt-tokens 'many'; allowed: a number of tokens, or the least"),
        (("--rate", "5", "--kv-tokens", "100"), "allowed: up to kv_tokens=100 together"),
        (("--rate", "5", "--speeds", "1,slow"), "--speeds '1,slow': allowed: numbers, separated by commas"),
        (("--rate", "5", "--speeds", "1,0"), "speeds=(1.0, 0.0); allowed: numbers from 0.01 to 100"),
        (("--rate", "5", "--groups", "3"), "groups=3 with ranks=8; allowed: a number that divides the ranks"),
        (("--rate", "5", "--decode-ranks", "3"), "decode_ranks=3; allowed with prefill_ranks"),
        (("--rate", "5", "--placement", "x.placement"), "--placement with --rate"),
    ],
)
def test_loads_that_can_not_be(run: Run, trace: Path, options: tuple[str, ...], message: str):
    code, out, err = run("simulate", trace, *options)
    assert code == 2 and not out
    assert message in err and "Traceback" not in err


def test_a_simulator_that_is_missing_is_named(run: Run, trace: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(extensions, "entry_points", lambda **_: [])
    code, _, err = run("simulate", trace, "--rate", 5)
    assert code == 2 and "--rate: nothing here simulates requests" in err
    broken = EntryPoint(simulate_load.NAME, "nowhere:nothing", simulate_load.GROUP)
    monkeypatch.setattr(extensions, "entry_points", named_only(broken))
    code, _, err = run("simulate", trace, "--rate", 5)
    assert code == 2 and "can't be imported" in err
