"""The measured shape equals what plain transformers holds: caches of real runs, bytes of real weights, experts per token."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from epslots.errors import ConfigError, UnsupportedModelError
from epslots.models.experts import expert_layers
from epslots.models.measure_shape import measure_cache, shape_of_config, shape_of_model
from epslots.models.model_shape import OF_THE_CACHE, CacheTensor, ModelShape
from epslots.models.pretrained import build_skeleton, resolve_class
from tests.support.more_models import UNUSUAL
from tests.support.zoo import HIDDEN, VOCAB, ZOO, Tiny, random_ids

MEASURES_EVERY_MODEL = True
TOKENS = 40  # longer than every sliding window of the zoo, 16
FP32 = 4

MODELS = {name: tiny for name, tiny in ZOO.items() if tiny.served} | UNUSUAL


def config_of(tiny: Tiny) -> transformers.PretrainedConfig:
    config = getattr(transformers, tiny.architecture).config_class(**tiny.settings)
    config.architectures = [tiny.architecture]
    return config


def shape_of(tiny: Tiny, dtype: str = "float32") -> ModelShape:
    return shape_of_config(config_of(tiny), tiny.name, dtype)


@cache
def measured(name: str) -> ModelShape:
    return shape_of(MODELS[name])


def cache_of(model: PreTrainedModel, tokens: int, rows: int = 1) -> Any:
    """The model's cache after prompts, and a last token alone: a step that lets go of what the prompts left behind."""
    model.set_experts_implementation("eager")
    ids = random_ids(rows, tokens)
    with torch.no_grad():
        prompt = model(input_ids=ids[:, :-1], use_cache=True)
        return model(input_ids=ids[:, -1:], past_key_values=prompt.past_key_values, use_cache=True).past_key_values


def kept(cache: Any, record: CacheTensor) -> torch.Tensor:
    """The tensor in a model's cache that a ``CacheTensor`` describes."""
    holder = cache if record.layer == OF_THE_CACHE else cache.layers[record.layer]
    value = getattr(holder, record.path[0])
    for key in record.path[1:]:
        value = value[int(key) if key.isdigit() else key]
    assert isinstance(value, torch.Tensor)
    return value


def tensors_in(holder: Any) -> Iterator[torch.Tensor]:
    """All tensors reachable from an object through attributes, lists and dicts, but for scalar bookkeeping."""
    if isinstance(holder, torch.Tensor):
        if holder.dim():
            yield holder
    elif isinstance(holder, dict):
        for item in holder.values():
            yield from tensors_in(item)
    elif isinstance(holder, list | tuple):
        for item in holder:
            yield from tensors_in(item)
    elif hasattr(holder, "__dict__"):
        yield from tensors_in(vars(holder))


def allocated_bytes(tensors: Iterator[torch.Tensor]) -> int:
    """Bytes of the storages that tensors keep alive, however many views share one."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize("name", sorted(MODELS))
def test_records_are_the_tensors_of_a_real_runs_cache(name: str) -> None:
    """All of them, with their shapes, for sequences within a window and beyond; but layers of rows' own, see below."""
    records = [record for record in measured(name).cache if record.pooled]
    model = MODELS[name].build()
    for tokens in (9, TOKENS):
        cache, found = cache_of(model, tokens, rows=2), set()
        for record in records:
            tensor, (batch, sequence) = kept(cache, record), record.dimensions
            found.add(id(tensor))
            sizes = dict(enumerate(tensor.shape))
            assert sizes.pop(batch) == 2
            if sequence is not None:
                assert sizes.pop(sequence) == (tokens if record.window is None else min(tokens, record.window - 1))
            assert (tuple(sizes.values()), str(tensor.dtype)) == (record.shape, f"torch.{record.dtype}")
        own = {record.layer for record in measured(name).cache if not record.pooled}
        cache.layers = [layer for index, layer in enumerate(cache.layers) if index not in own]
        assert {id(tensor) for tensor in tensors_in(cache)} == found


