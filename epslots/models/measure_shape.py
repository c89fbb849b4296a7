"""Measures a transformers model on its skeleton on the meta device: no weights, no memory.

No single place of a configuration states the state that a layer keeps of a sequence: heads and widths differ from layer to
layer, latent attention keeps something else than keys and values, recurrent layers keep states in fp32, some layers share
another's cache. So the skeleton is run twice on meta tensors, which have shapes and no contents, and the cache that the model
itself fills is measured. The same run shows the number of experts per token.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from torch.fx.experimental import _config as meta_config
from transformers import PretrainedConfig, PreTrainedModel

from epslots.errors import UnsupportedModelError
from epslots.layout import LayerSpec
from epslots.models.experts import dense_class, expert_layers
from epslots.models.experts_interface import is_experts
from epslots.models.meta_run import MetaRun
from epslots.models.model_shape import OF_THE_CACHE, CacheTensor, ModelShape
from epslots.models.pretrained import build_skeleton, resolve_class, resolve_dtype

# The dry runs are this many tokens long, less one, and twice this many, less one: enough to see growth. (Some recurrent layers
# loop over tokens in Python, so more would take time.)
DRY_RUN_TOKENS = 16
# The tensors of transformers' cache classes, by attribute: the dimensions of batch and sequence (None = a state).
_DIMENSIONS: dict[str, tuple[int, int | None]] = {
    "keys": (0, 2),
    "values": (0, 2),
    "indexer_keys": (0, 1),  # DeepSeek's sparse attention
    "indexer_position_ids": (1, 2),  # qwen4_exp
    "idx_keys": (0, 2),  # minimax_m3
    "conv_states": (0, None),
    "recurrent_states": (0, None),
    "linear_cache": (0, None),  # minimax
}
# Those of deepseek_v4's layers, which each row has for itself. Buffers hold the tokens that wait to be compressed.
_OWN_DIMENSIONS: dict[str, tuple[int, int | None]] = {
    "compressed_kv": (0, 1),
    "buffer_kv": (0, None),
    "buffer_gate": (0, None),
    "overlap_kv": (0, None),
    "overlap_gate": (0, None),
}


def shape_of_config(config: PretrainedConfig, name: str, dtype: str | torch.dtype = "auto") -> ModelShape:
    """The shape of the model that a configuration describes, from a temporary skeleton.

    Args:
        config: from ``pretrained.read_config``; its ``architectures`` name the class.
        name: the model's name in messages.
        dtype: of weights and activations; ``"auto"`` is the configuration's own.

    Raises:
        ConfigError: ``dtype`` isn't one that experts can be kept in.
        UnsupportedModelError: transformers has no such class, or its experts can't be run from slots.
    """
    resolved = resolve_dtype(dtype, config)
    model = build_skeleton(resolve_class(config), config, resolved)
    return shape_of_model(model, name, str(resolved).removeprefix("torch."), expert_layers(model))


def shape_of_model(
    model: PreTrainedModel, name: str, dtype: str, layers: tuple[LayerSpec, ...], *, run: bool = True
) -> ModelShape:
    """The shape of a model.

    Args:
        model: on the meta device, in ``dtype``. Running it may leave traces in its buffers: don't use it afterwards.
        name: the model's name in messages.
        dtype: of weights and activations.
        layers: its MoE layers in order, named by the path of their experts module. The parameters of such a module itself are
            the experts; those of its children are dense.
        run: False takes the cache for empty and a token for sent to one expert: for a model that can't be run this way.

    Raises:
        UnsupportedModelError: its forward pass fails on the meta device.
    """
    text = model.config.get_text_config(decoder=True)
    experts = [model.get_submodule(layer.name) for layer in layers]
    cache, top_k = _dry_run(model, experts) if run else ((), 1)
    if not top_k:
        raise UnsupportedModelError(f"a forward pass of {type(model).__name__} reaches none of its experts")
    return ModelShape(
        name=name,
        dtype=dtype,
        layers=layers,
        top_k=top_k,
        dense_bytes=_dense_bytes(model, experts),
        cache=cache,
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
    )


def _dense_bytes(model: PreTrainedModel, experts: Sequence[nn.Module]) -> int:
    """Bytes of all parameters and buffers but the experts', each in its own dtype; tied ones are one object, counted once."""
    of_experts = {id(tensor) for module in experts for tensor in module._parameters.values()}
    dense = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in of_experts}
    return sum(tensor.nbytes for tensor in dense.values())


def measure_cache(model: PreTrainedModel) -> tuple[CacheTensor, ...]:
    """The tensors that a model's own cache keeps of a sequence.

    Args:
        model: on any device, with or without experts. A skeleton of its class is run; or the model itself, if that can't be
            run without values.

    Raises:
        UnsupportedModelError: a forward pass fails, or the cache keeps unknown tensors.
    """
    config = copy.deepcopy(model.config)
    config._attn_implementation = "eager"  # the model's may be a batcher's own
    skeleton = build_skeleton(dense_class(type(model)), config, model.dtype)
    for run in (skeleton, model):
        try:
            return _dry_run(run, [module for module in run.modules() if is_experts(module)])[0]
        except UnsupportedModelError:
            if run is model or model.device.type == "meta":
                raise
    raise AssertionError("one of the two returns or raises")


