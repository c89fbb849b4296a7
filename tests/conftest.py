"""What every test shares: one thread, no hub, compiled planners, and a folder of tiny checkpoints made once a session."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

if TYPE_CHECKING:
    from transformers import PreTrainedModel

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: nothing here may reach out
# A shell starts what runs beside it with Ctrl-C ignored, and tests' processes would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("epslots", max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("epslots")  # a busy machine fails no example

SHARED = "EPSLOTS_TESTS_SHARED"
"""Environment variable: a folder of the session, which all of its processes share (support/remembered.py)."""

FAST = (
    "cli/test_text_options.py",
    "cluster/test_controller.py",
    "cluster/test_controller_lives.py",
    "cluster/test_hand_overs.py",
    "cluster/test_job_prompts.py",
    "cluster/test_network_interface.py",
    "cluster/test_queue_room.py",
    "cluster/test_retries.py",
    "cluster/test_scheduler.py",
    "contracts/",
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


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    folder = Path(__file__).parent
    for item in items:
        if item.path.relative_to(folder).as_posix().startswith(FAST):
            item.add_marker(pytest.mark.fast)


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
        key = (str(type(model)), model.config.to_json_string(), str(model.dtype), str(model.config._attn_implementation))
        return remembered(key, lambda: measure(model, experts))

    with pytest.MonkeyPatch.context() as patch:
        if not getattr(request.module, "MEASURES_EVERY_MODEL", False):
            patch.setattr(measure_shape, "_dry_run", measure_once)
        yield


GROUPS = {
    "ray nodes": (
        "tests/cluster/test_ray_cluster.py",
        "tests/cluster/test_ray_job.py",
        "tests/cluster/test_ray_nodes.py",
        "tests/cluster/test_ray_session.py",
    ),
    "ray": ("tests/cluster/test_ray_",),
    "forking": (
        "tests/cache/test_host_store.py",
        "tests/cluster/test_processes.py",
        "tests/generation/test_isolation_ranks.py",
        "tests/group/test_ranks_gloo.py",
        "tests/transport/",
    ),
}
"""Modules, or what their names begin with, whose tests run one after another in one process of pytest-xdist.

What starts Ray takes long and mostly waits, so it begins first; more than two Rays at once would be slow. What runs ranks as
processes shares a server that forks them, and has to import everything first (support/rank_helpers.py). A module belongs to
the first group that names it.
"""


LONG = (
    "tests/generation/test_batchers.py",
    "tests/generation/test_rows.py",
    "tests/moe/test_batch_invariance.py",
    "tests/group/test_ranks_driver.py",
    "tests/cluster/test_cluster.py",
    "tests/equality/test_matrix.py",
    "tests/simulated_gpu/test_captured_decoding.py",
    "tests/placement/test_adopting_placements.py",
    "tests/simulated_gpu/test_models.py",
    "tests/cluster/test_controlled_cluster.py",
)
"""Modules that take more than 15 seconds: one that began last would keep a core idle."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer | None) -> LoadScopeScheduling:
    """Groups first, then long modules, each in their order; then modules, those with the most tests first."""

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return next((name for name, modules in GROUPS.items() if nodeid.startswith(modules)), nodeid.partition("::")[0])

        def _assign_work_unit(self, node: WorkerController) -> None:
            for name in reversed((*GROUPS, *LONG)):
                if name in self.workqueue:
                    self.workqueue.move_to_end(name, last=False)
            super()._assign_work_unit(node)

    return Scheduling(config, log)


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
