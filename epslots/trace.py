"""Routing traces: which experts each token chose, in every layer. Policies, placements and predictors are evaluated on them.

A trace is an ``.npz`` file of

    expert_ids    int16 [steps, layers, k], one row per token, sequence after sequence; -1 where a layer has fewer than k
                  experts per token, and for experts without weights
    starts        int64 [sequences], each sequence's first row
    num_experts   int64 [layers]
    probs         optional, float16 [steps, layers, experts]: the softmax of each layer's router over all experts; zeros beyond
                  the layer's own, and where its router is no linear map (``routers.py``)
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from epslots.errors import ConfigError
from epslots.given_files import write_whole
from epslots.models.experts import experts_modules
from epslots.npz import read_arrays
from epslots.placement.placement import check_size
from epslots.prefetch.routers import LinearRouter, find_routers
from epslots.runtime import Runtime, runtime_of

MOST_EXPERTS = 2**15  # of a layer: ids are int16
_MOST_PROBABILITY = 1.01  # rounded to float16

_Rows = tuple[NDArray[Any], ...]
"""Of some tokens: expert ids int16 [T, L, K]; and float16 probabilities [T, L, E], where they are recorded."""


@dataclass(frozen=True)
class Trace:
    """A routing trace in memory; the fields are those of the file."""

    expert_ids: NDArray[np.int16]
    starts: NDArray[np.int64]
    num_experts: NDArray[np.int64]
    probs: NDArray[np.float16] | None = None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the trace, compressed; the file appears whole or not at all.

        Raises:
            ConfigError: it can't be written.
        """
        arrays: dict[str, NDArray[Any]] = {name: array for name, array in vars(self).items() if array is not None}
        with write_whole(path) as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trace:
        """Read and check a trace.

        Raises:
            ConfigError: no routing trace; names the field that is wrong, and its allowed values.
        """
        return cls.of_arrays(read_arrays(path, "a routing trace"), os.fspath(path))

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, NDArray[Any]], name: str) -> Trace:
        """The trace of a file's arrays, checked.

        Args:
            name: of the file, for messages.

        Raises:
            ConfigError: no routing trace; names the field that is wrong, and its allowed values.
        """
        if missing := {"expert_ids", "starts", "num_experts"} - arrays.keys():
            raise ConfigError(f"{name} is not a routing trace: it has no {', '.join(sorted(missing))}")
        ids, starts, experts = arrays["expert_ids"], arrays["starts"], arrays["num_experts"]
        if ids.ndim != 3 or ids.dtype != np.int16:
            raise ConfigError(f"expert_ids is {ids.dtype}{list(ids.shape)}; it must be int16 [steps, layers, k]")
        if 0 in ids.shape[1:]:  # any number of steps would take no bytes
            raise ConfigError(f"expert_ids is {list(ids.shape)}; allowed: at least one layer, and k of at least 1")
        if experts.shape != ids.shape[1:2] or starts.ndim != 1:
            raise ConfigError(f"num_experts must be [layers={ids.shape[1]}] and starts [sequences]")
        if not np.issubdtype(experts.dtype, np.integer) or (experts < 1).any() or (experts > MOST_EXPERTS).any():
            raise ConfigError(f"num_experts is {experts.tolist()!r:.80}; allowed: whole numbers from 1 to {MOST_EXPERTS}")
        check_size(len(experts), 1, int(experts.max(initial=1)))
        _check_starts(starts, len(ids))
        _check_ids(ids, experts)
        probs = arrays.get("probs")
        if probs is not None and (probs.dtype != np.float16 or probs.shape != (*ids.shape[:2], int(experts.max()))):
            raise ConfigError(
                f"probs is {probs.dtype}{list(probs.shape)}; it must be float16 {[*ids.shape[:2], int(experts.max())]}, "
                f"[steps, layers, most experts of a layer]"
            )
        if probs is not None and not ((probs >= 0) & (probs <= _MOST_PROBABILITY)).all():  # NaN compares False
            raise ConfigError("probs has values that are no probabilities; allowed: 0 to 1")
        return cls(ids, starts.astype(np.int64), experts.astype(np.int64), probs)


def _check_starts(starts: NDArray[Any], steps: int) -> None:
    """Refuse first rows of sequences that can't be those of a trace of ``steps`` rows."""
    if not np.issubdtype(starts.dtype, np.integer):
        raise ConfigError(f"starts is {starts.dtype}; it must be int64 [sequences]")
    first = starts[:1].tolist() == [0] or not steps
    if not first or (starts[1:] <= starts[:-1]).any() or (len(starts) and starts[-1] >= steps):
        raise ConfigError("starts must begin with 0, rise, and stay below the number of steps")


def _check_ids(ids_TLK: NDArray[np.int16], experts_L: NDArray[Any]) -> None:
    """Refuse ids of experts that there are not; -1 stands for none."""
    if not ids_TLK.size:
        return
    least_L, most_L = ids_TLK.min((0, 2)), ids_TLK.max((0, 2))
    wrong_L = (least_L < -1) | (most_L >= experts_L)
    if wrong_L.any():
        layer = int(wrong_L.argmax())
        raise ConfigError(
            f"expert_ids of layer {layer} go from {least_L[layer]} to {most_L[layer]}; allowed: -1 (none) to "
            f"{int(experts_L[layer]) - 1}, by num_experts"
        )


