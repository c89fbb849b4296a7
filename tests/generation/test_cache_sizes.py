"""The engine allocates the bytes that the memory plan grants: rows and pages of every architecture that can be planned."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from msgspec import structs
from transformers import PreTrainedModel

import epslots
from epslots.config import EngineConfig
from epslots.errors import UnsupportedModelError
from epslots.generation.batchers import choose_cache
from epslots.generation.engine import Engine
from epslots.generation.paged_batcher import PagedBatcher
from epslots.generation.paged_cache import paging_obstacle
from epslots.generation.planned_cache import with_cache
from epslots.generation.positions import depends_on_length
from epslots.generation.row_batcher import RowBatcher
from epslots.generation.row_support import row_support
from epslots.models.batch_invariance import record_unknown_functions
from epslots.models.experts import expert_layers
from epslots.models.measure_shape import shape_of_model
from epslots.models.model_shape import ModelShape
from epslots.models.pretrained import build_skeleton, resolve_class
from epslots.runtime import runtime_of
from tests.support.batches import requests_of
from tests.support.more_models import LATENTS, UNUSUAL
from tests.support.zoo import STRESSED, ZOO

MODELS = {name: tiny for name, tiny in (ZOO | STRESSED | LATENTS | UNUSUAL).items() if tiny.served}
MODELS = {name: tiny for name, tiny in MODELS.items() if tiny.top_k}
# Windows of 16 tokens are full, and don't fill the cache.
SIZES = {"kv_tokens": 200, "max_requests": 3, "max_batch_tokens": 24}
ENGINE = EngineConfig(kv_tokens=200, max_requests=3, max_batch_tokens=24)
FEW_TOKENS = {"kv_tokens": 16, "max_requests": 40, "max_batch_tokens": 31}


@cache
def skeleton_of(name: str) -> PreTrainedModel:
    tiny = MODELS[name]
    config = getattr(transformers, tiny.architecture).config_class(**tiny.settings)
    config.architectures = [tiny.architecture]
    return build_skeleton(resolve_class(config), config, torch.float32)


@cache
def shape_of(name: str) -> ModelShape:
    skeleton = skeleton_of(name)
    return shape_of_model(skeleton, name, "float32", expert_layers(skeleton))


def planned(name: str, kind: str) -> ModelShape:
    """The shape of a model that isn't loaded, with the cache of its engine."""
    return with_cache(shape_of(name), skeleton_of(name), EngineConfig(cache=kind))


@cache
def built(name: str) -> PreTrainedModel:
    return MODELS[name].build()


