"""The borders of cluster/: imports go one way, what is Ray's stays in a few modules, and nothing of ours is pickled."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import cluster
from tests.test_borders import assert_one_way, imports

PACKAGE = Path(cluster.__file__).parent

# From the bottom up, as in epslots: a module imports from layers below its own.
LAYERS = (
    ("errors", "orphans", "placement_messages", "retries"),
    ("messages", "controller_messages", "loop_thread", "display", "ray_calls"),
    ("fleet", "ledger", "generation", "meeting", "controller", "rank_reports"),
    ("workers", "dispatcher", "rank_loop", "controller_actor"),
    ("group", "steering", "worker", "ray_address", "ray_processes"),
    ("reports", "staffing"),
    ("supervisor",),
    ("local_ray", "ray_imports"),
    ("ray_nodes", "ray_worker"),
    ("ray_seats", "ray_controller"),
    ("ray_fleet",),
    ("api",),
    ("prompt_lines", "stop_signals"),
    ("result_lines", "job_progress"),
    ("job_run",),
    ("job",),
    ("bench",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
KNOW_RAY = {
    *("worker", "controller_actor", "ray_address", "ray_processes", "local_ray"),
    *("ray_nodes", "ray_imports", "ray_worker", "ray_controller", "ray_seats", "ray_fleet"),
}
PURE = ("ledger", "retries", "messages", "placement_messages", "controller_messages", "controller")


def modules() -> dict[str, Path]:
    return {path.relative_to(PACKAGE).parts[0].removesuffix(".py"): path for path in PACKAGE.glob("*.py")} | {
        f"bench.{path.stem}": path for path in (PACKAGE / "bench").glob("*.py")
    }


def test_imports_go_one_way():
    assert_one_way("cluster", modules(), LEVEL)


def test_every_module_has_its_place():
    assert {name.partition(".")[0] for name in modules()} - {"__init__"} == set(LEVEL)


def test_ray_stays_in_its_modules():
    found = {name for name, path in modules().items() if any(i.partition(".")[0] == "ray" for i in imports(path))}
    assert found == KNOW_RAY


def test_decisions_do_no_io():
    for name in PURE:
        roots = {imported.partition(".")[0] for imported in imports(PACKAGE / f"{name}.py")}
        assert not roots & {"asyncio", "threading", "os", "time", "random", "pathlib", "torch"}, name


def test_the_controllers_process_needs_no_torch():
    code = "import sys; import cluster.controller_actor; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, check=False).returncode == 0


def test_cancelling_is_never_swallowed():
    """In Python 3.11 ``asyncio.wait_for`` forgets that it is cancelled where its answer has just come; ``timeout`` doesn't."""
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.Attribute) and ast.unparse(node) == "asyncio.wait_for"), name


def test_nothing_is_pickled_or_evaluated():
    for name, path in modules().items():
        assert not {"pickle", "cloudpickle", "dill", "shelve"} & imports(path), name
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in {"eval", "exec", "torch.load", "torch.save"}, name


def test_the_public_names():
    assert cluster.__all__ == [
        "Cluster",
        "ClusterError",
        "ClusterStats",
        "Explanation",
        "Generation",
        "GenerationSettings",
        "Overloaded",
        "Placement",
        "RankFailed",
        "Result",
    ]
    assert all(getattr(cluster, name) is not None for name in cluster.__all__)