class TraceRecorder:
    """Collects the routing of a model's forward passes, sequence by sequence. Made by ``record_trace``.

    Args:
        routers: of all layers, to record their probabilities; None where a layer has no linear router. None: record none.
    """

    def __init__(self, runtime: Runtime, routers: Sequence[LinearRouter | None] | None = None) -> None:
        self._runtime = runtime
        self._routers = routers
        self._experts = [layer.num_experts for layer in runtime.layers]
        self._finished: list[_Rows] = []
        self._open: list[list[_Rows]] = []
        self._layer_ids: dict[int, torch.Tensor] = {}
        self._layer_probs: dict[int, torch.Tensor] = {}

    def observe(self, layer: int, index_TK: torch.Tensor) -> None:
        """Take a layer's routing in the running forward pass, int64 [T, K]."""
        experts = self._experts[layer]
        self._layer_ids[layer] = index_TK.detach().masked_fill(index_TK >= experts, -1).to(torch.int16).cpu()

    def observe_input(self, layer: int, hidden_TH: torch.Tensor) -> None:
        """Take the input of a layer's experts in the running forward pass, [..., H]."""
        assert self._routers is not None
        router = self._routers[layer]
        if router is not None:
            probs_TE = router.logits(hidden_TH.detach().flatten(0, -2)).softmax(-1)
            self._layer_probs[layer] = probs_TE[:, : self._experts[layer]].to(torch.float16).cpu()

    def end_forward(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Sort the tokens of a forward pass into their sequences; a forward hook of the model."""
        inputs = kwargs.get("input_ids", args[0] if args else None)
        inputs = kwargs["inputs_embeds"] if inputs is None else inputs
        batch, length = inputs.shape[:2]
        rows = self._take_rows()
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() == 2:
            real_BT = mask[:, -length:].bool().cpu().numpy()
        else:
            real_BT = np.ones((batch, length), bool)
        cache = kwargs.get("past_key_values")
        # The hook runs after the forward pass: a cache that holds no more than its tokens was empty before it.
        if cache is None or cache.get_seq_length() <= length or len(self._open) != batch:
            self._close_sequences()
            self._open = [[] for _ in range(batch)]
        for row, sequence in enumerate(self._open):
            here = slice(row * length, (row + 1) * length)
            sequence.append(tuple(array[here][real_BT[row]] for array in rows))

    def _take_rows(self) -> _Rows:
        """The tokens' rows. -1 where a layer has a smaller k or saw part of the tokens, and no probabilities in the latter."""
        seen = {layer: ids.numpy() for layer, ids in self._layer_ids.items()}
        tokens, top_k = (max(ids.shape[axis] for ids in seen.values()) for axis in (0, 1))
        ids_TLK = np.full((tokens, len(self._experts), top_k), -1, np.int16)
        for layer, ids in seen.items():
            if len(ids) == tokens:  # a layer that saw part of the tokens doesn't know which
                ids_TLK[:, layer, : ids.shape[1]] = ids
        self._layer_ids.clear()
        if self._routers is None:
            return (ids_TLK,)
        probs_TLE = np.zeros((tokens, len(self._experts), max(self._experts)), np.float16)
        for layer, probs in self._layer_probs.items():
            if len(probs) == tokens:
                probs_TLE[:, layer, : probs.shape[1]] = probs.numpy()
        self._layer_probs.clear()
        return (ids_TLK, probs_TLE)

    def _close_sequences(self) -> None:
        for parts in self._open:
            if sum(len(part[0]) for part in parts):
                self._finished.append(tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
        self._open = []

    def trace(self) -> Trace:
        """The trace of all that was recorded so far."""
        self._close_sequences()
        experts = np.array(self._experts, np.int64)
        if not self._finished:
            return Trace(np.zeros((0, len(experts), 1), np.int16), np.zeros(0, np.int64), experts)
        lengths = np.array([len(sequence[0]) for sequence in self._finished], np.int64)
        ids, *probs = (np.concatenate(arrays) for arrays in zip(*self._finished, strict=True))
        return Trace(ids, np.cumsum(lengths) - lengths, experts, *probs)


@contextmanager
def record_trace(model: PreTrainedModel, *, probs: bool = False) -> Iterator[TraceRecorder]:
    """Record the routing of every forward pass inside the block; padding is left out.

    Args:
        probs: whether to record the routers' probabilities as well: 2 bytes for each token, layer and expert.

    Example:
        with epslots.record_trace(model) as recorder:
            model.generate(**inputs)
        recorder.trace().save("trace.npz")

    Raises:
        ConfigError: the model was not loaded by ``epslots.load``.
    """
    runtime = runtime_of(model)
    modules = experts_modules(model) if probs else {}
    recorder = TraceRecorder(runtime, find_routers(model, modules) if probs else None)
    with ExitStack() as stack:
        hook = model.register_forward_hook(recorder.end_forward, with_kwargs=True)
        stack.callback(hook.remove)
        for layer, module in enumerate(modules.values()):
            hook = module.register_forward_pre_hook(partial(_observe_input, recorder, layer), with_kwargs=True)
            stack.callback(hook.remove)
        for runner in runtime.runners:
            runner.observe(recorder.observe)
            stack.callback(runner.observe, None)
        yield recorder


def _observe_input(
    recorder: TraceRecorder, layer: int, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Pass an experts module's first argument, its hidden states, to the recorder; a forward hook."""
    recorder.observe_input(layer, args[0] if args else kwargs["hidden_states"])
