"""Which experts the next MoE layer will use, told from the hidden states that this one is given: no host synchronisation.

After the last layer comes the first, with the next token: a fitted estimator tells of that as well.

An estimator for each pair of neighbouring layers gives every token a logit for each of the next layer's experts, and from
calibrated logits follows how likely *some* token of the step will choose an expert: 1 - prod_t (1 - p_te). Two kinds:

    Fitted   the next layer's router applied here, and what a fit on text has added to it (``fit.py``)
    Naive    the router alone (Madan et al., arXiv 2603.19289), for a model that nobody has fitted; a token's logits are taken
             relative to its k-th

What the next layer's attention will bring in is not in a token's hidden state. Where that decides the routing (heads that
look at the previous token do, in early layers), an estimator is given the previous token's hidden state as well. Whose row
that is, a caller that mixes sequences can say (``follow``); else it is guessed from the numbers of rows. A wrong guess costs
a worse prediction, and never a wrong result.

Legend of shape suffixes: T tokens, E experts of the next layer, M hidden units, H hidden size.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch.nn import functional

from epslots.arrays import Float32Array
from epslots.errors import ConfigError
from epslots.prefetch.predictor_kernel import CERTAIN, FEW, MOST, NAIVE_STEP, usage_of
from epslots.prefetch.routers import Router

# Beyond so many choices for each expert, nearly all are used: what is usual tells as much as a look at each token.
SATURATED = 8
# The last rows of a step that are kept for the next one, which may continue any of them.
KEPT_ROWS = 512


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

    @property
    def few(self) -> Few | None:
        """The same for ``predictor_kernel``, of one on the CPU in float32; None where that has no such estimator."""
        ...


@dataclass(frozen=True)
class Few:
    """An estimator as ``predictor_kernel.usage_of`` takes it: views of its tensors, where these lie so."""

    first_DN: Float32Array
    bias_N: Float32Array
    second_ME: Float32Array
    top_k: int = 0
    nothing_TP = np.zeros((0, 0), np.float32)  # known of the previous token without history

    @classmethod
    def of(cls, first_ND: torch.Tensor, bias_N: torch.Tensor, second_ME: torch.Tensor, top_k: int = 0) -> Few:
        return cls(first_ND.t().contiguous().numpy(), bias_N.numpy(), second_ME.contiguous().numpy(), top_k)

    @property
    def rows(self) -> int:
        """How many rows are few."""
        return FEW // max(self.first_DN.size + self.second_ME.size, 1)


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
        return Fitted(_laid(first), bias, second, self.unlikely_E.to(device, torch.float32), self.history)

    @property
    def few(self) -> Few:
        return Few.of(self.first, self.first_bias, self.second)


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
        return (score_TE - least_T1) / (score_TE.std(-1, correction=0, keepdim=True) * NAIVE_STEP + 1e-9)

    def to(self, device: torch.device, dtype: torch.dtype) -> Naive:
        weight_EH, bias_E = (t.to(device, dtype) for t in (self.router.weight_EH, self.router.bias_E))
        return replace(self, router=replace(self.router, weight_EH=_laid(weight_EH), bias_E=bias_E))

    @property
    def few(self) -> Few | None:
        if self.router.correction_E is not None:
            return None
        weight_EH = self.router.weight_EH
        return Few.of(weight_EH, self.router.bias_E, weight_EH.new_empty(0, len(weight_EH)), self.top_k)


def _laid(matrix_ND: torch.Tensor) -> torch.Tensor:
    """On a CPU column by column in memory, as ``predictor_kernel`` reads it; torch takes either."""
    return matrix_ND.t().contiguous().t() if matrix_ND.device.type == "cpu" else matrix_ND


class _State(threading.local):
    """What a thread's steps leave for its next ones.

    Attributes:
        rows: of each layer with history, those of its latest step.
        follows: what ``Predictor.follow`` was told.
        asked: what ``Predictor.ids`` was given last, and the logits it found: ``usage`` need not find them again.
    """

    def __init__(self, layers: int) -> None:
        self.rows: list[torch.Tensor | None] = [None] * layers
        self.follows: torch.Tensor | None = None
        self.asked: tuple[torch.Tensor, torch.Tensor] | None = None


class Predictor:
    """Predictions for one model, layer by layer as it runs. Each thread that runs it has a history of its own.

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
        self._dtype = dtype_on(device, dtype)
        self.estimators = [None if e is None else e.to(device, self._dtype) for e in estimators]
        on_cpu = device.type == "cpu"
        self._few = [estimator.few if on_cpu and estimator is not None else None for estimator in self.estimators]
        self._experts = list(experts)
        self._state = _State(len(self.estimators))

    def predicts(self, layer: int) -> bool:
        """Whether anything is told of the layer after ``layer``."""
        return self.estimators[layer] is not None

    def follow(self, row_T: torch.Tensor | None) -> None:
        """Say which row precedes each row of this thread's steps to come, until the next call.

        Args:
            row_T: int64 on the device: 0 = none, a sequence begins; i > 0 = row i - 1 of the same step; -i = the i-th row from
                the end of the step before. None: guess, by ``guess_previous``.
        """
        self._state.follows = row_T

    def forget(self) -> None:
        """What comes next continues nothing."""
        self._state.rows = [None] * len(self.estimators)

    def usage(self, layer: int, hidden_TH: torch.Tensor, index_TK: torch.Tensor) -> torch.Tensor | None:
        """How likely any of these tokens will choose each expert of the layer after ``layer``. At most once a step.

        Args:
            hidden_TH: what the experts of ``layer`` are given.
            index_TK: int64, what they chose; only its shape is looked at.

        Returns:
            int32 [E], 0 to 255 in 256ths of certainty; always None for a layer of which nothing is told.
        """
        estimator = self.estimators[layer]
        if estimator is None:
            return None
        tokens, top_k = index_TK.shape
        asked, self._state.asked = self._state.asked, None
        experts = self._experts[(layer + self.lookahead) % len(self._experts)]
        if tokens * top_k > SATURATED * experts:
            self._keep(layer, estimator, hidden_TH)
            used_E = (estimator.unlikely_E * tokens).exp_().neg_().add_(1)
        elif asked is not None and asked[0] is hidden_TH:
            used_E = _used(asked[1])
        else:
            few = self._few[layer]
            if few is not None and tokens <= few.rows:
                return self._usage_of_few(layer, estimator, few, hidden_TH, experts)
            used_E = _used(self._logits(layer, estimator, hidden_TH))
        return used_E.mul_(CERTAIN).add_(0.5).clamp_(max=MOST).to(torch.int32)[:experts]

    def _usage_of_few(self, layer: int, estimator: Estimator, few: Few, hidden_TH: torch.Tensor, experts: int) -> torch.Tensor:
        rows = hidden_TH if hidden_TH.dtype == self._dtype else hidden_TH.to(self._dtype)
        rows_TH = np.ascontiguousarray(rows.numpy(force=True))
        before_TP = few.nothing_TP
        if estimator.history:
            before_TP = np.ascontiguousarray(self._previous(layer, torch.from_numpy(rows_TH)).numpy())
            self._keep(layer, estimator, torch.from_numpy(rows_TH))
        usage_E = np.empty(experts, np.int32)
        usage_of(rows_TH, before_TP, few.first_DN, few.bias_N, few.second_ME, few.top_k, usage_E)
        return torch.from_numpy(usage_E)

    def skip(self, layer: int, hidden_TH: torch.Tensor) -> None:
        """Take note of a step in which nothing is asked of a layer: the next step's rows may continue these."""
        estimator = self.estimators[layer]
        if estimator is not None:
            self._keep(layer, estimator, hidden_TH)

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
        self._state.asked = hidden_TH, logits_TE
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
            self._state.rows[layer] = hidden_TH[-KEPT_ROWS:].detach().to(self._dtype, copy=True)

    def _previous(self, layer: int, rows_TH: torch.Tensor) -> torch.Tensor:
        """The hidden state of the token before each token, [T, H]; zeros where there is none, or it isn't known."""
        last_SH, row_T = self._state.rows[layer], self._state.follows
        if last_SH is None:
            last_SH = rows_TH[:0]
        if row_T is not None and len(row_T) == len(rows_TH):
            known_T = row_T.masked_fill(row_T < -len(last_SH), 0)  # but for rows that weren't kept
            return torch.cat([rows_TH.new_zeros(1, rows_TH.shape[1]), rows_TH, last_SH])[known_T]
        return guess_previous(last_SH, rows_TH)


def dtype_on(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """What estimators are kept in for a model of ``dtype``. On a CPU, products of a few rows are faster in float32."""
    return torch.float32 if device.type == "cpu" else dtype


def _used(logits_TE: torch.Tensor) -> torch.Tensor:
    """How likely any of the tokens chooses each expert, float32 [E]."""
    if len(logits_TE) == 1:
        return logits_TE[0].float().sigmoid()
    return functional.softplus(logits_TE.float()).sum(0).neg_().exp_().neg_().add_(1)


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
