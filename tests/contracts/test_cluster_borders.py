"""The borders of cluster/: imports go one way, what is Ray's stays in a few modules, and nothing of ours is pickled."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import cluster
from tests.support.imports import assert_one_way, imports, modules_of

PACKAGE = Path(cluster.__file__).parent

# From the bottom up, as in epslots: a room imports from layers below its own.
LAYERS = (
    ("config", "errors", "messages", "actor_process", "queue_room"),
    ("lasting", "token_stream"),
    ("generation",),
    ("rank", "controller"),
    ("driver",),
    ("ray_backend", "reports", "simulation"),
    ("control",),
    ("api",),
    ("job",),
    ("serve",),
    ("bench",),
)
KNOW_RAY = {"lasting.ray_registry", "rank.actor", "controller.actor", "serve.ray_app"}
PURE = (
    "driver.scheduler",
    "driver.scheduled_request",
    "driver.role_loads",
    "driver.rank_loads",
    "driver.hand_over_costs",
    "driver.retries",
    "messages.rank",
    "messages.placement",
    "messages.controller",
    "messages.hand_over",
    "controller.controller",
    "rank.copy_budget",
    "rank.event_pace",
    "lasting.lease",
    "lasting.descriptions",
    "serve.schema",
    "serve.answer_schema",
    "serve.request_settings",
    "serve.completions",
    "serve.chat",
    "serve.live_frame",
    "serve.live_window",
    "serve.part_pace",
    "serve.placement_words",
)


def modules() -> dict[str, Path]:
    return modules_of(PACKAGE)


def test_imports_go_one_way():
    assert_one_way("cluster", modules(), LAYERS)


def test_a_package_says_what_it_holds():
    """In one line, and imports nothing."""
    for name, path in modules().items():
        if name and path.name == "__init__.py":
            tree = ast.parse(path.read_text())
            assert len((ast.get_docstring(tree) or "").splitlines()) == 1, name
            assert len(tree.body) == 1, name


def test_ray_stays_in_its_modules():
    found = {name for name, path in modules().items() if any(i.partition(".")[0] == "ray" for i in imports(path))}
    assert {name for name in found if not name.startswith("ray_backend.")} == KNOW_RAY


def test_decisions_do_no_io():
    for name in PURE:
        roots = {imported.partition(".")[0] for imported in imports(modules()[name])}
        assert not roots & {"asyncio", "threading", "os", "time", "random", "pathlib", "torch"}, name


def test_processes_come_up_without_torch():
    """Its import takes seconds: a driver started again is waited for. And a rank first sets its number of threads."""
    parts = "controller.actor", "rank.actor", "serve.command", "serve.run", "api", "ray_backend.backend"
    names = ", ".join(f"cluster.{part}" for part in parts)
    code = f"import sys; import {names}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
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
        "PlacementReport",
        "Portion",
        "RankFailed",
        "Result",
    ]
    assert all(getattr(cluster, name) is not None for name in cluster.__all__)
