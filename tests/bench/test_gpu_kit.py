"""The kit for a GPU, at tiny sizes: on a simulated GPU, where all but two processes runs; and its clock."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from epslots.bench import gpu, gpu_checks, gpu_decode
from epslots.bench.gpu_checks import check
from epslots.bench.gpu_costs import known_spec, measure_costs
from epslots.bench.gpu_decode import measure_decoding
from epslots.bench.gpu_kit import GpuKit, load_plain, tiny_sizes
from epslots.bench.gpu_page import page
from epslots.bench.gpu_predictions import predict
from epslots.bench.gpu_ranks import measure_ranks
from epslots.bench.report import BenchReport
from epslots.simulated_gpu.cuda_api import simulated_gpus
from epslots.simulated_gpu.loading import load_simulated, move

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
whole = pytest.mark.skipif("EPSLOTS_GPU_KIT" not in os.environ, reason="takes half a minute: EPSLOTS_GPU_KIT=1")


def plain_simulated(folder: Path, device: torch.device) -> PreTrainedModel:
    model = move(load_plain(folder, CPU), device)
    model.set_experts_implementation("batched_mm")  # the others need operations that the simulation lacks
    return model


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> GpuKit:
    """The kit after all steps on a simulated GPU. accelerate moves weights in ways that the simulation doesn't know."""
    with pytest.MonkeyPatch.context() as patch, simulated_gpus("h100"):
        patch.setattr(gpu_decode, "SHARES", (1.0, 0.5))
        patch.setattr(gpu_decode, "BATCHES", (1, 2))
        patch.setattr(gpu_checks, "_TESTS", Path("/nowhere"))
        kit = GpuKit(CUDA, tmp_path_factory.mktemp("kit"), tiny_sizes(), 600.0, load=load_simulated, plain=plain_simulated)
        assert known_spec(CUDA) is not None
        check(kit)
        measure_costs(kit)
        measure_decoding(kit)
    predict(kit, apart=False)
    return kit


@whole
def test_every_step_runs(kit: GpuKit):
    states = {outcome.step: (outcome.state, outcome.why) for outcome in kit.outcomes}
    states.pop("decoding, accelerate")
    assert {state for state, _ in states.values()} == {"done"}, states
    steps = ["checks", "costs", "uploads", "decoding, 100% slots", "decoding, transformers", "decoding", "predictions"]
    assert [step for step in states if step in steps] == steps


@whole
def test_the_checks_hold_and_say_what_is_allowed(kit: GpuKit):
    assert kit.facts["checks right"]
    (checks,) = (outcome.tables["checks"] for outcome in kit.outcomes if outcome.step == "checks")
    assert len(checks) == 3 * 3 + 1 and all(row["right"] for row in checks)


@whole
def test_decoding_is_compared_with_every_prediction(kit: GpuKit):
    (rows,) = (outcome.tables["measured and predicted"] for outcome in kit.outcomes if outcome.step == "predictions")
    assert [(row["what"], row["batch"]) for row in rows[:3]] == [
        ("epslots, 100% slots", 1),
        ("epslots, 100% slots", 2),
        ("epslots, 50% slots", 1),
    ]
    assert all(row["predicted by measured costs, ms"] > 0 for row in rows)
    assert kit.facts["decoding"][0]["of transformers"] > 0


@whole
def test_measured_costs_are_those_of_the_device(kit: GpuKit):
    """The simulated clock's own bandwidths come out again; the host's times are this machine's."""
    (rows,) = (outcome.tables["costs"] for outcome in kit.outcomes if outcome.step == "costs")
    found = {row["cost"]: row["measured / assumed"] for row in rows}
    assert 0.01 < found["host to device GB/s"] < 1.01
    assert found["launch us"] > 0


@whole
def test_the_page_has_every_table(kit: GpuKit):
    result = {
        "machine": {"gpu": "one", "cores": 2, "memory_GiB": 4},
        "date": "today",
        "command": "a|b",
        "versions": {"x": "1"},
    }
    text = page(result, kit.outcomes)
    assert text.startswith("# epslots on one\n")
    for outcome in kit.outcomes:
        assert f"| {outcome.step} | {outcome.state} |" in text
        for title, rows in outcome.tables.items():
            assert f"## {title[0].upper()}{title[1:]}\n\n| {next(iter(rows[0]))} |" in text


