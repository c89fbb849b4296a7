"""Log-probabilities of tokens, in nats, from the model's own logits: log_softmax in fp32.

Suffixes: R rows; V tokens of the vocabulary; K of them, the likeliest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from epslots.generation.requests import TokenLogprobs

_LOW_32_BITS = 2**32 - 1


def score(logits_RV: torch.Tensor, tokens_R: torch.Tensor, top: int) -> torch.Tensor:
    """The log-probability of a token of each row, and of the likeliest ones.

    Takes up to 50 bytes for each logit.

    Args:
        logits_RV: fp32 [R, V].
        tokens_R: int64 [R].
        top: K, up to V.

    Returns:
        float64 [R, 1 + 2 * K], for ``read_scores``: that of the token; the K likeliest tokens; theirs.
    """
    most_R1 = logits_RV.amax(dim=-1, keepdim=True)
    log_total_R1 = (logits_RV - most_R1).exp_().sum(dim=-1, keepdim=True).log_()
    ids_RK = _likeliest(logits_RV, top)
    ids = torch.cat([tokens_R[:, None], ids_RK], dim=1)
    logprobs = (logits_RV.gather(1, ids) - most_R1) - log_total_R1
    return torch.cat([logprobs[:, :1].double(), ids_RK.double(), logprobs[:, 1:].double()], dim=1)


def _likeliest(logits_RV: torch.Tensor, top: int) -> torch.Tensor:
    """The ids of the likeliest tokens, int64 [R, top], likeliest first; of equally likely ones, the lower id first.

    ``topk`` takes any of several equal numbers. Here none are equal: 32 bits in the order of the logits, then 32 of the id.
    """
    last = logits_RV.shape[1] - 1
    bits_RV = (logits_RV + 0.0).view(torch.int32)  # the sum turns -0.0 into 0.0
    order_RV = bits_RV ^ ((bits_RV >> 31) & 0x7FFFFFFF)  # negative floats are in the reverse order of their bits
    keys_RV = (order_RV.long() << 32) + (last - torch.arange(last + 1, device=logits_RV.device))
    return last - (keys_RV.topk(top, dim=-1).values & _LOW_32_BITS)


def read_scores(token: int, scores: Sequence[float], top: int) -> TokenLogprobs:
    """One row of ``score`` as ``TokenLogprobs``.

    Args:
        token: the row's.
        scores: its numbers, on the host.
        top: likeliest tokens to return, up to K.
    """
    most = len(scores) // 2
    ids, logprobs = scores[1 : 1 + most], scores[1 + most :]
    return TokenLogprobs(token, scores[0], tuple((int(t), p) for t, p in zip(ids[:top], logprobs[:top], strict=True)))
