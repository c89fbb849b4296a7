"""Predicts which experts the next MoE layer will use, from the hidden states given to this one. No host synchronisation.

An *estimator* per pair of neighbouring layers gives each token a logit for each of the next layer's experts. Calibrated logits
yield the probability that *some* token of the step chooses an expert: 1 - prod_t (1 - p_te). Two kinds:
    FittedEstimator   a linear map and a small network, fitted on text (``fit.py``); the last layer's predicts the first layer
    RouterEstimator   the next layer's router applied to this layer's input (Madan et al., arXiv 2603.19289), without a fit
Attention that looks at the previous token isn't in a token's hidden state. Where it decides the routing (early layers), an
estimator is given the previous token's hidden state as well. A caller that mixes sequences says which row that is
(``set_previous_rows``); else it is guessed from the numbers of rows. A wrong guess worsens a prediction, never a result.

Legend of shape suffixes: T tokens, E experts of the next layer, M hidden units, H hidden size, S rows of the step before.
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
from epslots.prefetch.predictor_kernel import KERNEL_MULTIPLICATIONS, predict_usage
from epslots.prefetch.routers import LinearRouter
from epslots.prefetch.usage import quantised, usage_kernel_for

# Choices of a step per expert from which on nearly all experts are used: their usual shares then predict as well as tokens do.
SATURATING_CHOICES = 8
# The last rows of a step that are kept for the next step, which may continue any of them.
HISTORY_ROWS = 512


class Estimator(Protocol):
    """Predicts from one layer's tokens what they will choose in the next layer."""

    @property
    def history(self) -> bool:
        """Whether rows are [hidden state, the previous token's hidden state]."""
        ...

    @property
    def unlikely_E(self) -> torch.Tensor:
        """log(1 - the share of tokens that choose each expert), float32."""
        ...

    @property
    def top_k(self) -> int:
        """K where scores are a router's, and logits are relative to a token's k-th; 0 where they are logits."""
        ...

    def scores(self, rows: torch.Tensor) -> torch.Tensor:
        """Float [T, E] of rows [T, H], or [T, 2 H] with history."""
        ...

    def to(self, device: torch.device, dtype: torch.dtype) -> Estimator:
        """The same estimator on a device, in a dtype."""
        ...

    @property
    def kernel_weights(self) -> KernelWeights | None:
        """Weights for ``predict_usage`` of an estimator on the CPU in float32; None where the kernel can't compute it."""
        ...


@dataclass(frozen=True)
class KernelWeights:
    """An estimator's weights as ``predictor_kernel.predict_usage`` takes them: views of its tensors where possible.

    Attributes:
        first_DN: [inputs, M + E], columns of the hidden units, then those of the linear map.
        bias_N: [M + E].
        second_ME: [M, E].
        top_k: K where the outputs are a router's scores; 0 where they are logits.
        no_history_TP: [0, 0], for estimators without history.
    """

    first_DN: Float32Array
    bias_N: Float32Array
    second_ME: Float32Array
    top_k: int = 0
    no_history_TP = np.zeros((0, 0), np.float32)

    @classmethod
    def of(cls, first_ND: torch.Tensor, bias_N: torch.Tensor, second_ME: torch.Tensor, top_k: int = 0) -> KernelWeights:
        return cls(first_ND.t().contiguous().numpy(), bias_N.numpy(), second_ME.contiguous().numpy(), top_k)

    @property
    def most_rows(self) -> int:
        """Up to how many rows the kernel is faster than torch."""
        return KERNEL_MULTIPLICATIONS // max(self.first_DN.size + self.second_ME.size, 1)