@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_next", "nemotron_h", "deepseek_v3"])
def test_caches_keep_their_own_dtypes(name: str) -> None:
    """Keys and values are in the model's dtype, recurrent states stay in fp32."""
    shape = shape_of(MODELS[name], "bfloat16")
    cache = cache_of(MODELS[name].build().to(torch.bfloat16), TOKENS)
    assert [str(kept(cache, record).dtype) for record in shape.cache] == [f"torch.{record.dtype}" for record in shape.cache]
    assert {record.dtype for record in shape.cache} <= {"bfloat16", "float32"}
    assert "bfloat16" in {record.dtype for record in shape.cache}


def test_compressed_caches_are_measured_in_whole_entries() -> None:
    """deepseek_v4: a window, a history compressed 4 or 8 to 1, and buffers; each row has them for itself."""
    records = [record for record in shape_of(ZOO["deepseek_v4"]).cache if record.layer > 0]
    assert not any(record.pooled for record in records)
    assert {record.window for record in records if record.kind == "window"} == {16}
    strides = {(record.layer, record.stride) for record in records if record.kind == "token"}
    assert strides == {(1, 4), (2, 8), (3, 4)}
    model = ZOO["deepseek_v4"].build()
    for tokens in (30, 31, 40, 63):
        cache = cache_of(model, tokens)
        for record in records:
            tensor = kept(cache, record)
            assert (
                0 <= record.nbytes(tokens, 1, 1) // 2 - tensor.nbytes <= (record.entry_bytes if record.kind != "token" else 0)
            )
        shown = {(tensor.data_ptr(), tensor.shape) for tensor in tensors_in(cache.layers[1:]) if tensor.numel()}
        counted = {
            (tensor.data_ptr(), tensor.shape) for tensor in (kept(cache, record) for record in records) if tensor.numel()
        }
        assert shown == counted


@pytest.mark.parametrize("name", ["mixtral", "minimax", "longcat_flash", "llama", "dbrx"])
def test_a_models_cache_is_measured_whatever_its_experts(name: str) -> None:
    """Of a loaded model, which is left as it is: with experts outside of transformers' interface, or none."""
    model = (ZOO | UNUSUAL)[name].build()
    model.config._attn_implementation = "eager"
    before = {id(module): dict(vars(module)) for module in model.modules()}
    records = measure_cache(model)
    assert {id(module): dict(vars(module)) for module in model.modules()} == before
    with torch.no_grad():
        cache = model(input_ids=random_ids(length=9), use_cache=True).past_key_values
    assert all(kept(cache, record).numel() for record in records)
    assert {id(tensor) for tensor in tensors_in(cache)} == {id(kept(cache, record)) for record in records}


def test_attention_that_needs_values_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash attention's kernels take no meta tensors; what they keep is what any attention keeps."""

    def kernel(*_: Any, **__: Any) -> Any:
        raise NotImplementedError("no kernel for meta tensors")

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "needs_values", kernel)
    config = config_of(ZOO["mixtral"])
    skeleton = build_skeleton(resolve_class(config), config, torch.float32, attention="needs_values")
    shape = shape_of_model(skeleton, "mixtral", "float32", expert_layers(skeleton))
    assert shape.cache == shape_of(ZOO["mixtral"]).cache
    assert skeleton.config._attn_implementation == "needs_values"
    with pytest.raises(ConfigError, match="attn_implementation='needs_value': MixtralForCausalLM: "):
        build_skeleton(resolve_class(config), config, torch.float32, attention="needs_value")