def tensors_in(holder: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """All tensors reachable from an object, through attributes and collections; not those of a model."""
    if id(holder) in seen or isinstance(holder, torch.nn.Module | type):
        return
    seen.add(id(holder))
    if isinstance(holder, torch.Tensor):
        yield holder
    elif isinstance(holder, dict):
        for item in holder.values():
            yield from tensors_in(item, seen)
    elif isinstance(holder, list | tuple | set):
        for item in holder:
            yield from tensors_in(item, seen)
    elif hasattr(holder, "__dict__"):
        yield from tensors_in(vars(holder), seen)


def allocated(*holders: Any) -> int:
    """Bytes of all memory that tensors reachable from objects keep alive, but for single numbers."""
    storages = [tensor.untyped_storage() for tensor in tensors_in(list(holders), set()) if tensor.dim()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_plan_grants_what_rows_allocate(name: str, monkeypatch: pytest.MonkeyPatch):
    """From the plan's records, as a loaded model's. Layers of rows' own allocate nothing at the start; see below."""
    shape = planned(name, "rows")
    monkeypatch.setattr("epslots.generation.row_batcher.tensors_of", lambda model: shape.cache)
    batcher = RowBatcher(built(name), **SIZES)
    sizes = ENGINE.kv_tokens, ENGINE.max_requests, shape.step_tokens(ENGINE)
    own = sum(tensor.nbytes(*sizes) for tensor in shape.cache if not tensor.pooled)
    assert allocated(batcher.cache) == batcher.cache.nbytes == shape.kv_bytes(ENGINE) - own
    assert (own > 0) == (name == "deepseek_v4")
    batcher.close()


@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_plan_grants_what_pages_allocate(name: str):
    """And refuses those that can't be."""
    if (obstacle := paging_obstacle(built(name))) is not None:
        with pytest.raises(UnsupportedModelError, match=re.escape(f"can't be served from pages: {obstacle}")):
            planned(name, "pages")
        return
    for sizes in (SIZES, FEW_TOKENS):
        engine = EngineConfig(
            kv_tokens=sizes["kv_tokens"], max_requests=sizes["max_requests"], max_batch_tokens=sizes["max_batch_tokens"]
        )
        batcher = PagedBatcher(built(name), **sizes)
        processor = batcher.processor
        held = processor.cache, processor.inputs_and_outputs, batcher._decoding._mask
        assert allocated(*held) == planned(name, "pages").kv_bytes(engine)
        batcher.close()


def test_batch_invariant_pages_have_no_masks():
    model, skeleton = MODELS["mixtral"].build(), skeleton_of.__wrapped__("mixtral")
    record_unknown_functions(model)
    record_unknown_functions(skeleton)
    batcher = PagedBatcher(model, **SIZES)
    processor = batcher.processor
    found = allocated(processor.cache, processor.inputs_and_outputs)
    assert (
        found
        == with_cache(shape_of("mixtral"), skeleton, EngineConfig()).kv_bytes(ENGINE)
        < planned("mixtral", "pages").kv_bytes(ENGINE)
    )
    batcher.close()


def test_rows_of_their_own_stay_below_the_plan():
    """deepseek_v4: measured after every step, for long prompts and short ones that come and go."""
    shape, batcher = planned("deepseek_v4", "rows"), RowBatcher(built("deepseek_v4"), **SIZES)
    for request in requests_of(((70, 5), (60, 8), (40, 12), (3, 4))):
        batcher.add(request)
    found = []
    while batcher.prepare():
        batcher.step()
        batcher.outputs()
        found.append(allocated(batcher.cache, batcher.admission.running))
    assert batcher.cache.nbytes < max(found) <= shape.kv_bytes(ENGINE)
    batcher.close()


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_skeletons_cache_is_chosen_as_the_models(name: str):
    """By what layers keep, and by the angles of rotary embeddings, of which a skeleton has no frequencies."""
    skeleton, model = skeleton_of(name), built(name)
    assert choose_cache(skeleton, ENGINE) == choose_cache(model, ENGINE)
    assert planned(name, "auto").cache_kind == choose_cache(model, ENGINE)[0]
    assert [type(module) for module in depends_on_length(skeleton)] == [type(module) for module in depends_on_length(model)]
    assert planned(name, "rows").whole_prompts == row_support(model).whole_prompts


@pytest.mark.parametrize(("name", "cache"), [("mixtral", "pages"), ("deepseek_v3", "rows"), ("gemma4", "rows")])
def test_flash_reads_pages_unless_they_are_larger(name: str, cache: str, monkeypatch: pytest.MonkeyPatch):
    """Pages expand latents, and are as wide in all layers as in the widest."""
    skeleton, engine = skeleton_of(name), EngineConfig(kv_tokens=2**16, max_requests=64, max_batch_tokens=2048)
    shape = shape_of(name)  # measured before, or the skeleton would ask for the kernels
    for config in {id(config): config for config in (skeleton.config, skeleton.config.get_text_config())}.values():
        monkeypatch.setattr(config, "_attn_implementation", "flash_attention_2")
    rows, pages = (with_cache(shape, skeleton, structs.replace(engine, cache=kind)) for kind in ("rows", "pages"))
    kind, reason = choose_cache(skeleton, engine, shape.cache)
    assert kind == cache == ("rows" if pages.kv_bytes(engine) > 1.25 * rows.kv_bytes(engine) else "pages")
    assert ("flash" in reason) == (kind == "pages")
    assert choose_cache(skeleton, engine, ()) == ("pages", "flash attention reads them in place")


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "kimi_linear"])
def test_a_loaded_models_engine_allocates_its_plan(name: str, checkpoint: Callable[[str], Path], cache_dir: Path):
    settings: dict[str, Any] = {"slots": 4, "device": "cpu", "dtype": "float32", "progress": False}
    pages = name == "mixtral"
    model = epslots.load(checkpoint(name), cache_dir=cache_dir, cache="pages" if pages else "auto", **settings, **SIZES)
    plan = runtime_of(model).plan
    batcher: Any = Engine(model).batcher
    assert plan.shape.cache_kind == ("pages" if pages else "rows")
    processor = batcher.processor if pages else None
    parts = (processor.cache, processor.inputs_and_outputs, batcher._decoding._mask) if processor else (batcher.cache,)
    assert allocated(*parts) == plan.kv_bytes
    batcher.close()