def test_steps_that_do_not_fit_are_named(cache_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A broken step ends no others, and time that it took is gone."""
    clock = iter([0.0, *[0.0] * 3, 50.0, 50.0])
    kit = GpuKit(CPU, cache_dir, tiny_sizes(), 60.0, clock=lambda: next(clock))

    def broken() -> dict[str, list[dict[str, object]]]:
        raise RuntimeError("no such\nkernel")

    assert not kit.step("first", 60.0, broken)
    assert not kit.step("second", 20.0, dict)
    assert not kit.step("third", 1.0, dict, gpu_only=True)
    states = [(outcome.step, outcome.state) for outcome in kit.outcomes]
    assert states == [("first", "failed"), ("second", "skipped"), ("third", "skipped")]
    whys = [outcome.why for outcome in kit.outcomes]
    assert whys[0].startswith("RuntimeError at test_gpu_kit.py:") and whys[0].endswith(": no such kernel")
    assert whys[1:] == ["10 s are left, and it may take 20", "needs a GPU"]


def test_json_and_page_are_written_whatever_fits(cache_dir: Path, tmp_path: Path):
    report = BenchReport("gpu", CPU, tmp_path)
    gpu.run_kit(GpuKit(CPU, cache_dir, tiny_sizes(), 0.0), report)
    report.save()
    recorded = json.loads((tmp_path / "gpu.json").read_text())
    assert {row["state"] for row in recorded["steps"]} == {"skipped"} and len(recorded["steps"]) >= 5
    assert "| decoding | skipped |" in (tmp_path / gpu.PAGE_NAME).read_text()


def test_a_step_that_never_ends_costs_no_result(cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A GPU that hangs keeps the thread that waits for it: the process is ended, after what was found is written."""
    started: list[Any] = []

    class Timer:
        def __init__(self, seconds: float, give_up: Callable[[], None]) -> None:
            assert seconds == 60
            started.append(give_up)

        def start(self) -> None:
            """It fires when the test says so."""

        cancel = start

    monkeypatch.setattr(gpu.threading, "Timer", Timer)
    kit, report, codes = GpuKit(CPU, cache_dir, tiny_sizes(), 60.0), BenchReport("gpu", CPU, tmp_path), list[int]()
    with gpu.ended_in_time(kit, report, codes.append):
        kit.step("first", 0.0, lambda: {"found": [{"number": 1}]})
        kit.step("second", 0.0, lambda: started[0]() or {})
    assert codes == [1]
    recorded = json.loads((tmp_path / "gpu.json").read_text())
    assert [(row["step"], row["state"]) for row in recorded["steps"]] == [("first", "done"), ("second", "failed")]
    text = (tmp_path / gpu.PAGE_NAME).read_text()
    assert "| second | failed |" in text and "## Found" in text


@whole
def test_a_killed_rank_is_noticed_and_left_behind(cache_dir: Path):
    kit = GpuKit(CPU, cache_dir, tiny_sizes(), 600.0)
    measure_ranks(kit)
    (outcome,) = kit.outcomes
    assert outcome.state == "done", outcome.why
    (row,) = outcome.tables["ranks"]
    assert row["ranks"] == 2 and row["tokens equal"] and row["tokens equal, alone"]
    assert row["loss noticed s"] < 5


def test_the_repositorys_tests_take_what_time_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """They come last: what is measured never waits for them."""
    given: list[float] = []
    monkeypatch.setattr(gpu_checks, "_run_tests", lambda limit_s: given.append(limit_s) or {})
    for budget_s in (480.0, 50.0):
        kit = GpuKit(CUDA, tmp_path, tiny_sizes(), budget_s, clock=lambda: 0.0)
        gpu_checks.run_tests(kit)
    assert given == [470.0] and kit.outcomes[-1].state == "skipped"
