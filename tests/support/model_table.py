"""The table of all models of transformers that have experts: which run from slots, and why the others don't.

    .venv/bin/python -m tests.support.model_table > examples/benchmarks/MODELS.md      # about a minute

Each model is made at a tiny size, saved, loaded by ``epslots.load`` with a quarter of its experts in slots, and compared with
plain transformers. Nothing is claimed of a model that this didn't run.
"""

from __future__ import annotations

import importlib
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

import epslots
from epslots.errors import EpslotsError
from epslots.models.experts_interface import REBUILT
from tests.support import zoo
from tests.support.equality import TOLERANCE
from tests.support.more_models import LATENTS, UNUSUAL

FILE = Path(__file__).parents[2] / "examples/benchmarks/MODELS.md"
_CLASS = rf"class (\w+(Experts|NaiveMoe)\(nn\.\w+\)|({'|'.join(REBUILT)})\()"
_EXPERTS = re.compile(rf"^(@use_experts_implementation|{_CLASS})", re.M)
_MOST_WEIGHTS = 40_000_000
_HEADS = ("ForCausalLM", "ForConditionalGeneration")
# Sizes by the names that configurations have for them; each configuration is given those that it knows.
_SIZES: dict[str, Any] = {
    **zoo._COMMON,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "head_dim": 16,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts", "first_k_dense_replace"), 1),
    **{"kv_lora_rank": 16, "q_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16},
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    **{"depth": 1, "num_heads": 2, "image_size": 32},
    **{"index_topk": 8, "index_head_dim": 16, "index_n_heads": 16, "sliding_window": 16},
}


def folders() -> dict[str, str]:
    """The modules of transformers that define experts, by the model's folder; found in their source."""
    root = Path(transformers.__file__).parent / "models"
    found = {}
    for path in sorted(root.glob("*/modeling_*.py")):
        if _EXPERTS.search(path.read_text(encoding="utf-8")):
            found[path.parent.name] = f"transformers.models.{path.parent.name}.{path.stem}"
    return found


def known() -> dict[str, zoo.Tiny]:
    """The suite's own tiny models, by architecture; the first of several."""
    listed: dict[str, zoo.Tiny] = {}
    for tiny in (zoo.ZOO | zoo.STRESSED | LATENTS | UNUSUAL).values():
        listed.setdefault(tiny.architecture, tiny)
    return listed


def architecture_of(module: str) -> type[PreTrainedModel] | None:
    """The class that predicts tokens, of text alone if there is one; None without any."""
    loaded = importlib.import_module(module)
    classes = [found for found in vars(loaded).values() if isinstance(found, type) and found.__module__ == module]
    heads = [found for found in classes if issubclass(found, PreTrainedModel) and found.can_generate()]
    order = {ending: place for place, ending in enumerate(_HEADS)}
    heads.sort(key=lambda head: min((order[ending] for ending in _HEADS if head.__name__.endswith(ending)), default=9))
    return heads[0] if heads else None


def tiny_of(architecture: type[PreTrainedModel]) -> zoo.Tiny:
    """A tiny model: the suite's, else one of general sizes."""
    name = architecture.__name__
    return known().get(name) or zoo.Tiny(name, name, _settings(architecture.config_class))


# What the sizes above don't suit, by the name of the configuration.
_OTHERWISE: dict[str, dict[str, Any]] = {
    "Glm4vMoeTextConfig": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [1, 1, 2],
        }
    }
}


def _settings(config_class: type[PretrainedConfig]) -> dict[str, Any]:
    names = {field.name for field in fields(config_class)} | set(config_class.attribute_map)
    given = {name: value for name, value in _SIZES.items() if name in names} | _OTHERWISE.get(config_class.__name__, {})
    for name, spec in config_class.sub_configs_defaults.items():
        if spec.config_class is AutoConfig:
            given[name] = _settings(CONFIG_MAPPING[spec.model_type]) | {"model_type": spec.model_type}
        else:
            given[name] = _settings(spec.config_class)
    return given


