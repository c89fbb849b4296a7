"""The token that follows each sequence of a batch: the likeliest, or drawn by its request's ``Sampling``.

    choose            edits logits (logit_edits.py), takes the likeliest token or draws one, and finds log-probabilities
    prompt_logprobs   of the tokens that are given (logprobs.py)

Suffixes: N sequences; R of them in a part; V tokens of the vocabulary; K of them, the likeliest first; P tokens of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch

from epslots.arrays import FloatArray
from epslots.device_copy import to_device
from epslots.generation.logit_edits import edit_logits, edits_logits
from epslots.generation.logprobs import read_scores, score
from epslots.generation.requests import TokenLogprobs
from epslots.generation.sampling import Sampling, uniform_numbers
from epslots.generation.tracked_request import NO_TOKEN, NextToken, TrackedRequest

# Choosing takes up to 50 bytes for each logit, so 200 MB for this many at a time; a single row may take more.
PART_LOGITS = 2**22
# Likeliest tokens among which a nucleus is looked for: nearly all are within, and a bound from the logits would have to be
# waited for.
NUCLEUS_RANKS = 1024
_TOO_WIDE = -2  # in the place of a token: its nucleus isn't within

T = TypeVar("T")

_TINIEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


@dataclass(frozen=True, eq=False)
class Chosen:
    """The next tokens of a batch, on the device.

    Attributes:
        tokens_N: int64 [N]; -1 = none.
        tops: for each row whose request asked for log-probabilities, the number of likeliest tokens.
        scores: of these rows, in parts, as ``logprobs.score`` returns them.
        exactly: chooses once more, for the case that a nucleus was too wide.
    """

    tokens_N: torch.Tensor
    tops: dict[int, int]
    scores: list[torch.Tensor]
    exactly: Callable[[], Chosen]

    def read(self) -> list[NextToken]:
        """Copy the choices to the host, all at once: the one time that the host waits for them."""
        if not self.tops:
            tokens = self.tokens_N.tolist()
            return self.exactly().read() if _TOO_WIDE in tokens else [NextToken(token) for token in tokens]
        # float64 holds tokens exactly.
        numbers = torch.cat([self.tokens_N.double(), *(part.flatten() for part in self.scores)]).cpu().numpy()
        count = len(self.tokens_N)
        if (numbers[:count] == _TOO_WIDE).any():
            return self.exactly().read()
        choices = [NextToken(int(token)) for token in numbers[:count]]
        rows = numbers[count:].reshape(len(self.tops), -1).tolist()
        for (row, top), scores in zip(self.tops.items(), rows, strict=True):
            token = choices[row].token
            choices[row] = NextToken(token, read_scores(token, scores, top))
        return choices


@torch.no_grad()
def choose(logits_NV: torch.Tensor, rows: Sequence[TrackedRequest | None], *, nucleus_ranks: int = NUCLEUS_RANKS) -> Chosen:
    """The token that follows each row of logits: the one place where tokens are chosen.

    A row's token depends only on its logits, its request and the request's tokens, not on the other rows. A row has none if
    one of its logits is NaN, or the largest is infinite, or its grammar allows no token.

    Args:
        logits_NV: fp32 [N, V], of the last token of N sequences. They stay as they are.
        rows: their requests; None = no request any more: the likeliest token, and nothing else.
        nucleus_ranks: likeliest tokens among which nuclei are looked for first. No choice depends on it.
    """
    vocabulary = logits_NV.shape[1]
    most_N, tokens_N = logits_NV.max(dim=-1)  # NaN if any logit is
    entries = [(row, entry) for row, entry in enumerate(rows) if entry is not None]
    drawing = [(row, entry) for row, entry in entries if entry.request.sampling.temperature > 0]
    greedy = [(row, entry) for row, entry in entries if entry.request.sampling.temperature == 0 and edits_logits(entry)]
    for part in _parts(greedy, vocabulary):
        rows_R = to_device(np.array([row for row, _ in part]), logits_NV.device)
        logits_RV = logits_NV[rows_R]
        edit_logits(logits_RV, [entry for _, entry in part])
        tokens_N.index_copy_(0, rows_R, _likeliest(logits_RV))
    for part in _parts(drawing, vocabulary):
        settings_6R = to_device(_draw_settings(part, vocabulary), logits_NV.device)
        rows_R = settings_6R[0].long()
        logits_RV = logits_NV[rows_R]
        edit_logits(logits_RV, [entry for _, entry in part])
        filters = _Filters.of([entry.request.sampling for _, entry in part], vocabulary, nucleus_ranks)
        tokens_N.index_copy_(0, rows_R, _draw(logits_RV, settings_6R[1:, :, None], filters))
    tokens_N.masked_fill_(~most_N.isfinite(), NO_TOKEN)
    tops = {row: min(top, vocabulary) for row, entry in entries if (top := entry.request.logprobs) is not None}
    again = partial(choose, logits_NV, rows, nucleus_ranks=vocabulary)
    return Chosen(tokens_N, tops, _scores(logits_NV, tokens_N, tops), again)


def _scores(logits_NV: torch.Tensor, tokens_N: torch.Tensor, tops: Mapping[int, int]) -> list[torch.Tensor]:
    """The log-probabilities of some rows' tokens, in parts; ``tops`` has the number of likeliest ones for each row."""
    found = []
    for part in _parts(list(tops), logits_NV.shape[1]):
        rows_R = to_device(np.array(part), logits_NV.device)
        found.append(score(logits_NV[rows_R], tokens_N[rows_R].clamp_(min=0), max(tops.values())))
    return found


