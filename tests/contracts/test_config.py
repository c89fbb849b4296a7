"""One configuration: a setting is declared once, and reaches its user without being relayed by hand."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.main import get_command

import cluster
import epslots
from cluster.config import ClusterConfig, ClusterSettings, cluster_config
from cluster.job.command import RayOptions
from cluster.job.command import app as job_app
from cluster.messages.rank import Load, decode_command, encode
from epslots.cli import app
from epslots.cli.options import LoadConfigOptions
from epslots.config import LoadConfig, LoadSettings, load_config
from epslots.errors import ConfigError
from epslots.planner.cost_model import Costs
from epslots.transport.transport import Transport
from epslots.units import PrefetchSetting, SlotsSetting
from tests.support import ROOT
from tests.support.rank_helpers import run_threads

LOAD_FIELDS = LoadConfig.__struct_fields__
MOST_PARAMETERS = 8
# Functions with more, and why. Compiled kernels aside, which take arrays one by one.
WIDE = {
    "epslots.loading.load": "users call it by keyword",
    "epslots.cli.bench.bench": "typer: an option each",
    "epslots.cli.generate.generate": "typer: an option each",
    "epslots.cli.plan.plan": "typer: an option each",
    "epslots.planner.expert_passes.plan_passes": "hands arrays to a compiled kernel",
    "epslots.planner.prefetch_policy.plan": "hands arrays to a compiled kernel",
    "cluster.driver.worker_group.__init__": "one caller, by keyword: all that a group has of the cluster",
}
# A value for each setting that is none of the defaults.
OTHER: dict[str, Any] = {
    "slots": "25%",
    "device": "cuda:1",
    "dtype": "float32",
    "policy": "lru",
    "host_store": "memory",
    "host_memory": "64GiB",
    "slot_format": "packed",
    "expert_format": "int8",
    "cache_dir": "/somewhere",
    "kv_tokens": 17,
    "max_requests": 3,
    "max_batch_tokens": 33,
    "cache": "rows",
    "prefix_cache": False,
    "step_target_ms": 25.0,
    "capture": False,
    "link": "8GB/s,20us",
    "prefetch": "64MiB",
    "predictor": "/somewhere/else",
    "execute_predicted": True,
    "host_compute": "on",
    "attn_implementation": "eager",
    "batch_invariant": True,
}


@pytest.fixture(scope="module")
def modules() -> dict[str, ast.Module]:
    """The product's modules by dotted name, parsed."""
    files = [path for package in ("epslots", "cluster") for path in (ROOT / package).rglob("*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text()) for path in files}


def test_a_setting_is_in_three_files(modules: dict[str, ast.Module]):
    """Its declaration, its user, its option; as a name, a keyword, or a string."""
    found = {name for name, tree in modules.items() if "host_compute" in set(_words(tree))}
    assert found == {"epslots.config", "epslots.loading", "epslots.cli.options"}


def _words(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=word) | ast.Attribute(attr=word) | ast.arg(arg=word) | ast.Constant(value=str(word)):
                yield word
            case ast.keyword(arg=str(word)):
                yield word


@pytest.mark.parametrize(("config", "settings"), [(LoadConfig, LoadSettings), (ClusterConfig, ClusterSettings)])
def test_every_field_is_a_keyword_and_is_explained(config: type[msgspec.Struct], settings: type):
    explained = (config.__doc__ or "").partition("Attributes:")[2]
    for name in config.__struct_fields__:
        assert f"        {name}: " in explained, name
    own = set(settings.__annotations__) - (set(LOAD_FIELDS) if config is ClusterConfig else set())
    assert own == set(config.__struct_fields__) - {"model"}


def test_every_field_is_an_option_of_generate_and_job():
    assert {field.name for field in fields(LoadConfigOptions)} | {"kv_tokens"} == set(LOAD_FIELDS)
    for command in (get_command(app).commands["generate"], get_command(job_app)):  # type: ignore[attr-defined]
        options = {option for parameter in command.params for option in parameter.opts}
        assert options >= {f"--{name.replace('_', '-')}" for name in LOAD_FIELDS}


def test_defaults_agree():
    """Of the configuration, load, Cluster, and the options."""
    config = LoadConfig()
    assert load_config() == LoadConfigOptions().config() == cluster_config().model == config
    for shown in (inspect.signature(epslots.load).parameters, inspect.signature(cluster.Cluster).parameters):
        assert {name: shown[name].default for name in LOAD_FIELDS} == config.keywords()
    defaults = ClusterConfig()
    given = {field.name: getattr(RayOptions(), field.name) for field in fields(RayOptions)}
    assert given == {name: getattr(defaults, name) for name in given} | {"address": "auto"}


def test_the_help_of_load_and_cluster_explains_each_setting():
    for public in (epslots.load, cluster.Cluster):
        doc = inspect.getdoc(public) or ""
        parameters = inspect.signature(public).parameters
        for name in parameters:
            assert f"    {name}: " in doc, name
        assert "settings" not in parameters


@pytest.mark.parametrize("name", LOAD_FIELDS)
def test_every_field_reaches_a_rank(name: str):
    config = LoadConfig(**{name: OTHER[name]})
    assert config != LoadConfig()
    load = Load(path="a/model", config=config, neighbours=1, ranks=1, threads=0, window_steps=0)
    assert decode_command(encode(load)) == load


def test_settings_as_parsed_values_reach_a_rank_too():
    config = LoadConfig(slots=SlotsSetting(share=0.5), prefetch=PrefetchSetting(bytes_per_step=5))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(config), type=LoadConfig) == config


def test_paths_and_torchs_types_become_plain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    import torch

    monkeypatch.chdir(tmp_path)
    config = load_config(device=torch.device("cuda", 1), dtype=torch.float16, cache_dir="c", predictor=Path("p"))
    assert (config.device, config.dtype) == ("cuda:1", "float16")
    assert (config.cache_dir, config.predictor) == (str(tmp_path / "c"), str(tmp_path / "p"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"slots": "banana"}, "slots='banana': allowed"),
        ({"policy": "fifo"}, "policy='fifo': allowed"),
        ({"prefetch": "soon"}, "prefetch='soon': allowed"),
        ({"link": "fast"}, "link='fast': allowed"),
        ({"kv_tokens": "many"}, "kv_tokens='many'; allowed: an int"),
        ({"kv_tokens": -1}, "kv_tokens=-1; allowed: an int, at least 0, or 'auto'"),
        ({"kv_tokens": "auto", "cache": "pages"}, "kv_tokens='auto' with cache='pages'; allowed: cache='rows' or 'auto'"),
        ({"execute_predicted": "off"}, "execute_predicted='off': allowed: True, False"),
        ({"batch_invariant": 1}, "batch_invariant=1: allowed: True, False"),
        ({"host_memory": "64"}, "host_memory='64' is not a size: give a number and a unit"),
        ({"host_memory": 64}, "host_memory=64: allowed: None, or bytes such as '64GiB'"),
        ({"host_memory": "1GiB", "host_store": "memory"}, "that keeps all experts in RAM; leave one out"),
        ({"host_compute": "gpu"}, "host_compute='gpu': allowed: auto, on, off"),
        ({"attn_implementation": 5}, "attn_implementation=5: allowed: None, or a name"),
        ({"batch_invariant": True, "execute_predicted": True}, "leave one out"),
        ({"slot": 3}, "slot: epslots sets this itself, or has no such setting; allowed: slots, device"),
    ],
)
def test_no_configuration_holds_what_is_not_allowed(settings: dict[str, Any], message: str):
    for make in (load_config, cluster_config):
        with pytest.raises(ConfigError, match=message):
            make(**settings)
    if settings.keys() <= set(LOAD_FIELDS):
        with pytest.raises(ConfigError, match=message):
            msgspec.structs.replace(LoadConfig(), **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ranks": 0}, "ranks=0; allowed: an int, at least 1"),
        ({"kv_tokens": 0}, "kv_tokens=0; allowed: an int, at least 1"),
        ({"window_steps": -1}, "window_steps=-1; allowed"),
        ({"max_queue": True}, "max_queue=True; allowed"),
        ({"strategy": "PILE"}, "strategy='PILE'; allowed: PACK, SPREAD"),
        ({"silence_s": 0}, "silence_s=0; allowed: seconds"),
        ({"name": "a b"}, "name='a b'; allowed: up to 64 letters"),
        ({"name": "-a"}, "name='-a'; allowed"),
        ({"name": 5}, "name=5; allowed"),
        ({"name": "a", "orphan_s": -1}, "orphan_s=-1; allowed: seconds"),
        ({"orphan_s": 60}, "orphan_s=60 needs a name"),
        ({"replace": True, "name": "a"}, "replace=True; allowed with a name and orphan_s > 0"),
        ({"replace": 1, "name": "a", "orphan_s": 1}, "replace=1; allowed: True, False"),
        ({"give_up_after_s": 10**9}, "give_up_after_s=1000000000; allowed: seconds"),
        ({"policy": lambda history: history.last_use}, "policy=.*: allowed in a cluster: a policy's name"),
    ],
)
def test_a_clusters_own_settings_are_checked(settings: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        cluster_config(**settings)


def test_costs_say_what_host_compute_needs():
    costs = Costs(1, 1, 1, 1, 1, 1, 1)
    LoadConfig().check_costs(costs)
    LoadConfig(host_compute="on").check_costs(None)
    with pytest.raises(ConfigError, match="give host_expert and host_pair, or no costs"):
        cluster_config(host_compute="on", costs=costs)


@pytest.mark.parametrize(
    ("settings", "device", "computes"),
    [
        ({}, "cpu", False),
        ({}, "cuda", True),
        ({"batch_invariant": True}, "cuda", False),
        ({"host_compute": "on"}, "cpu", True),
    ],
)
def test_the_host_computes_where_it_may(settings: dict[str, Any], device: str, computes: bool):
    assert LoadConfig(**settings).computes_on_host(device) == computes


def test_a_refused_setting_of_one_rank_is_told_to_all(checkpoint: Callable[[str], Path], cache_dir: Path):
    """A rank that would leave without a word kept the others waiting for as long as loading may take."""

    def refused(transport: Transport) -> str:
        slots = "banana" if transport.rank else 2
        with pytest.raises(epslots.EpslotsError) as caught:
            epslots.load(checkpoint("qwen3_moe"), slots=slots, device="cpu", cache_dir=cache_dir, group=transport)
        return str(caught.value)

    waiting, failing = run_threads(refused, 2)
    assert "slots='banana': allowed" in failing
    assert "rank 1 could not load" in waiting and "slots='banana'" in waiting


def test_the_host_of_a_gpu_computes_nothing_batch_invariant():
    """Its sums differ from the GPU's."""
    config = LoadConfig(host_compute="on", batch_invariant=True)
    config.check_device("cpu")
    with pytest.raises(ConfigError, match="batch_invariant with host_compute='on'"):
        config.check_device("cuda")


def test_ranks_compare_every_setting_that_shapes_a_step():
    effects = {"policy": "a name", "fetches": "meanwhile", "predictions": "none", "attention": "sdpa"}
    assert LoadConfig(batch_invariant=True).compared(effects) == {
        "device": "None",
        "dtype": "auto",
        "policy": "a name",
        "slot_format": "auto",
        "expert_format": "None",
        "cache": "auto",
        "fetches": "meanwhile",
        "predictions": "none",
        "host_compute": "auto",
        "attention": "sdpa",
        "batch_invariant": "True",
    }


def test_the_settings_of_a_digest_are_those_that_change_outputs():
    base = LoadConfig().output_settings
    changing = {name for name in LOAD_FIELDS if LoadConfig(**{name: OTHER[name]}).output_settings != base}
    assert changing == {"dtype", "expert_format", "attn_implementation", "execute_predicted", "batch_invariant"}
    predicted = [LoadConfig(execute_predicted=True, predictor=path).output_settings for path in (None, "/a", "/b")]
    assert len({str(settings) for settings in predicted}) == 3


def test_no_function_has_more_than_eight_parameters(modules: dict[str, ast.Module]):
    """But those that say why."""
    found = {
        f"{name}.{function.name}"
        for name, tree in modules.items()
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) and _parameters(function) > MOST_PARAMETERS
        if not any(
            ast.unparse(decorator).startswith(("compiled", "intrinsic", "triton.jit")) for decorator in function.decorator_list
        )
    }
    assert found == WIDE.keys()


def _parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    arguments = function.args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])