def outcome(module: str) -> tuple[str, str]:
    """A model's class, and what came of running it."""
    architecture = architecture_of(module)
    if architecture is None:
        return "", "refused: it predicts no tokens"
    tiny = tiny_of(architecture)
    try:
        with torch.device("meta"):
            weights = sum(p.numel() for p in architecture(architecture.config_class(**tiny.settings)).parameters())
        if weights > _MOST_WEIGHTS:
            return tiny.architecture, f"not tried: its tiny model would have {weights:,} weights"
        built = tiny.build()
    except Exception as error:
        return tiny.architecture, f"not tried: no tiny model of it could be made ({_first(error)})"
    with tempfile.TemporaryDirectory() as folder:
        built.save_pretrained(Path(folder) / "model")
        try:
            return tiny.architecture, _compare(Path(folder), built)
        except EpslotsError as error:
            return tiny.architecture, f"refused: {_first(error)}".replace(f"{folder}/model", "it")
        except Exception as error:
            return tiny.architecture, f"fails: {type(error).__name__}: {_first(error)}"


@torch.no_grad()
def _compare(folder: Path, plain: PreTrainedModel) -> str:
    model = epslots.load(
        folder / "model", slots="25%", device="cpu", dtype="float32", progress=False, cache_dir=folder / "store"
    )
    if getattr(plain.config, "_experts_implementation", None):
        plain.set_experts_implementation("eager")
    ids = zoo.random_ids(2, 24, seed=1)
    expected, actual = plain(input_ids=ids).logits, model(input_ids=ids).logits
    error = float((expected - actual).abs().max() / expected.abs().max())
    return "runs" if error <= TOLERANCE else f"differs by {error:.0e}"


def _first(error: Exception) -> str:
    return " ".join(str(error).split()).partition(". ")[0][:200]


def way(module: str, architecture: str) -> str:
    """How its experts come to the interface."""
    source = Path(str(importlib.import_module(module).__file__)).read_text(encoding="utf-8")
    if "@use_experts_implementation" in source:
        return "transformers'"
    return "brought in" if architecture in {tiny.architecture for tiny in known().values() if tiny.served} else "none"


def rows() -> Iterator[tuple[str, str, str, str, str]]:
    """Folder, class, way to the interface, whether the suite runs it too, outcome."""
    suite = {tiny.architecture for tiny in zoo.ZOO.values() if tiny.served}
    for folder, module in folders().items():
        if sys.argv[1:] and folder not in sys.argv[1:]:
            continue
        print(folder, file=sys.stderr)
        architecture, found = outcome(module)
        yield folder, architecture, way(module, architecture), "yes" if architecture in suite else "", found


def main() -> None:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    print(_HEADER.format(version=transformers.__version__))
    for row in rows():
        print(f"| {' | '.join(row)} |")
    print(_FOOTER)


_HEADER = """# Models with experts

Every model of transformers {version} that defines experts, made at a tiny random size, and run from slots for a quarter of its
experts: *runs* = its logits are plain transformers' (fp32, within 2e-5 of their scale). Written by
`.venv/bin/python -m tests.support.model_table`, held by `tests/models/test_model_table.py`. *suite* = the tests run it with
one slot, a quarter and all. Models that wrap another one's text model (kimi_k25 has deepseek_v3's) have no row of their own.

| folder in transformers | class | interface | suite | outcome |
| --- | --- | --- | --- | --- |"""
_FOOTER = """
*Interface*: how the experts reach transformers' experts interface; *brought in* by `epslots/models/experts_interface.py`.

Not in transformers, and run by classes of epslots: Grok-1 and Grok-2 (`epslots/models/grok.py`, held to a computation in
numpy). Known by another name: Kimi-K2 and Kimi-K2-Thinking (`kimi_k2` is deepseek_v3)."""

if __name__ == "__main__":
    main()
