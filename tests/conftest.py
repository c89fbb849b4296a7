"""What every test shares: one thread, no hub, and a folder of tiny checkpoints made once a session."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: nothing here may reach out

import pytest
import torch
from hypothesis import HealthCheck, settings
from transformers import PreTrainedModel
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

import epslots.loading  # noqa: F401 - and with it all that is compiled
from epslots.compiled import prepare
from epslots.models import model_shape
from tests.support.zoo import KNOWN_WARNINGS, make_checkpoint

if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # as a shell starts what runs beside it; tests' processes would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
prepare()  # what is given other types than it was made for is an error from now on
settings.register_profile("epslots", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("epslots")  # a busy machine fails no example
torch.set_num_threads(1)  # two threads on two busy cores make a step a hundred times slower


def pytest_configure(config: pytest.Config) -> None:
    for line in KNOWN_WARNINGS:
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> None:
    """transformers collects garbage whenever a cache goes: up to a second each, over all that was ever imported."""
    gc.collect()
    gc.freeze()


_DRY_RUNS: dict[tuple[str, ...], Any] = {}


@pytest.fixture(scope="module", autouse=True)
def known_dry_runs(request: pytest.FixtureRequest) -> Iterator[None]:
    """A model's sizes are measured once a session, by its configuration: half of a tiny model's loading time.

    A module that sets ``MEASURES_EVERY_MODEL`` is left alone.
    """
    measure = model_shape._dry_run

    def measure_once(model: PreTrainedModel, experts: Any) -> Any:
        key = (str(type(model)), model.config.to_json_string(), str(model.dtype), str(model.config._attn_implementation))
        if key not in _DRY_RUNS:
            _DRY_RUNS[key] = measure(model, experts)
        return _DRY_RUNS[key]

    with pytest.MonkeyPatch.context() as patch:
        if not getattr(request.module, "MEASURES_EVERY_MODEL", False):
            patch.setattr(model_shape, "_dry_run", measure_once)
        yield


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer | None) -> LoadScopeScheduling:
    """All that start Ray go to one process: two at once would be slow, and could find each other's."""

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "ray" if nodeid.startswith("tests/cluster/test_ray_") else nodeid

    return Scheduling(config, log)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Tiny checkpoints by name, each made on first use."""
    root = tmp_path_factory.mktemp("zoo")
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = make_checkpoint(name, root / name)
        return made[name]

    return get


@pytest.fixture(scope="session")
def shared_stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for host stores that tests share: each is built once, by the first that opens it."""
    return tmp_path_factory.mktemp("stores")


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    """A folder for host stores, fresh for each test."""
    return tmp_path / "cache"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Runs the command line in this process: exit code, output, errors."""

    def one(*arguments: object) -> tuple[int, str, str]:
        from epslots.cli import main

        monkeypatch.setattr(sys, "argv", ["epslots", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return one