@dataclass(frozen=True)
class FittedEstimator:
    """A linear map plus a network of one hidden layer, by one matrix product.

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
    top_k = 0

    def scores(self, rows: torch.Tensor) -> torch.Tensor:
        both = functional.linear(rows, self.first, self.first_bias)
        hidden = len(self.second)
        if not hidden:
            return both
        return torch.addmm(both[:, hidden:], functional.silu(both[:, :hidden]), self.second)

    def to(self, device: torch.device, dtype: torch.dtype) -> FittedEstimator:
        first, bias, second = (t.to(device, dtype) for t in (self.first, self.first_bias, self.second))
        return FittedEstimator(_column_major(first), bias, second, self.unlikely_E.to(device, torch.float32), self.history)

    @property
    def kernel_weights(self) -> KernelWeights:
        return KernelWeights.of(self.first, self.first_bias, self.second)


@dataclass(frozen=True)
class RouterEstimator:
    """The next layer's router, though it was made for that layer's hidden states; logits are relative to a token's k-th.

    Attributes:
        top_k: experts that a token chooses in the next layer.
    """

    router: LinearRouter
    top_k: int
    history: bool = False

    @property
    def unlikely_E(self) -> torch.Tensor:
        """One value for all experts: their usual shares are unknown."""
        experts = len(self.router.weight_EH)
        return torch.log1p(torch.full((experts,), -self.top_k / experts, device=self.router.weight_EH.device))

    def scores(self, rows: torch.Tensor) -> torch.Tensor:
        if self.router.correction_E is None:
            return self.router.logits(rows)
        return self.router.scores(rows).clamp(min=-1)  # groups that can't be chosen have -inf

    def to(self, device: torch.device, dtype: torch.dtype) -> RouterEstimator:
        weight_EH, bias_E = (t.to(device, dtype) for t in (self.router.weight_EH, self.router.bias_E))
        return replace(self, router=replace(self.router, weight_EH=_column_major(weight_EH), bias_E=bias_E))

    @property
    def kernel_weights(self) -> KernelWeights | None:
        if self.router.correction_E is not None:
            return None
        weight_EH = self.router.weight_EH
        return KernelWeights.of(weight_EH, self.router.bias_E, weight_EH.new_empty(0, len(weight_EH)), self.top_k)


def _column_major(matrix_ND: torch.Tensor) -> torch.Tensor:
    """The matrix as ``predictor_kernel`` reads it on a CPU: column by column in memory. Torch takes either order."""
    return matrix_ND.t().contiguous().t() if matrix_ND.device.type == "cpu" else matrix_ND


class _ThreadState(threading.local):
    """The rows that a thread's steps leave for its next ones.

    Attributes:
        rows: of each layer with history, those of its latest step.
        previous_rows: the argument of ``Predictor.set_previous_rows``.
        last_scores: ``Predictor.ids``'s last argument and the scores that it computed, for a ``usage`` of the same rows.
        places: the arguments of ``Predictor.keep_rows_at``; None = rows aren't kept in place.
        kept: rows in place, [rows, H] of each layer with history.
    """

    def __init__(self, layers: int) -> None:
        self.rows: list[torch.Tensor | None] = [None] * layers
        self.previous_rows: torch.Tensor | None = None
        self.last_scores: tuple[torch.Tensor, torch.Tensor] | None = None
        self.places: tuple[torch.Tensor, int] | None = None
        self.kept: dict[int, torch.Tensor] = {}


class Predictor:
    """Predictions for one model, layer by layer as it runs. Each thread that runs it has a history of its own.

    Args:
        estimators: for each MoE layer in order, one that predicts the layer after it (of the last: the first layer, for the
            next token); None where there is none.
        experts: number of experts with weights of each layer; estimators may know of identity experts behind these.
        device, dtype: of the hidden states that are given.

    Attributes:
        lookahead: layers from an estimator's input to the layer that it predicts.
        estimators: as given, on the device.
    """

    lookahead = 1

    def __init__(
        self, estimators: Sequence[Estimator | None], experts: Sequence[int], device: torch.device, dtype: torch.dtype
    ) -> None:
        self._dtype = estimator_dtype(device, dtype)
        self.estimators = [None if e is None else e.to(device, self._dtype) for e in estimators]
        on_cpu = device.type == "cpu"
        self._kernel_weights = [e.kernel_weights if on_cpu and e is not None else None for e in self.estimators]
        self._experts = list(experts)
        self._usage = usage_kernel_for(device)
        self._state = _ThreadState(len(self.estimators))

    def predicts(self, layer: int) -> bool:
        """Whether the layer after ``layer`` is predicted."""
        return self.estimators[layer] is not None

    def set_previous_rows(self, row_T: torch.Tensor | None) -> None:
        """Say which row precedes each row of this thread's steps from now on.

        Args:
            row_T: int64 on the device: 0 = none, a sequence begins; i > 0 = row i - 1 of the same step; -i = the i-th row from
                the end of the step before. None: guess, by ``guess_previous``.
        """
        self._state.previous_rows = row_T

    def keep_rows_at(self, row_T: torch.Tensor | None, rows: int = 0) -> None:
        """Keep this thread's rows in place from now on, where captured steps find them. Row t of a step is at ``row_T[t]``.

        Args:
            row_T: int64 on the device, below ``rows``; repeated rows are alike. The row kept there precedes row t. None = no
                longer.
            rows: places.
        """
        self._state.places = None if row_T is None else (row_T, rows)

    def forget(self) -> None:
        """Begin new sequences: the next step's rows continue no earlier ones."""
        self._state.rows = [None] * len(self.estimators)

    def usage(self, layer: int, hidden_TH: torch.Tensor, index_TK: torch.Tensor) -> torch.Tensor | None:
        """How probably any of these tokens will choose each expert of the layer after ``layer``. At most once a step.

        Args:
            hidden_TH: the input of ``layer``'s experts.
            index_TK: int64, the tokens' choices in ``layer``; only its shape is used.

        Returns:
            int32 [E], probability in 256ths, from 0 to 255; always None for a layer that isn't predicted.
        """
        estimator = self.estimators[layer]
        if estimator is None:
            return None
        tokens, top_k = index_TK.shape
        last_scores, self._state.last_scores = self._state.last_scores, None
        experts = self._experts[(layer + self.lookahead) % len(self._experts)]
        if tokens * top_k > SATURATING_CHOICES * experts:
            self._keep(layer, estimator, hidden_TH)
            used_E = (estimator.unlikely_E * tokens).exp_().neg_().add_(1)
            return quantised(used_E)[:experts]
        weights = self._kernel_weights[layer]
        if last_scores is not None and last_scores[0] is hidden_TH:
            score_TE = last_scores[1]
        elif weights is not None and tokens <= weights.most_rows:
            return self._usage_by_kernel(layer, estimator, weights, hidden_TH, experts)
        else:
            score_TE = self._scores(layer, estimator, hidden_TH)
        return self._usage(score_TE, estimator.top_k, experts)

    def _usage_by_kernel(
        self, layer: int, estimator: Estimator, weights: KernelWeights, hidden_TH: torch.Tensor, experts: int
    ) -> torch.Tensor:
        rows = hidden_TH if hidden_TH.dtype == self._dtype else hidden_TH.to(self._dtype)
        rows_TH = np.ascontiguousarray(rows.numpy(force=True))
        before_TP = weights.no_history_TP
        if estimator.history:
            before_TP = np.ascontiguousarray(self._previous(layer, torch.from_numpy(rows_TH)).numpy())
            self._keep(layer, estimator, torch.from_numpy(rows_TH))
        usage_E = np.empty(experts, np.int32)
        predict_usage(rows_TH, before_TP, weights.first_DN, weights.bias_N, weights.second_ME, weights.top_k, usage_E)
        return torch.from_numpy(usage_E)

    def skip(self, layer: int, hidden_TH: torch.Tensor) -> None:
        """Keep a step's rows without a prediction: the next step's rows may continue them."""
        estimator = self.estimators[layer]
        if estimator is not None:
            self._keep(layer, estimator, hidden_TH)

    def ids(self, layer: int, hidden_TH: torch.Tensor, k: int) -> torch.Tensor:
        """Each token's likeliest experts in the layer after ``layer``, likeliest first: int64 [T, k].

        At most once a step, and before ``usage``, which then costs little.

        Raises:
            ConfigError: that layer isn't predicted.
        """
        estimator = self.estimators[layer]
        if estimator is None:
            raise ConfigError(f"no estimator predicts the layer after MoE layer {layer}; fit one with `epslots predict fit`")
        score_TE = self._scores(layer, estimator, hidden_TH)
        self._state.last_scores = hidden_TH, score_TE
        return score_TE.topk(k, -1).indices

    def _scores(self, layer: int, estimator: Estimator, hidden_TH: torch.Tensor) -> torch.Tensor:
        """[T, E]; keeps the rows for the next step."""
        rows = hidden_TH.to(self._dtype)
        if estimator.history:
            rows = torch.cat([rows, self._previous(layer, rows)], 1)
            self._keep(layer, estimator, hidden_TH)
        return estimator.scores(rows)

    def _keep(self, layer: int, estimator: Estimator, hidden_TH: torch.Tensor) -> None:
        if not estimator.history or not len(hidden_TH):
            return
        if self._state.places is not None:
            self._kept(layer, hidden_TH).index_copy_(0, self._state.places[0], hidden_TH.detach().to(self._dtype))
            return
        self._state.rows[layer] = hidden_TH[-HISTORY_ROWS:].detach().to(self._dtype, copy=True)

    def _kept(self, layer: int, hidden_TH: torch.Tensor) -> torch.Tensor:
        """The layer's rows in place."""
        assert self._state.places is not None
        shape = self._state.places[1], hidden_TH.shape[1]
        found = self._state.kept.get(layer)
        if found is None or found.shape != shape:
            found = self._state.kept[layer] = torch.zeros(shape, dtype=self._dtype, device=hidden_TH.device)
        return found

    def _previous(self, layer: int, rows_TH: torch.Tensor) -> torch.Tensor:
        """The hidden state of the token before each token, [T, H]; zeros where there is none or it is unknown."""
        if self._state.places is not None:
            return self._kept(layer, rows_TH).index_select(0, self._state.places[0])
        last_SH, row_T = self._state.rows[layer], self._state.previous_rows
        if last_SH is None:
            last_SH = rows_TH[:0]
        if row_T is not None and len(row_T) == len(rows_TH):
            known_T = row_T.masked_fill(row_T < -len(last_SH), 0)  # rows that weren't kept are unknown
            return torch.cat([rows_TH.new_zeros(1, rows_TH.shape[1]), rows_TH, last_SH])[known_T]
        return guess_previous(last_SH, rows_TH)


def estimator_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype of estimators for a model of ``dtype``. On a CPU, products of a few rows are faster in float32."""
    return torch.float32 if device.type == "cpu" else dtype


def guess_previous(last_SH: torch.Tensor, rows_TH: torch.Tensor) -> torch.Tensor:
    """The hidden state before each row, [T, H], guessed only from the numbers of rows.

    As many rows as in the step before, or a whole fraction of them: each sequence goes on by a token, behind its last row.
    More rows: a sequence that begins, each row behind the one before. Else unknown: zeros.

    Args:
        last_SH: the last rows of the step before.
    """
    before, now = len(last_SH), len(rows_TH)
    if before == now:
        return last_SH
    if now and before >= now and before % now == 0:
        return last_SH[before // now - 1 :: before // now]
    if now > before:
        return functional.pad(rows_TH[:-1], (0, 0, 1, 0))
    return torch.zeros_like(rows_TH)
