"""Which experts the next MoE layer will use, told from the hidden states that this one is given: no host synchronisation.

After the last layer comes the first, with the next token: a fitted estimator tells of that as well.

An estimator for each pair of neighbouring layers gives every token a logit for each of the next layer's experts, and from
calibrated logits follows how likely *some* token of the step will choose an expert: 1 - prod_t (1 - p_te). Two kinds:

    Fitted   the next layer's router applied here, and what a fit on text has added to it (``predictor_fit.py``)
    Naive    the router alone (Madan et al., arXiv 2603.19289), for a model that nobody has fitted; a token's logits are taken
             relative to its k-th

What the next layer's attention will bring in is not in a token's hidden state. Where that decides the routing (heads that
look at the previous token do, in early layers), an estimator is given the previous token's hidden state as well. Whose row
that is, a caller that mixes sequences can say (``follow``); else it is guessed from the numbers of rows. A wrong guess costs
a worse prediction, and never a wrong result.

Legend of shape suffixes: T tokens, E experts of the next layer, M hidden units, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional

from epslots.errors import ConfigError
from epslots.routers import Router

# Usage is in so many parts of certainty.
CERTAIN = 256
# Beyond so many choices for each expert, nearly all are used: what is usual tells as much as a look at each token.
SATURATED = 8
# The last rows of a step that are kept for the next one, which may continue any of them.
_KEPT_ROWS = 512
# A naive logit falls by one where a score falls by this part of the scores' deviation over the experts.
_NAIVE_STEP = 0.25


class Estimator(Protocol):
    """Tells of one layer's tokens what they will choose in the next layer."""

    @property
    def history(self) -> bool:
        """Whether rows are [hidden state, the previous token's hidden state]."""
        ...

    @property
    def unlikely_E(self) -> torch.Tensor:
        """log(1 - the share of tokens that choose each expert), float32: what is usual."""
        ...

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """Float [T, E] of rows [T, H], or [T, 2 H] with history."""
        ...

    def to(self, device: torch.device, dtype: torch.dtype) -> Estimator:
        """The same elsewhere."""
        ...


@dataclass(frozen=True)
class Fitted:
    """A linear map plus a small network of one hidden layer, both from one matrix product.

    Attributes:
        first: [M + E, H or 2 H], rows of the network's first layer, then those of the linear map.
        first_bias: [M + E].
        second: [M, E]; M = 0 where the linear map is all.
    """

    first: torch.Tensor
    first_bias: torch.Tensor
    second: torch.Tensor
    unlikely_E: torch.Tensor
    history: bool = False

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        both = functional.linear(rows, self.first, self.first_bias)
        hidden = len(self.second)
        if not hidden:
            return both
        return torch.addmm(both[:, hidden:], functional.silu(both[:, :hidden]), self.second)

    def to(self, device: torch.device, dtype: torch.dtype) -> Fitted:
        first, bias, second = (t.to(device, dtype) for t in (self.first, self.first_bias, self.second))
        return Fitted(first, bias, second, self.unlikely_E.to(device, torch.float32), self.history)


@dataclass(frozen=True)
class Naive:
    """The next layer's router, which was made for hidden states of that layer.

    Attributes:
        top_k: experts that a token chooses there.
    """

    router: Router
    top_k: int
    history: bool = False

    @property
    def unlikely_E(self) -> torch.Tensor:
        """Without a look at text all experts are alike."""
        experts = len(self.router.weight_EH)
        return torch.log1p(torch.full((experts,), -self.top_k / experts, device=self.router.weight_EH.device))

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        score_TE = self.router.logits(rows)
        if self.router.correction_E is not None:
            score_TE = self.router.scores(rows).clamp(min=-1)  # what a group can't have is as low as can be
        least_T1 = score_TE.topk(self.top_k, -1).values[:, -1:]
        return (score_TE - least_T1) / (score_TE.std(-1, correction=0, keepdim=True) * _NAIVE_STEP + 1e-9)

    def to(self, device: torch.device, dtype: torch.dtype) -> Naive:
        return self


