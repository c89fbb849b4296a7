"""The fixtures of all tests: one thread, no hub, compiled planners, and a folder of tiny checkpoints made once a session."""

from __future__ import annotations

import gc
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings
from xdist.remote import Producer

from tests.support.scheduling import WAITING, GroupScheduling, unit_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: nothing here may reach out
# A shell starts what runs beside it with Ctrl-C ignored, and tests' processes would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("epslots", max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("epslots")  # a busy machine fails no example

SHARED = "EPSLOTS_TESTS_SHARED"
"""Environment variable: a folder of the session, which all of its processes share (support/remembered.py)."""

FAST = (
    "cli/test_text_options.py",
    "cluster/test_controller.py",
    "cluster/test_controller_lives.py",
    "cluster/test_command_queue.py",
    "cluster/test_cache_exchange.py",
    "cluster/test_copy_budget.py",
    "cluster/test_hand_over_threads.py",
    "cluster/test_hand_overs.py",
    "cluster/test_job_prompts.py",
    "cluster/test_network_interface.py",
    "cluster/test_queue_room.py",
    "cluster/test_rank_loads.py",
    "cluster/test_retries.py",
    "cluster/test_role_loads.py",
    "cluster/test_scheduler.py",
    "cluster/test_sticky.py",
    "cluster/test_simulation.py",
    "cluster/test_topology.py",
    "cluster/test_late_ends.py",
    "cluster/test_waiting.py",
    "cluster/test_group_deal.py",
    "cluster/test_role_placements.py",
    "contracts/",
    "generation/test_chunk_balance.py",
    "generation/test_request_checker.py",
    "generation/test_sampling.py",
    "host/test_json_lines.py",
    "host/test_npz.py",
    "host/test_progress.py",
    "host/test_telemetry.py",
    "host/test_units.py",
    "placement/test_balance.py",
    "placement/test_forecast.py",
    "placement/test_model_planner.py",
    "placement/test_placement.py",
    "placement/test_planner.py",
    "placement/test_pooled_forecast.py",
    "placement/test_rank_speeds.py",
    "placement/test_slot_quotas.py",
    "planner/",
    "simulation/test_traffic.py",
)
"""Modules, or folders of them, whose tests are marked ``fast``."""


def pytest_configure(config: pytest.Config) -> None:
    """Import and compile what tests need; not where pytest-xdist only hands out tests, which would wait for it."""
    if SHARED not in os.environ:  # processes of pytest-xdist inherit it
        os.environ[SHARED] = tempfile.mkdtemp(prefix="epslots-tests-")
        config.add_cleanup(lambda: shutil.rmtree(os.environ.pop(SHARED)))
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        gc.disable()  # until all is imported: half a million objects would be looked through again and again
        import torch

        import epslots.loading  # noqa: F401 - and with it all that is compiled
        from epslots.compiled import prepare

        prepare()  # other types than it was made for are an error from now on
        torch.set_num_threads(1)  # two threads on two busy cores make a step a hundred times slower
        _import_share(config)


def _import_share(config: pytest.Config) -> None:
    """Import a part of the test modules, as many as there are processes of pytest-xdist, before all are collected.

    Else each process would rewrite the assertions of every module, where that isn't kept from an earlier run.
    """
    folder = Path(__file__).parent
    here = getattr(config, "workerinput", None)
    if here is None or [Path(argument).resolve() for argument in config.args] != [folder]:
        return
    number = int(here["workerid"].removeprefix("gw"))
    for module in sorted(folder.rglob("test_*.py"))[number :: here["workercount"]]:
        with warnings.catch_warnings(), suppress(Exception, pytest.skip.Exception):  # collecting tells of them
            warnings.simplefilter("error")
            importlib.import_module(".".join(module.relative_to(folder.parent).with_suffix("").parts))


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    folder = Path(__file__).parent
    for item in items:
        if item.path.relative_to(folder).as_posix().startswith(FAST):
            item.add_marker(pytest.mark.fast)


_NICENESS = os.nice(0)


@pytest.fixture(scope="module", autouse=True)
def gives_way_to_ray(request: pytest.FixtureRequest) -> None:
    """Processes of pytest-xdist that compute leave the cores to what others wait for: Ray's nodes have to start in time."""
    waits = unit_of(request.node.nodeid) in WAITING
    if not waits and os.nice(0) == _NICENESS and hasattr(request.config, "workerinput"):
        os.nice(5)


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> None:
    """transformers collects garbage whenever a cache goes: up to a second each, over all that was ever imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def known_dry_runs(request: pytest.FixtureRequest) -> Iterator[None]:
    """A model's sizes are measured once a session, by its configuration: half of a tiny model's loading time.

    A module that sets ``MEASURES_EVERY_MODEL`` is left alone.
    """
    from epslots.models import measure_shape
    from tests.support.remembered import remembered

    measure = measure_shape._dry_run

    def measure_once(model: PreTrainedModel, experts: Any) -> Any:
        config = json.loads(model.config.to_json_string())
        for name in ("architectures", "dtype"):  # of a model that comes from a folder
            config.pop(name, None)
        key = (str(type(model)), sorted(config.items()), str(model.dtype), str(model.config._attn_implementation))
        return remembered(key, lambda: measure(model, experts))

    with pytest.MonkeyPatch.context() as patch:
        if not getattr(request.module, "MEASURES_EVERY_MODEL", False):
            patch.setattr(measure_shape, "_dry_run", measure_once)
        yield


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer | None) -> GroupScheduling:
    return GroupScheduling(config, log)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Tiny checkpoints by name, each made on first use."""
    from tests.support.zoo import make_checkpoint

    root = Path(os.environ[SHARED]) / "zoo"
    root.mkdir(exist_ok=True)

    def get(name: str) -> Path:
        folder = root / name
        if not folder.exists():
            with suppress(OSError):  # another process was faster
                make_checkpoint(name, tmp_path_factory.mktemp("zoo") / name).rename(folder)
        return folder

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
