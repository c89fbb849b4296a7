"""Changes of logits before a token is chosen, in this order: grammar, ``min_tokens``, ``logit_bias``, penalties.

The order and the formulas are those of vLLM V1 (``vllm/v1/sample/sampler.py``); the grammar's mask comes first, as there.

Suffixes: R rows, each of a request; V tokens of the vocabulary; W words of 32 tokens; E (row, token) pairs that change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from epslots.arrays import FloatArray
from epslots.device_copy import to_device
from epslots.generation.sampling import Sampling
from epslots.generation.tracked_request import TrackedRequest

_WORD = 32
_LARGEST = float(np.finfo(np.float32).max)


def edits_logits(entry: TrackedRequest) -> bool:
    """Whether the logits of the request's next token are changed before it is chosen."""
    sampling = entry.request.sampling
    return entry.grammar_state is not None or bool(sampling.logit_bias) or _penalizes(sampling) or _holds_stops(entry)


def _holds_stops(entry: TrackedRequest) -> bool:
    return entry.text_length < entry.request.sampling.min_tokens and bool(entry.request.stop_tokens)


def _penalizes(sampling: Sampling) -> bool:
    return sampling.repetition_penalty != 1 or bool(sampling.frequency_penalty or sampling.presence_penalty)


def edit_logits(logits_RV: torch.Tensor, entries: Sequence[TrackedRequest]) -> None:
    """Change the logits of each request's next token, in place; nothing if no request asks for it.

    A number beyond float32's range becomes the largest within.

    Args:
        logits_RV: fp32 [R, V], contiguous.
        entries: R requests.
    """
    if not any(map(edits_logits, entries)):
        return
    vocabulary = logits_RV.shape[1]
    masks = [entry.allowed for entry in entries]
    if any(mask is not None for mask in masks):
        _mask(logits_RV, masks)
    pairs: tuple[list[FloatArray], ...] = ([], [], [])
    stops, biases, penalties = pairs
    for row, entry in enumerate(entries):
        sampling, start = entry.request.sampling, row * vocabulary
        if _holds_stops(entry):
            tokens = [token for token in sorted(entry.request.stop_tokens) if 0 <= token < vocabulary]
            stops.append(_pairs(start + np.array(tokens, np.int64)))
        if sampling.logit_bias:
            tokens_B, numbers_B = entry.bias_2B
            biases.append(_pairs(start + tokens_B, numbers_B))
        if _penalizes(sampling):
            counts = entry.counts
            less_U = sampling.frequency_penalty * counts.counts_U + sampling.presence_penalty * (counts.counts_U > 0)
            penalties.append(_pairs(start + counts.tokens_U, sampling.repetition_penalty, less_U))
    sizes = [sum(part.shape[1] for part in kind) for kind in pairs]
    if not sum(sizes):
        return
    # float64 holds places and settings exactly, and one copy carries them.
    pairs_3E = to_device(np.concatenate([part for kind in pairs for part in kind], axis=1), logits_RV.device)
    held_3E, biased_3E, penalized_3E = pairs_3E.split(sizes, dim=1)
    if sizes[0]:
        _hold_stops(logits_RV, held_3E[0].long())
    if sizes[1]:
        _add(logits_RV.view(-1), biased_3E[0].long(), biased_3E[1])
    if sizes[2]:
        _penalize(logits_RV.view(-1), penalized_3E[0].long(), *penalized_3E[1:])


def _pairs(places_E: Any, *numbers: Any) -> FloatArray:
    """float64 [3, E]: places in all logits of a part, and up to two numbers for each."""
    found = np.zeros((3, len(places_E)))
    found[0] = places_E
    for row, number in enumerate(numbers, 1):
        found[row] = number
    return found


def _mask(logits_RV: torch.Tensor, masks: Sequence[Any]) -> None:
    """Allow only the tokens whose bits are set, and none beyond a mask's end; any, where a row has no mask."""
    rows, vocabulary = logits_RV.shape
    words_RW = np.full((rows, -(-vocabulary // _WORD)), -1, np.int32)
    for row, mask in enumerate(masks):
        if mask is not None:
            words = np.asarray(mask)[: words_RW.shape[1]]
            words_RW[row], words_RW[row, : len(words)] = 0, words
    words_RW1 = to_device(words_RW, logits_RV.device)[:, :, None]
    forbidden_RV = ((words_RW1 >> torch.arange(_WORD, dtype=torch.int32, device=logits_RV.device)) & 1) == 0
    logits_RV.masked_fill_(forbidden_RV.view(rows, -1)[:, :vocabulary], -torch.inf)


def _hold_stops(logits_RV: torch.Tensor, places_E: torch.Tensor) -> None:
    """Forbid stop tokens, but in a row that has no other token left: there the grammar wants the text to end."""
    logits = logits_RV.view(-1)
    before_E = logits[places_E]
    logits.index_fill_(0, places_E, -torch.inf)
    others_R = logits_RV.amax(dim=-1) > -torch.inf
    logits.index_copy_(0, places_E, before_E.masked_fill_(others_R[places_E // logits_RV.shape[1]], -torch.inf))


def _add(logits: torch.Tensor, places_E: torch.Tensor, numbers_E: torch.Tensor) -> None:
    before_E = logits[places_E].double()
    logits.index_copy_(0, places_E, _within_range(before_E, before_E + numbers_E))


def _penalize(logits: torch.Tensor, places_E: torch.Tensor, factors_E: torch.Tensor, less_E: torch.Tensor) -> None:
    before_E = logits[places_E].double()
    repeated_E = torch.where(before_E > 0, before_E / factors_E, before_E * factors_E)
    logits.index_copy_(0, places_E, _within_range(before_E, repeated_E - less_E))


def _within_range(before_E: torch.Tensor, after_E: torch.Tensor) -> torch.Tensor:
    """Logits after a change, in fp32: the nearest within its range. Forbidden tokens stay forbidden."""
    return torch.where(before_E.isinf(), before_E, after_E.clamp(-_LARGEST, _LARGEST)).float()