@torch.no_grad()
def prompt_logprobs(logits_PV: torch.Tensor, tokens: Sequence[int], top: int) -> tuple[TokenLogprobs, ...]:
    """Log-probabilities of tokens that are given, and of the likeliest ones at their places. Waits for the device.

    Args:
        logits_PV: fp32 [P, V], of the token before each of them.
        tokens: P tokens of a prompt.
        top: likeliest tokens to return for each.
    """
    found: list[TokenLogprobs] = []
    vocabulary = logits_PV.shape[1]
    top = min(top, vocabulary)
    for part in _parts(tokens, vocabulary):
        tokens_R = to_device(np.array(part, np.int64), logits_PV.device)
        scores = score(logits_PV[len(found) : len(found) + len(part)], tokens_R, top).tolist()
        found += [read_scores(token, numbers, top) for token, numbers in zip(part, scores, strict=True)]
    return tuple(found)


def _parts(items: Sequence[T], vocabulary: int) -> Iterator[Sequence[T]]:
    """Items of one row each, in parts of at most ``PART_LOGITS`` logits, or of one row."""
    size = max(1, PART_LOGITS // vocabulary)
    return (items[start : start + size] for start in range(0, len(items), size))


def _likeliest(logits_RV: torch.Tensor) -> torch.Tensor:
    """The likeliest token of each row, int64 [R]; -1 if none is allowed."""
    most_R, tokens_R = logits_RV.max(dim=-1)
    return tokens_R.masked_fill_(most_R == -torch.inf, NO_TOKEN)


def _draw_settings(part: Sequence[tuple[int, TrackedRequest]], vocabulary: int) -> FloatArray:
    """For each row that draws, its number, temperature, random number, top_k, top_p and min_p: float64 [6, R].

    float64 holds all of them exactly, so that one copy carries them.
    """
    samplings = [entry.request.sampling for _, entry in part]
    return np.array(
        [
            [row for row, _ in part],
            [min(max(sampling.temperature, _TINIEST), _LARGEST) for sampling in samplings],
            uniform_numbers([sampling.seed for sampling in samplings], [entry.length for _, entry in part]),
            [_kept(sampling, vocabulary) for sampling in samplings],
            [sampling.top_p for sampling in samplings],
            [sampling.min_p for sampling in samplings],
        ]
    )


def _kept(sampling: Sampling, vocabulary: int) -> int:
    """The likeliest tokens that ``top_k`` keeps; the vocabulary where there is none."""
    return min(sampling.top_k or vocabulary, vocabulary)


@dataclass(frozen=True)
class _Filters:
    """The size of the filters of some rows, known to the host."""

    ranks: int
    """The largest ``top_k``; 0 without any."""
    nucleus_ranks: int
    """Tokens that are sorted for rows that have only a ``top_p``, which may keep more; 0 without any."""
    min_p: bool
    """Whether a row has one."""

    @classmethod
    def of(cls, samplings: Sequence[Sampling], vocabulary: int, nucleus_ranks: int) -> _Filters:
        kept = [_kept(sampling, vocabulary) for sampling in samplings]
        nucleus = any(k == vocabulary and sampling.top_p < 1 for k, sampling in zip(kept, samplings, strict=True))
        return cls(
            ranks=max((k for k in kept if k < vocabulary), default=0),
            nucleus_ranks=min(nucleus_ranks, vocabulary) if nucleus else 0,
            min_p=any(sampling.min_p for sampling in samplings),
        )


def _draw(logits_RV: torch.Tensor, settings_5R1: torch.Tensor, filters: _Filters) -> torch.Tensor:
    """A token of each row, int64 [R], by inverse transform sampling. -1 if none is allowed, -2 if its nucleus is too wide.

    The tokens share an interval in the order of their ids, each in proportion to its probability; the random number picks one.
    The logits of a sequence differ in their last bits with the shape of its batch. In this order that moves the borders by as
    little, and hardly ever a border past the number. In the order of probabilities, two tokens about as likely would change
    places, and the number would pick the other one.
    """
    temperature_R1, number_R1, top_k_R1, top_p_R1, min_p_R1 = settings_5R1
    most_R1 = logits_RV.amax(dim=-1, keepdim=True)
    # The likeliest token weighs 1 at any temperature.
    weights_RV = (logits_RV - most_R1).div_(temperature_R1.float()).exp_()
    if filters.min_p:
        weights_RV.masked_fill_(weights_RV < min_p_R1, 0)
    wide_R1 = torch.zeros_like(most_R1, dtype=torch.bool)
    if filters.ranks or filters.nucleus_ranks:
        floor_R1, wide_R1 = _floor(logits_RV, weights_RV, top_k_R1.long(), top_p_R1, filters)
        weights_RV.masked_fill_(logits_RV < floor_R1, 0)
    # In float32 the tokens at the end of a large vocabulary would get a rounded share.
    ends_RV = weights_RV.cumsum(dim=-1, dtype=torch.float64)
    # A parallel scan rounds each sum in another way: tokens of no weight could seem to have an interval.
    ends_RV.masked_fill_(weights_RV == 0, -1)
    # Below the last end: a float64 times at most 1 - 2**-53 is never rounded up to itself.
    point_R1 = number_R1 * ends_RV.amax(dim=-1, keepdim=True)
    drawn_R = (ends_RV > point_R1).byte().argmax(dim=-1)  # the first; if logits are NaN, any
    return drawn_R.masked_fill_(wide_R1[:, 0], _TOO_WIDE).masked_fill_(most_R1[:, 0] == -torch.inf, NO_TOKEN)


def _floor(
    logits_RV: torch.Tensor, weights_RV: torch.Tensor, top_k_R1: torch.Tensor, top_p_R1: torch.Tensor, filters: _Filters
) -> tuple[torch.Tensor, torch.Tensor]:
    """The logit that a token needs to be kept, [R, 1]. Also whether that is lower than can be told, bool [R, 1].

    Tokens that ``min_p`` dropped weigh nothing.

    ``top_k`` keeps the tokens at least as likely as the k-th. Of these ``top_p`` keeps each token before which the likelier
    ones hold less than ``top_p``, so always the likeliest. Equally likely tokens are kept or dropped together, independent of
    a sort's order.
    """
    vocabulary = logits_RV.shape[1]
    ranks = max(filters.ranks, filters.nucleus_ranks)
    top_RK, ids_RK = logits_RV.topk(ranks, dim=-1)
    floor_R1 = top_RK.gather(1, top_k_R1.clamp(max=ranks) - 1).masked_fill_(top_k_R1 == vocabulary, -torch.inf)
    weights_RK = weights_RV.gather(1, ids_RK).double()
    likelier_RK = weights_RK.cumsum(dim=-1) - weights_RK
    total_R1 = weights_RV.masked_fill(logits_RV < floor_R1, 0).sum(dim=-1, keepdim=True, dtype=torch.float64)
    count_R1 = (likelier_RK < top_p_R1 * total_R1).sum(dim=-1, keepdim=True).clamp_(min=1)  # 0 if logits are NaN
    nucleus_R1 = top_RK.gather(1, count_R1 - 1).masked_fill_(top_p_R1 == 1, -torch.inf)
    wide_R1 = (count_R1 == ranks) & (top_k_R1 == vocabulary) & (top_p_R1 < 1)
    return torch.maximum(floor_R1, nucleus_R1), wide_R1 if ranks < vocabulary else torch.zeros_like(wide_R1)