def test_tensors_of_unknown_dimensions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of a later version may keep what no row could be made of."""
    update = DynamicLayer.update

    def keeps_more(self: DynamicLayer, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.norms = key_states.norm(dim=-1)  # type: ignore[attr-defined]
        return update(self, key_states, value_states, *args, **kwargs)

    monkeypatch.setattr(DynamicLayer, "update", keeps_more)
    with pytest.raises(UnsupportedModelError, match="DynamicLayer keeps norms, of which only transformers knows"):
        shape_of(ZOO["mixtral"])


@pytest.mark.parametrize("name", sorted(MODELS))
def test_layers_experts_and_dense_bytes_are_the_real_models(name: str) -> None:
    tiny, shape = MODELS[name], measured(name)
    assert len(shape.layers) == tiny.moe_layers
    assert {layer.num_experts for layer in shape.layers} == {tiny.num_experts}
    assert shape.top_k == tiny.top_k
    assert (shape.hidden_size, shape.vocab_size) == (HIDDEN, VOCAB)
    model = tiny.build()
    parameters = dict(model.named_parameters())
    of_experts = {f"{layer.name}.{tensor.name}" for layer in shape.layers for tensor in layer.layout.tensors}
    everything = allocated_bytes(iter([*parameters.values(), *model.buffers()]))
    if tiny.rebuilt:  # experts in tensors of other names, and of no others
        assert (
            shape.dense_bytes + sum(layer.num_experts * layer.weights.elements * FP32 for layer in shape.layers) == everything
        )
    else:
        assert of_experts <= parameters.keys()
        assert shape.dense_bytes + allocated_bytes(iter(parameters[path] for path in of_experts)) == everything


def test_a_skeleton_with_its_experts_has_the_same_shape() -> None:
    """Experts are told from dense weights by their layer, not by their absence."""
    config = config_of(ZOO["deepseek_v3"])
    with torch.device("meta"):
        model = transformers.DeepseekV3ForCausalLM(config)
    layers = expert_layers(model)
    assert shape_of_model(model, "deepseek_v3", "float32", layers) == shape_of(ZOO["deepseek_v3"])


def test_the_shape_carries_name_and_dtype_and_halves_with_it() -> None:
    full, half = shape_of(ZOO["mixtral"]), shape_of(ZOO["mixtral"], "bfloat16")
    assert (full.name, full.dtype, half.dtype) == ("mixtral", "float32", "bfloat16")
    assert half.expert_bytes * 2 == full.expert_bytes
    # Rotary frequencies stay in fp32, for any dtype of the model: 2 buffers of 8.
    assert half.dense_bytes * 2 == full.dense_bytes + 2 * 8 * FP32
    assert full.parameters - half.parameters in range(-100, 100)


def test_auto_takes_the_configurations_dtype() -> None:
    config = config_of(ZOO["mixtral"])
    config.dtype = torch.bfloat16
    assert shape_of_config(config, "mixtral").dtype == "bfloat16"
    with pytest.raises(ConfigError, match="int8"):
        shape_of_config(config, "mixtral", "int8")


@pytest.mark.parametrize("name", ["mixtral", "longcat_flash"])
def test_a_measured_skeleton_has_its_own_forward_again(name: str) -> None:
    """longcat_flash's experts run through a forward of the instance, which must not be lost."""
    config = config_of(ZOO[name])
    model = build_skeleton(resolve_class(config), config, torch.float32)
    layers = expert_layers(model)
    before = [vars(model.get_submodule(layer.name)).get("forward") for layer in layers]
    shape_of_model(model, name, "float32", layers)
    assert [vars(model.get_submodule(layer.name)).get("forward") for layer in layers] == before


def test_a_model_that_cannot_be_traced_is_refused_with_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def needs_values(self: torch.nn.Module, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.from_numpy(hidden_states.numpy())

    from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer

    monkeypatch.setattr(MixtralDecoderLayer, "forward", needs_values)
    with pytest.raises(UnsupportedModelError, match=r"MixtralForCausalLM can't be measured.*TypeError.*numpy"):
        shape_of(ZOO["mixtral"])


def test_dense_models_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="has no experts"):
        shape_of(ZOO["llama"])