class Predictor:
    """Predictions for one model, layer by layer as it runs.

    Args:
        estimators: for each MoE layer in order, what tells of the layer after it (of the last: of the first one in the next
            step); None where nothing does.
        experts: number of experts with weights of each layer; estimators may know of identity experts behind these.
        device, dtype: of the hidden states that are given.

    Attributes:
        lookahead: how many layers ahead predictions are.
        estimators: as given, on the device.
    """

    lookahead = 1

    def __init__(
        self, estimators: Sequence[Estimator | None], experts: Sequence[int], device: torch.device, dtype: torch.dtype
    ) -> None:
        # On a CPU, products of a few rows are faster in float32 than in a shorter type.
        self._dtype = torch.float32 if device.type == "cpu" else dtype
        self.estimators = [None if e is None else e.to(device, self._dtype) for e in estimators]
        self._experts = list(experts)
        self._follows: torch.Tensor | None = None
        # Of each layer with history: the rows of its latest step.
        self._rows: list[torch.Tensor | None] = [None] * len(self.estimators)
        # What ``ids`` was given last, and the logits it found: ``usage`` need not find them again.
        self._asked: tuple[torch.Tensor, torch.Tensor] | None = None

    def predicts(self, layer: int) -> bool:
        """Whether anything is told of the layer after ``layer``."""
        return self.estimators[layer] is not None

    def follow(self, row_T: torch.Tensor | None) -> None:
        """Say which row precedes each row of the steps to come, until the next call.

        Args:
            row_T: int64 on the device: 0 = none, a sequence begins; i > 0 = row i - 1 of the same step; -i = the i-th row from
                the end of the step before. None: guess, by ``guess_previous``.
        """
        self._follows = row_T

    def forget(self) -> None:
        """What comes next continues nothing."""
        self._rows = [None] * len(self._rows)

    def usage(self, layer: int, hidden_TH: torch.Tensor, index_TK: torch.Tensor) -> torch.Tensor | None:
        """How likely any of these tokens will choose each expert of the layer after ``layer``. At most once a step.

        Args:
            hidden_TH: what the experts of ``layer`` are given.
            index_TK: int64, what they chose; only its shape is looked at.

        Returns:
            int32 [E], 0 to 256 = certain; always None for a layer of which nothing is told.
        """
        estimator = self.estimators[layer]
        if estimator is None:
            return None
        tokens, top_k = index_TK.shape
        asked, self._asked = self._asked, None
        experts = self._experts[(layer + self.lookahead) % len(self._experts)]
        if tokens * top_k > SATURATED * experts:
            self._keep(layer, estimator, hidden_TH)
            used_E = (estimator.unlikely_E * tokens).exp_().neg_().add_(1)
        else:
            known = asked is not None and asked[0] is hidden_TH
            logits_TE = asked[1] if asked is not None and known else self._logits(layer, estimator, hidden_TH)
            if tokens == 1:
                used_E = logits_TE[0].float().sigmoid()
            else:
                used_E = functional.softplus(logits_TE.float()).sum(0).neg_().exp_().neg_().add_(1)
        return used_E.mul_(CERTAIN).add_(0.5).to(torch.int32)[:experts]

    def ids(self, layer: int, hidden_TH: torch.Tensor, k: int) -> torch.Tensor:
        """The experts that each token will most likely choose in the layer after ``layer``, likeliest first: int64 [T, k].

        At most once a step, and before ``usage``, which then costs little.

        Raises:
            ConfigError: nothing is told of that layer.
        """
        estimator = self.estimators[layer]
        if estimator is None:
            raise ConfigError(f"no estimator tells of the layer after MoE layer {layer}; fit one with `epslots predict fit`")
        logits_TE = self._logits(layer, estimator, hidden_TH)
        self._asked = hidden_TH, logits_TE
        return logits_TE.topk(k, -1).indices

    def _logits(self, layer: int, estimator: Estimator, hidden_TH: torch.Tensor) -> torch.Tensor:
        """[T, E]; these rows are then those that the next step's follow."""
        rows = hidden_TH.to(self._dtype)
        if estimator.history:
            rows = torch.cat([rows, self._previous(layer, rows)], 1)
            self._keep(layer, estimator, hidden_TH)
        return estimator.logits(rows)

    def _keep(self, layer: int, estimator: Estimator, hidden_TH: torch.Tensor) -> None:
        if estimator.history and len(hidden_TH):
            self._rows[layer] = hidden_TH[-_KEPT_ROWS:].detach().to(self._dtype, copy=True)

    def _previous(self, layer: int, rows_TH: torch.Tensor) -> torch.Tensor:
        """The hidden state of the token before each token, [T, H]; zeros where there is none, or it isn't known."""
        last_SH = self._rows[layer]
        if last_SH is None:
            last_SH = rows_TH[:0]
        if self._follows is not None and len(self._follows) == len(rows_TH):
            return torch.cat([rows_TH.new_zeros(1, rows_TH.shape[1]), rows_TH, last_SH])[self._follows]
        return guess_previous(last_SH, rows_TH)


def guess_previous(last_SH: torch.Tensor, rows_TH: torch.Tensor) -> torch.Tensor:
    """What preceded each row, from the numbers of rows alone.

    As many rows as in the step before, or a whole fraction of them: each sequence goes on by a token, behind its last row.
    More rows: a sequence that begins, each row behind the one before. Else nobody can tell: zeros.
    """
    before, now = len(last_SH), len(rows_TH)
    if before == now:
        return last_SH
    if now and before >= now and before % now == 0:
        return last_SH[before // now - 1 :: before // now]
    if now > before:
        return functional.pad(rows_TH[:-1], (0, 0, 1, 0))
    return torch.zeros_like(rows_TH)