def _dry_run(model: PreTrainedModel, experts: Sequence[nn.Module]) -> tuple[tuple[CacheTensor, ...], int]:
    """A sequence's cache, and experts per token (0 without experts), from two forward passes on meta tensors."""
    top_ks: list[int] = [0]

    def stand_in(hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        top_ks.append(top_k_index.shape[-1])
        return torch.empty_like(hidden_states)

    short_tokens, long_tokens = _dry_run_lengths(model)
    try:
        with _attention_without_values(model):
            short = run_without_experts(model, short_tokens, experts, stand_in)
            long = run_without_experts(model, long_tokens, experts, stand_in)
        pairs = zip(_parts(short), _parts(long), strict=True)
        cache = tuple(tensor for pair in pairs for tensor in _cache_tensors(*pair, long_tokens - short_tokens))
    except Exception as error:  # an architecture that needs values may raise anything
        raise UnsupportedModelError(
            f"the cache of {type(model).__name__} can't be measured without weights, so its memory can't be planned: "
            f"{type(error).__name__}: {error}"
        ) from error
    return cache, max(top_ks)


@contextmanager
def _attention_without_values(model: PreTrainedModel) -> Iterator[None]:
    """Within the context attention is one that runs on meta tensors: flash attention's kernels don't."""
    implementation = model.config._attn_implementation
    if implementation in ("eager", "sdpa"):
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(implementation)


def _dry_run_lengths(model: PreTrainedModel) -> tuple[int, int]:
    """Tokens of the two runs.

    Where a cache compresses runs of tokens into one entry (deepseek_v4), the difference is a multiple of every rate, so that
    whole entries show, and the lengths are one short of such a multiple, when the buffer of waiting tokens is fullest.
    """
    rates = getattr(model.config.get_text_config(decoder=True), "compress_rates", None) or {}
    unit = math.lcm(DRY_RUN_TOKENS, *rates.values())
    return unit - 1, 2 * unit - 1


def run_without_experts(
    model: PreTrainedModel, tokens: int, experts: Sequence[nn.Module], stand_in: Callable[..., torch.Tensor]
) -> object:
    """The cache that the model makes and fills with one sequence, on any device.

    Args:
        model: its decoder is run.
        tokens: of the sequence.
        experts: the experts modules; they change no shape, and the choice among them depends on values that aren't there.
        stand_in: called instead of them: (hidden [.., H], index [.., K], weights [.., K]) to the shape of hidden.
    """
    own = [vars(module).get("forward") for module in experts]
    for module in experts:
        module.forward = stand_in
    try:
        # A mask may select any number of rows; for their shapes, all rows are assumed (glm5_next's indexer).
        all_rows = cast(Any, meta_config).patch(meta_nonzero_assume_all_nonzero=True)
        with torch.no_grad(), all_rows, MetaRun():
            ids = torch.zeros(1, tokens, dtype=torch.long, device=model.device)
            # Only the decoder: its surroundings turn images into embeddings, and hidden states into logits.
            decoder = cast(Any, model).get_decoder()
            return decoder(input_ids=ids, use_cache=True, return_dict=True).past_key_values
    finally:
        for module, forward in zip(experts, own, strict=True):
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def _parts(cache: Any) -> list[tuple[int, object]]:
    """The cache's layers by index, and the cache itself for models that keep states beside them (minimax)."""
    return [*enumerate(cache.layers), (OF_THE_CACHE, cache)]


def _cache_tensors(short: tuple[int, object], long: tuple[int, object], more_tokens: int) -> Iterator[CacheTensor]:
    """One layer's tensors, from those after few tokens and after ``more_tokens`` more."""
    (index, layer), (_, later) = short, long
    before, after = _states(layer), _states(later)
    window, pooled = getattr(layer, "sliding_window", None), not any(path[0] in _OWN_DIMENSIONS for path in after)
    for path, tensor in after.items():
        dimensions = _dimensions(path[0], layer)
        sequence = dimensions[1]
        shape = tuple(size for dimension, size in enumerate(tensor.shape) if dimension not in dimensions)
        dtype = str(tensor.dtype).removeprefix("torch.")
        if sequence is None:
            assert path in before and before[path].shape == tensor.shape, f"{path} grows with the sequence"
            yield CacheTensor(index, path, "row", shape, dtype, dimensions, pooled=pooled)
        elif window is not None and path[0] in ("keys", "values"):
            yield CacheTensor(index, path, "window", shape, dtype, dimensions, window, pooled=pooled)
        else:
            entries = tensor.shape[sequence] - (before[path].shape[sequence] if path in before else 0)
            assert entries and more_tokens % entries == 0, f"{path} grows by {entries} entries in {more_tokens} tokens"
            yield CacheTensor(index, path, "token", shape, dtype, dimensions, stride=more_tokens // entries, pooled=pooled)


def _dimensions(attribute: str, layer: object) -> tuple[int, int | None]:
    """The dimensions of batch and sequence."""
    known = _DIMENSIONS | _OWN_DIMENSIONS
    if attribute not in known:
        raise UnsupportedModelError(
            f"{type(layer).__name__} keeps {attribute}, of which only transformers knows the dimensions"
        )
    return known[attribute]


def _states(part: object) -> dict[tuple[str, ...], torch.Tensor]:
    """The tensors in an object's attributes, or in lists and dicts there, by attribute and key.

    Scalars are bookkeeping. A tensor under two names counts once (deepseek_v4's keys are its values).
    """
    found: dict[int, tuple[tuple[str, ...], torch.Tensor]] = {}
    for attribute, value in vars(part).items():
        inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for path, tensor in [((attribute,), value), *(((attribute, str(key)), item) for key, item in inside)]:
            if isinstance(tensor, torch.Tensor) and tensor.dim():
                found.setdefault(id(tensor), (path, tensor))
    return dict(found.values())
