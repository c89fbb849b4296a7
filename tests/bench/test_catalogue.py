"""The catalogue of benches: each one can be run, and each recorded file can be made again."""

from __future__ import annotations

import json
from inspect import signature
from pathlib import Path
from pkgutil import resolve_name

import pytest

from epslots.bench.catalogue import BENCHES, Bench
from epslots.cli.bench import HELP, NAMES
from tests.support import ROOT

RECORDED = sorted((ROOT / "examples" / "benchmarks").glob("*.json"))


@pytest.mark.parametrize("bench", BENCHES.values(), ids=list(BENCHES))
def test_a_bench_is_a_function_of_its_module(bench: Bench):
    run = resolve_name(f"epslots.bench.{bench.module}:bench_{bench.name}")
    positional = [name for name, p in signature(run).parameters.items() if p.kind is not p.KEYWORD_ONLY]
    assert positional == ["report", "cache_dir", *(["device"] if bench.takes_device else [])]
    assert "\n" not in bench.measures


def test_the_help_has_a_line_on_every_bench():
    for name in NAMES:
        assert f"\n{name}: " in HELP


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_a_recorded_file_names_a_command_that_works(path: Path):
    recorded = json.loads(path.read_text())
    commands = [command.split() for command in recorded["command"].split("; ")]  # several where benches are compared
    assert all(command[:2] == ["epslots", "bench"] and command[2] in NAMES for command in commands)
    if len(commands) == 1:
        assert recorded["benchmark"] == commands[0][2] == path.stem


def test_results_refer_to_every_recorded_file():
    text = (ROOT / "examples" / "benchmarks" / "RESULTS.md").read_text()
    for path in (*RECORDED, *(ROOT / "examples" / "benchmarks").glob("*.png")):
        assert f"]({path.name})" in text
