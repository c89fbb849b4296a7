"""Measures a transformers model on its skeleton on the meta device: no weights, no memory.

No single place of a configuration states the state that a layer keeps of a sequence: heads and widths differ from layer to
layer, latent attention keeps something else than keys and values, recurrent layers keep states in fp32, some layers share
another's cache. So the skeleton is run twice on meta tensors, which have shapes and no contents, and the cache that the model
itself fills is measured. The same run shows the number of experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.fx.experimental import _config as meta_config
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PretrainedConfig, PreTrainedModel

from epslots.errors import UnsupportedModelError
from epslots.layout import LayerSpec
from epslots.models.experts import expert_layers
from epslots.models.model_shape import KVLayer, ModelShape
from epslots.models.pretrained import build_skeleton, resolve_class, resolve_dtype

# The dry runs are this many tokens long, less one, and twice this many, less one: enough to see growth. (Some recurrent layers
# loop over tokens in Python, so more would take time.)
DRY_RUN_TOKENS = 16


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
    kv, top_k = _dry_run(model, experts) if run else ((), 1)
    return ModelShape(
        name=name,
        dtype=dtype,
        layers=layers,
        top_k=top_k,
        dense_bytes=_dense_bytes(model, experts),
        kv=kv,
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
    )


def _dense_bytes(model: PreTrainedModel, experts: Sequence[nn.Module]) -> int:
    """Bytes of all parameters and buffers but the experts', each in its own dtype; tied ones are one object, counted once."""
    of_experts = {id(tensor) for module in experts for tensor in module._parameters.values()}
    dense = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in of_experts}
    return sum(tensor.nbytes for tensor in dense.values())


def _dry_run(model: PreTrainedModel, experts: Sequence[nn.Module]) -> tuple[tuple[KVLayer, ...], int]:
    """A sequence's state, and experts per token, from two forward passes on meta tensors."""
    top_ks: list[int] = []

    def stand_in(hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        top_ks.append(top_k_index.shape[-1])
        return torch.empty_like(hidden_states)

    short_tokens, long_tokens = _dry_run_lengths(model)
    try:
        short = run_without_experts(model, short_tokens, experts, stand_in)
        long = run_without_experts(model, long_tokens, experts, stand_in)
    except Exception as error:  # an architecture that needs values may raise anything
        raise UnsupportedModelError(
            f"the cache of {type(model).__name__} can't be measured without weights, so its memory can't be planned: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not top_ks:
        raise UnsupportedModelError(f"a forward pass of {type(model).__name__} reaches none of its experts")
    pairs = zip(_parts(short), _parts(long), strict=True)
    kv = tuple(entry for pair in pairs for entry in _kv_layers(*pair, short_tokens, long_tokens))
    return kv, max(top_ks)


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
        with torch.no_grad(), all_rows, _ValuesAreZero():
            ids = torch.zeros(1, tokens, dtype=torch.long, device=model.device)
            # The decoder alone: its surroundings turn images into embeddings, and hidden states into logits.
            decoder = cast(Any, model).get_decoder()
            return decoder(input_ids=ids, use_cache=True).past_key_values
    finally:
        for module, forward in zip(experts, own, strict=True):
            if forward is None:
                del module.forward
            else:
                module.forward = forward


class _ValuesAreZero(TorchDispatchMode):
    """Answers a meta tensor's request for its value with zero or False.

    Some models request one, and continue with the same shapes for any answer: has the sequence outgrown the frequencies that
    phimoe's rotary embedding was trained with?
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return torch.zeros((), dtype=args[0].dtype, device="cpu").item()
        return func(*args, **(kwargs or {}))


def _parts(cache: Any) -> list[object]:
    """The cache's layers, and the cache itself for models that keep states beside them (minimax)."""
    return [*cache.layers, cache]


def _kv_layers(short: object, long: object, short_tokens: int, long_tokens: int) -> Iterator[KVLayer]:
    """A rule for any length from one layer's states after few and after more tokens."""
    window = getattr(short, "sliding_window", None)
    states, later = _states(short), _states(long)
    if window is not None:
        # Keys and values [1, heads, tokens kept, width]: their own shape shows the bytes of a token.
        sliding = [name for name in ("keys", "values") if name in states and states[name].dim() == 4]
        if sliding:
            yield KVLayer(sum(states[name].nbytes // states[name].shape[-2] for name in sliding), window)
        for name in sliding:
            del states[name], later[name]
    before, after = sum(t.nbytes for t in states.values()), sum(t.nbytes for t in later.values())
    per_token = -(-(after - before) // (long_tokens - short_tokens))
    if after:
        yield KVLayer(per_token, None, max(0, before - short_tokens * per_token))


def _states(part: object) -> dict[str, torch.Tensor]:
    """The tensors in an object's attributes, or in lists and dicts there, by name.

    Scalars are bookkeeping. A tensor under two names counts once (deepseek_v4's keys are its values).
    """
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for attribute, value in vars(part).items():
        inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for name, tensor in [(attribute, value), *((f"{attribute}.{key}", item) for key, item in inside)]:
            if isinstance(tensor, torch.Tensor) and tensor.dim():
                found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())
