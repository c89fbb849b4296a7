"""Every bench, run by the command line as shortly as it can be. With ``EPSLOTS_EVERY_BENCH=1``: it takes an hour."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from inspect import signature
from pathlib import Path
from pkgutil import resolve_name

import pytest

from epslots.bench.catalogue import BENCHES
from epslots.cli.bench import FURTHER_BENCHES, NAMES

pytestmark = [
    pytest.mark.skipif(not os.environ.get("EPSLOTS_EVERY_BENCH"), reason="EPSLOTS_EVERY_BENCH=1: an hour"),
    pytest.mark.timeout(3600),
]
SHORT = {"rounds": "1", "minutes": "1", "slots": "50%"}
NEEDS_A_GPU = {"gpu"}  # test_gpu_kit.py runs it on the simulated one


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NEEDS_A_GPU])
def test_it_runs_and_records_figures(name: str, tmp_path: Path):
    own = BENCHES.get(name)
    run = FURTHER_BENCHES[name].load() if own is None else resolve_name(f"epslots.bench.{own.module}:bench_{name}")
    shorter = [word for key in signature(run).parameters if key in SHORT for word in (f"--{key}", SHORT[key])]
    command = ["-m", "epslots", "bench", name, "--threads", "1", "--output", str(tmp_path), *shorter]
    ended = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-4000:]
    recorded = json.loads((tmp_path / f"{name}.json").read_text())
    tables = [value for value in recorded.values() if isinstance(value, list)]
    assert tables and all(tables), "a bench without a figure, or with an empty table"
