"""The borders: imports go one way, the public surface is what it is, and nothing of ours is pickled."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

import epslots
from tests.support.imports import assert_one_way, imports, modules_of

PACKAGE = Path(epslots.__file__).parent

# From the bottom up: a package, or a module that stands alone, imports from layers below its own.
LAYERS = (
    # records and errors
    ("_version", "arrays", "errors", "layout", "streams", "cpu_threads", "importing"),
    ("private_files", "units", "rank_groups", "piece_sizes"),
    ("host_limits", "given_files", "progress"),
    ("compiled", "npz", "device_copy", "example"),
    # pure decisions
    ("planner", "example_text", "json_lines", "load_window"),
    ("placement", "telemetry", "config"),
    ("simulation",),
    # effects
    ("transport",),
    ("cache", "devices"),
    ("moe", "formats"),
    # the model integration
    ("models",),
    ("runtime",),
    ("group", "prefetch", "cuda_graph"),
    ("generation",),
    # the public surface
    ("load_plan",),
    ("trace", "loading"),
    ("verify_store",),
    ("simulated_gpu",),
    ("bench",),
    ("cli",),
    ("__main__",),
)
# Decisions are arrays in, arrays out: all of these packages, but for what reads files; and some modules elsewhere.
PURE_PACKAGES = ("planner", "placement", "simulation")
NOT_PURE = {"placement.placement_file"}
PURE = (
    "arrays",
    "units",
    "layout",
    "load_window",
    "rank_groups",
    "piece_sizes",
    "cache.ram_tier",
    "cache.ram_cells",
    "models.cluster_plan",
    "models.host_memory",
    "models.memory_plan",
    "models.memory_report",
    "models.model_shape",
    "models.page_sizes",
    "models.quotas",
    "generation.row_tracker",
    "generation.cache_layout",
    "prefetch.predictor_kernel",
    "generation.sampling",
    "generation.token_counts",
    "generation.settings",
    "generation.isolation",
    "generation.chunk_balance",
    "generation.chunk_size",
    "generation.engine_stats",
)


def modules() -> dict[str, Path]:
    return modules_of(PACKAGE)


def test_imports_go_one_way():
    assert_one_way("epslots", modules(), LAYERS)


def test_a_package_says_what_it_holds():
    """In one line, and imports nothing."""
    for name, path in modules().items():
        if name and path.name == "__init__.py" and name != "cli":
            tree = ast.parse(path.read_text())
            assert len((ast.get_docstring(tree) or "").splitlines()) == 1, name
            assert len(tree.body) == 1, name


def test_epslots_knows_neither_ray_nor_cluster():
    for name, path in modules().items():
        roots = {imported.partition(".")[0] for imported in imports(path)}
        assert not roots & {"ray", "cluster"}, name


def test_decisions_do_no_io():
    pure = {name for name in modules() if name.partition(".")[0] in PURE_PACKAGES} - NOT_PURE
    assert modules().keys() >= NOT_PURE
    for name in (*pure, *PURE):
        roots = {imported.partition(".")[0] for imported in imports(modules()[name])}
        assert not roots & {"torch", "os", "time", "random", "transformers", "psutil", "pathlib"}, name


def test_nothing_is_pickled_or_evaluated():
    for name, path in modules().items():
        assert not {"pickle", "cloudpickle", "dill", "shelve"} & imports(path), name
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"eval", "exec", "torch.load", "torch.save"}, f"{name}: {called}"
            if isinstance(node, ast.keyword) and node.arg in {"trust_remote_code", "allow_pickle"}:
                assert ast.unparse(node.value) == "False", f"{name}: {node.arg}"


def test_the_public_names():
    assert epslots.__all__ == [
        "CheckpointError",
        "ConfigError",
        "CorruptExpertError",
        "Costs",
        "DoesNotFitError",
        "EpslotsError",
        "ExchangeError",
        "GroupError",
        "PeerLost",
        "RankMismatchError",
        "StaleEpoch",
        "StoreError",
        "Trace",
        "UnsupportedModelError",
        "load",
        "record_trace",
        "stats",
        "sync_ranks",
        "verify",
    ]
    assert all(getattr(epslots, name) is not None for name in epslots.__all__)
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        _ = epslots.missing  # type: ignore[attr-defined]


def test_the_commands_and_their_options():
    from epslots.cli import app
    from epslots.cli.extensions import add_commands

    add_commands(app)
    group = get_command(app)
    found = {name: {o for p in c.params for o in p.opts} for name, c in group.commands.items()}  # type: ignore[attr-defined]
    common = {"--model", "-m", "--dtype", "--cache-dir"}
    assert found.keys() == {"generate", "plan", "verify", "bench", "trace", "predict", "placement", "simulate", "serve"}
    assert found["generate"] == common | {
        "prompts", "--slots", "-s", "--file", "-f", "--echo", "--stats", "--policy", "--device", "--host-store", "--kv-tokens",
        "--host-memory", "--slot-format", "--expert-format",
        "--max-new-tokens", "--min-tokens", "--n", "--stop", "--stop-tokens", "--ignore-eos", "--ignore-tokenizer-eos",
        "--chat", "--temperature", "--top-k", "--top-p", "--min-p", "--seed", "--presence-penalty", "--frequency-penalty",
        "--repetition-penalty", "--logit-bias", "--json-schema", "--regex", "--grammar", "--logprobs", "--prompt-logprobs",
        "--ranks", "--groups", "--prefill-ranks", "--decode-ranks", "--address", "--strategy", "--placement",
        "--max-requests", "--max-batch-tokens", "--cache", "--prefix-cache", "--step-target-ms", "--capture", "--priority",
        "--link", "--prefetch", "--predictor", "--execute-predicted", "--host-compute", "--attn-implementation",
        "--batch-invariant",
    }  # fmt: skip
    assert found["serve"] == common | {
        "--slots", "-s", "--policy", "--device", "--host-store", "--kv-tokens", "--link", "--prefetch", "--predictor",
        "--host-memory", "--slot-format", "--expert-format",
        "--execute-predicted", "--host-compute", "--attn-implementation", "--batch-invariant",
        "--max-requests", "--max-batch-tokens", "--cache", "--prefix-cache", "--step-target-ms", "--capture",
        "--ranks", "--groups", "--prefill-ranks", "--decode-ranks", "--address", "--strategy", "--placement", "--window-steps",
            "--deadline-s", "--give-up-after-s",
            "--name", "--orphan-s", "--replace",
        "--host", "--port", "--served-model-name", "--api-key", "--api-key-file", "--no-auth", "--cors-origin",
        "--chat-template", "--response-template", "--max-queue", "--request-timeout-s", "--drain-s", "--max-body-bytes",
        "--log-requests", "--log-prompts",
    }  # fmt: skip
    assert found["verify"] == common | {"--checkpoint", "--slot-format"}
    assert found["bench"] == {
        "name", "--output", "-o", "--rounds", "--minutes", "--threads", "--parts", "--redis", "--gpu", "--model", "--slots",
        "--device",
    }  # fmt: skip
    assert {
        "--model", "--slots", "--slot-format", "--attn-implementation", "--memory", "--host-memory", "--ranks", "--kv-tokens",
        "--json", "--capture",
    } <= found["plan"]  # fmt: skip
    assert {"--groups", "--prefill-ranks", "--decode-ranks", "--hand-over-tokens", "--machine"} <= found["plan"]
    assert {"--ranks", "--nodes", "--slots", "--batch", "--policy", "--placement", "--json"} <= found["simulate"]
    assert {
        "--groups", "--prefill-ranks", "--decode-ranks", "--rate", "--requests", "--prompt-tokens", "--new-tokens",
        "--shared-tokens", "--shared-prompts", "--kv-tokens", "--max-requests", "--max-batch-tokens", "--step-target-ms",
        "--layers", "--kv-token-bytes", "--hand-over-ms",
    } <= found["simulate"]  # fmt: skip
    inner = {
        name: {o for p in c.params for o in p.opts}
        for outer in ("trace", "predict", "placement")
        for name, c in {f"{outer} {n}": c for n, c in group.commands[outer].commands.items()}.items()  # type: ignore[attr-defined]
    }
    assert inner.keys() == {
        "trace record",
        "trace replay",
        "placement replay",
        "placement plan",
        "placement show",
        "predict fit",
        "predict show",
    }
    assert {"output", "prompts", "--slots", "--model"} <= inner["trace record"]
    assert {"--slots", "--policy", "--json"} <= inner["trace replay"]
    assert {"--ranks", "--slots", "--json"} <= inner["placement replay"]
    assert {"--ranks", "--slots", "--nodes", "--output"} <= inner["placement plan"]
    assert {"--loads", "--layer", "--plot"} <= inner["placement show"]


def test_help_needs_no_torch():
    code = "import sys; import epslots.cli; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'matplotlib')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
