"""The token that follows each sequence of a batch: the likeliest, or drawn by its request's ``Sampling``.

Suffixes: N sequences; R of them that draw; V tokens of the vocabulary; K of them, the likeliest first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from epslots.device_copy import to_device
from epslots.generation.sampling import Sampling, uniform_numbers

# Drawing takes up to 50 bytes for each logit, so 200 MB for this many at a time; a single row may take more.
PART_LOGITS = 2**22

NO_TOKEN = -1

_TINIEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


def next_tokens(logits_NV: torch.Tensor, samplings: Sequence[Sampling], positions: Sequence[int]) -> torch.Tensor:
    """The token that follows each row of logits, int64 [N]; -1 = none. The one place where tokens are chosen.

    A row's token doesn't depend on the other rows. A row has none if one of its logits is NaN, or the largest is infinite.

    Args:
        logits_NV: fp32 [N, V], of the last token of N sequences.
        samplings: how each row's token is chosen.
        positions: index of each new token in its whole sequence, the prompt included.
    """
    max_N, chosen_N = logits_NV.max(dim=-1)  # NaN if any logit is
    finite_N = max_N.isfinite()
    drawing = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0]
    if not drawing:
        return chosen_N.masked_fill_(~finite_N, NO_TOKEN)
    vocabulary = logits_NV.shape[1]
    drawn = [samplings[row] for row in drawing]
    numbers = uniform_numbers([sampling.seed for sampling in drawn], [positions[row] for row in drawing])
    top_k = [min(sampling.top_k or vocabulary, vocabulary) for sampling in drawn]
    top_p = [sampling.top_p for sampling in drawn]
    temperature = [min(max(sampling.temperature, _TINIEST), _LARGEST) for sampling in drawn]
    # float64 holds all settings exactly, and one copy carries them.
    settings_5R = to_device(np.array([drawing, temperature, numbers, top_k, top_p]), logits_NV.device)
    filters = _Filters.of(top_k, top_p, vocabulary)
    for part_5R in settings_5R.split(max(1, PART_LOGITS // vocabulary), dim=1):
        rows_R = part_5R[0].long()
        chosen_N.index_copy_(0, rows_R, _draw(logits_NV[rows_R], part_5R[1:, :, None], filters))
    return chosen_N.masked_fill_(~finite_N, NO_TOKEN)


@dataclass(frozen=True)
class _Filters:
    """The size of the filters of all rows, known to the host."""

    ranks: int
    """The largest ``top_k``; 0 without any."""
    nucleus: bool
    """Whether a row has only a ``top_p``: the number of tokens that it keeps depends on the logits."""

    @classmethod
    def of(cls, top_k: Sequence[int], top_p: Sequence[float], vocabulary: int) -> _Filters:
        """The filters of these rows; ``top_k`` is the vocabulary where there is none."""
        nucleus = any(k == vocabulary and p < 1 for k, p in zip(top_k, top_p, strict=True))
        return cls(max((k for k in top_k if k < vocabulary), default=0), nucleus)


def _draw(logits_RV: torch.Tensor, settings_4R1: torch.Tensor, filters: _Filters) -> torch.Tensor:
    """A token of each row, int64 [R], by inverse transform sampling.

    The tokens share an interval in the order of their ids, each in proportion to its probability; the random number picks one.
    The logits of a sequence differ in their last bits with the shape of its batch. In this order that moves the borders by as
    little, and hardly ever a border past the number. In the order of probabilities, two tokens about as likely would change
    places, and the number would pick the other one.
    """
    temperature_R1, number_R1, top_k_R1, top_p_R1 = settings_4R1
    # The likeliest token weighs 1 at any temperature.
    weights_RV = (logits_RV - logits_RV.amax(dim=-1, keepdim=True)).div_(temperature_R1.float()).exp_()
    if filters.ranks or filters.nucleus:
        floor_R1 = _floor(logits_RV, weights_RV, top_k_R1.long(), top_p_R1, filters)
        weights_RV.masked_fill_(logits_RV < floor_R1, 0)
    # In float32 the tokens at the end of a large vocabulary would get a rounded share.
    ends_RV = weights_RV.cumsum(dim=-1, dtype=torch.float64)
    # A parallel scan rounds each sum in another way: tokens of no weight could seem to have an interval.
    ends_RV.masked_fill_(weights_RV == 0, -1)
    # Below the last end: a float64 times at most 1 - 2**-53 is never rounded up to itself.
    point_R1 = number_R1 * ends_RV.amax(dim=-1, keepdim=True)
    return (ends_RV > point_R1).byte().argmax(dim=-1)  # the first; if logits are NaN, any


def _floor(
    logits_RV: torch.Tensor, weights_RV: torch.Tensor, top_k_R1: torch.Tensor, top_p_R1: torch.Tensor, filters: _Filters
) -> torch.Tensor:
    """The logit that a token needs to be kept, [R, 1].

    ``top_k`` keeps the tokens at least as likely as the k-th. Of these ``top_p`` keeps each token before which the likelier
    ones hold less than ``top_p``, so always the likeliest. Equally likely tokens are kept or dropped together, independent of
    a sort's order.
    """
    vocabulary = logits_RV.shape[1]
    ranks = filters.ranks
    if filters.nucleus:
        ranks = max(ranks, _most_in_a_nucleus(weights_RV, top_p_R1.masked_fill(top_k_R1 < vocabulary, 1)))
    top_RK, ids_RK = logits_RV.topk(ranks, dim=-1)
    floor_R1 = top_RK.gather(1, top_k_R1.clamp(max=ranks) - 1).masked_fill_(top_k_R1 == vocabulary, -torch.inf)
    weights_RK = weights_RV.gather(1, ids_RK).double()
    likelier_RK = weights_RK.cumsum(dim=-1) - weights_RK
    total_R1 = weights_RV.masked_fill(logits_RV < floor_R1, 0).sum(dim=-1, keepdim=True, dtype=torch.float64)
    count_R1 = (likelier_RK < top_p_R1 * total_R1).sum(dim=-1, keepdim=True).clamp_(min=1)  # 0 if logits are NaN
    nucleus_R1 = top_RK.gather(1, count_R1 - 1).masked_fill_(top_p_R1 == 1, -torch.inf)
    return torch.maximum(floor_R1, nucleus_R1)


def _most_in_a_nucleus(weights_RV: torch.Tensor, top_p_R1: torch.Tensor) -> int:
    """An upper bound on the tokens that ``top_p`` keeps of any row; rows with ``top_p`` 1 don't count.

    Sorting some thousand tokens is worth the wait for the device: sorting a vocabulary takes ten times as long. Tokens that
    weigh less than 1 - top_p shared by all of the vocabulary are less than 1 - top_p together, so none of them is kept.
    """
    total_R1 = weights_RV.sum(dim=-1, keepdim=True)
    least_R1 = ((1 - top_p_R1) * total_R1 / weights_RV.shape[1]).masked_fill_(top_p_R1 == 1, torch.inf)
    return max(1, int((weights_RV >= least_R1).sum(dim=-1).max()))
