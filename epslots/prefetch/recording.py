"""Recording a model on text: the inputs and choices of each MoE layer. Called by the fit (``fit.py``) and by benchmarks.

Legend of shape suffixes: S windows of text, W tokens of a window, N = S * W tokens, K experts of a token, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from epslots.errors import ConfigError
from epslots.models.experts import experts_modules
from epslots.progress import Advance

# One window in so many is held out: the last ones evaluate a fit on all others.
HELD_OUT_EVERY = 20
# Tokens of a forward pass while recording.
_FORWARD_TOKENS = 2048


@dataclass(frozen=True)
class LayerRecording:
    """One layer's inputs and choices: hidden states float16 [N, H] and expert ids int16 [N, K], on the CPU."""

    hidden_NH: torch.Tensor
    index_NK: torch.Tensor


def held_out_windows(windows: int) -> int:
    """How many of the last of these windows are held out."""
    return max(1, windows // HELD_OUT_EVERY)


def cut_windows(texts: Iterable[Sequence[int]], window: int, tokens: int, end: int | None, seed: int) -> torch.Tensor:
    """Windows of text, int64 [S, W], at most ``tokens`` in all: random ones, then the last ones in order.

    Args:
        texts: tokens of each text; they are shuffled and joined.
        window: W.
        end: a token between texts, if the model has one for it.

    Raises:
        ConfigError: the texts are too short for a fit.
    """
    generator = np.random.default_rng(seed)
    whole = [np.asarray(text, np.int64) for text in texts]
    generator.shuffle(whole)
    between = np.zeros(0, np.int64) if end is None else np.array([end], np.int64)
    joined = np.concatenate([part for text in whole for part in (text, between)] or [between])
    count = len(joined) // window
    held_out = held_out_windows(min(count, tokens // window))
    if count < 2 * HELD_OUT_EVERY:
        raise ConfigError(
            f"text of {len(joined):,} tokens; a fit needs {2 * HELD_OUT_EVERY * window:,} at least, and 200,000 to be good"
        )
    windows_SW = torch.from_numpy(joined[: count * window].reshape(count, window))
    trained = generator.permutation(count - held_out)[: max(1, tokens // window - held_out)]
    return torch.cat([windows_SW[torch.from_numpy(trained)], windows_SW[count - held_out :]])


def plan_recordings(layers: int, distance: int, bytes_of_layer: int, memory: int) -> Iterator[range]:
    """The layers to record in each run over the text: every layer together with the one ``distance`` behind it.

    Args:
        bytes_of_layer: of one layer's recording.
        memory: bytes that the recordings of one run may take; two layers are recorded even if they exceed it.
    """
    at_once = max(distance + 1, memory // max(1, bytes_of_layer))
    start = 0
    while start + distance < layers:
        yield range(start, min(layers, start + at_once))
        start += at_once - distance


def record(
    model: PreTrainedModel, windows_SW: torch.Tensor, layers: Iterable[int], advance: Advance
) -> dict[int, LayerRecording]:
    """Run all windows through the model; the recordings of these layers. Layers that skip some tokens are left out.

    Args:
        windows_SW: tokens, int64 [S, W].
        advance: called with the number of windows done since.
    """
    modules = dict(enumerate(experts_modules(model).values()))
    windows, window = windows_SW.shape
    at_once = max(1, _FORWARD_TOKENS // window)
    recordings: dict[int, LayerRecording] = {}
    partial: set[int] = set()
    rows = slice(0, 0)

    def watch(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden_TH, index_TK = (*args, *kwargs.values())[:2]
            if len(hidden_TH) != rows.stop - rows.start:
                partial.add(layer)
                return
            if layer not in recordings:
                size = windows * window
                empty = torch.empty(size, hidden_TH.shape[1], dtype=torch.float16)
                recordings[layer] = LayerRecording(empty, torch.empty(size, index_TK.shape[1], dtype=torch.int16))
            recordings[layer].hidden_NH[rows] = hidden_TH.to("cpu", torch.float16)
            recordings[layer].index_NK[rows] = index_TK.to("cpu", torch.int16)

        return hook

    with ExitStack() as stack, torch.inference_mode():
        for layer in layers:
            handle = modules[layer].register_forward_pre_hook(watch(layer), with_kwargs=True)
            stack.callback(handle.remove)
        for start in range(0, windows, at_once):
            batch_BW = windows_SW[start : start + at_once]
            rows = slice(start * window, start * window + batch_BW.numel())
            model.get_decoder()(input_ids=batch_BW.to(model.device), use_cache=False)
            advance(len(batch_BW))
    return {layer: recording for layer, recording in recordings.items() if layer not in partial}
