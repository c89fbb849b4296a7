"""Fitting a predictor to a model: record it on text (``recording.py``), then train an estimator per pair of layers.

An estimator starts as the next layer's router, and learns a correction of that linear map and a small network for the rest:
mostly the experts' own contribution to the next layer's hidden state. Its logits are trained by binary cross-entropy, expert
by expert, so that they are calibrated: a probability of 30 % comes true three times in ten. A layer whose choice depends on
the previous token is given that token's hidden state as well, if a short trial shows that it pays.

Called by ``epslots predict fit``; read ``fit`` first. Legend of shape suffixes: S windows of text, W tokens of a window,
N = S * W tokens, K experts of a token, E experts to choose from, H hidden size, B tokens of a training batch, T tokens.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from epslots.models.experts import experts_modules, num_weighted_experts
from epslots.prefetch.predictor import FittedEstimator
from epslots.prefetch.recording import LayerRecording, held_out_windows, plan_recordings, record
from epslots.prefetch.routers import LinearRouter, agreement, find_routers
from epslots.progress import Advance

logger = logging.getLogger(__name__)

# Recall that the previous token's hidden state must add to be used in every step; tried with so many tokens.
_LEAST_HISTORY_GAIN = 0.01
_TRIAL_TOKENS = 120_000
_TRIAL_EPOCHS = 2
# Share of training rows without the previous token: at run time it is sometimes unknown.
_HISTORY_DROPOUT = 0.1
# A router that was found by structure must make this share of the model's own choices. (In bf16 near-ties fall either way.)
_LEAST_AGREEMENT = 0.9
# Rows that are evaluated at a time.
_EVALUATED_ROWS = 8192


class FitSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How an estimator is fitted.

    Attributes:
        tokens: most tokens of text that are used.
        window: tokens that the model sees in one piece.
        hidden: units of the small network's one layer; 0 = a linear estimator.
        epochs, batch, rate: training epochs, tokens of a step, peak learning rate (AdamW, one cycle).
        memory: bytes that recordings may take.
        distance: layers from an estimator's input to the layer that it predicts.
    """

    tokens: int = 800_000
    window: int = 256
    hidden: int = 384
    epochs: int = 6
    batch: int = 2048
    rate: float = 4e-3
    memory: int = 4 << 30
    distance: int = 1
    seed: int = 0


class FitQuality(msgspec.Struct, frozen=True):
    """Recall on held-out windows: the share of the k chosen experts that are among the likeliest k or 2k.

    Attributes:
        naive: at k and 2k of the next layer's router as it is; None where no router was found.
        fitted: at k and 2k of the estimator.
        history: whether the estimator is given the previous token.
    """

    naive: tuple[float, float] | None
    fitted: tuple[float, float]
    history: bool


class _EstimatorNetwork(nn.Module):
    """A ``FittedEstimator`` in training."""

    def __init__(self, inputs: int, choices: int, hidden: int, router: LinearRouter | None) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, choices)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        if router is not None:
            size = router.weight_EH.shape[1]
            self.linear.weight.data[:, :size] = router.weight_EH
            self.linear.bias.data[:] = router.bias_E - 2
        self.inner = nn.Linear(inputs, hidden)
        self.outer = nn.Linear(hidden, choices, bias=False)
        nn.init.zeros_(self.outer.weight)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.linear(rows)
        return logits + self.outer(functional.silu(self.inner(rows))) if self.outer.in_features else logits

    def estimator(self, unlikely_E: torch.Tensor, history: bool) -> FittedEstimator:
        first = torch.cat([self.inner.weight, self.linear.weight]).detach()
        bias = torch.cat([self.inner.bias, self.linear.bias]).detach()
        return FittedEstimator(first, bias, self.outer.weight.detach().t().contiguous(), unlikely_E, history)


@dataclass(frozen=True)
class _TrainingPair:
    """Recordings of a layer and of the layer to predict from it.

    Attributes:
        source: the layer that is predicted from.
        target_NK: choices of the layer to predict, int16.
        choices: E, experts that its router chooses from.
        window: tokens of a window.
        trained: the first tokens, which are trained on; those behind are held out.
    """

    source: LayerRecording
    target_NK: torch.Tensor
    choices: int
    window: int
    device: torch.device
    trained: int

    def rows(self, which_B: torch.Tensor, history: bool, dropout: float = 0.0) -> torch.Tensor:
        """Inputs, float32 [B, H]; with history [B, 2 H], the previous token's hidden state behind.

        Args:
            dropout: share of rows whose previous token is left out.
        """
        rows_BH = self.source.hidden_NH[which_B].to(self.device, torch.float32)
        if not history:
            return rows_BH
        known_B = (which_B % self.window > 0) & (torch.rand(len(which_B)) >= dropout)
        before_BH = self.source.hidden_NH[(which_B - 1).clamp(min=0)].to(self.device, torch.float32)
        return torch.cat([rows_BH, before_BH * known_B.to(self.device)[:, None]], 1)

    def chosen(self, which_B: torch.Tensor) -> torch.Tensor:
        """Float32 [B, E], 1 where a token chose an expert."""
        index_BK = self.target_NK[which_B].to(self.device, torch.int64)
        return torch.zeros(len(which_B), self.choices, device=self.device).scatter_(1, index_BK, 1.0)

    def recall(self, logits: Callable[[torch.Tensor], torch.Tensor], history: bool) -> tuple[float, float]:
        """Recall at k and 2k on the held-out tokens."""
        found, top_k = torch.zeros(2), self.target_NK.shape[1]
        held_out = torch.arange(self.trained, len(self.target_NK))
        with torch.inference_mode():
            for which_B in held_out.split(_EVALUATED_ROWS):
                found += count_recalled(logits(self.rows(which_B, history)), self.target_NK[which_B].to(self.device)).cpu()
        at_k, at_2k = (found / (len(held_out) * top_k)).tolist()
        return at_k, at_2k

    def log_unused(self) -> torch.Tensor:
        """log(1 - share of tokens that choose it) of each expert, float32 [E]."""
        count_E = torch.bincount(self.target_NK[: self.trained].flatten().to(torch.int64), minlength=self.choices)
        return torch.log1p(-(count_E / self.trained).clamp(max=1 - 1e-4)).to(self.device)


def count_recalled(logits_TE: torch.Tensor, index_TK: torch.Tensor) -> torch.Tensor:
    """How many of the chosen experts are among the likeliest k, and 2k: float32 [2]."""
    top_k = index_TK.shape[1]
    best_TD = logits_TE.topk(min(2 * top_k, logits_TE.shape[1]), -1).indices
    hit_TD = (best_TD[:, :, None] == index_TK[:, None, :]).any(-1)
    return torch.stack([hit_TD[:, :top_k].sum(), hit_TD.sum()]).float()


def fit(
    model: PreTrainedModel,
    windows_SW: torch.Tensor,
    settings: FitSettings,
    progress: Callable[[str, int], Any],
) -> tuple[list[FittedEstimator | None], list[FitQuality | None]]:
    """Fit an estimator per MoE layer, of the layer ``settings.distance`` behind it.

    Args:
        windows_SW: text from ``cut_windows``, int64 [S, W].
        progress: opens a bar for (title, number of parts): a context that yields an ``Advance``.

    Returns:
        Estimators and their quality by layer; None where there is no layer to predict, or text doesn't reach both. At a
        distance of 1 the last layer's estimator predicts the first layer for the next token.
    """
    modules = experts_modules(model)
    names, routers = list(modules), find_routers(model, modules)
    windows, window = windows_SW.shape
    trained = (windows - held_out_windows(windows)) * window
    fits: list[FittedEstimator | None] = [None] * len(names)
    qualities: list[FitQuality | None] = [None] * len(names)
    size = windows_SW.numel() * 2 * (model.config.get_text_config().hidden_size + 8)
    steps = _fit_steps(settings, trained)
    for layers in plan_recordings(len(names), settings.distance, size, settings.memory):
        with progress("recording", windows) as advance:
            recordings = record(model, windows_SW, layers, advance)
        sources = [n for n in layers if n in recordings and n + settings.distance in recordings and fits[n] is None]
        with progress("fitting", steps * len(sources)) as advance:
            for source in sources:
                target = source + settings.distance
                router = _verified(routers[target], recordings[target], names[target], model.device)
                choices = _choices(modules[names[target]])
                index_NK = recordings[target].index_NK
                pair = _TrainingPair(recordings[source], index_NK, choices, window, model.device, trained)
                fits[source], qualities[source] = _fit_pair(pair, router, settings, advance)
    if settings.distance == 1:
        last = len(names) - 1
        with progress("recording", windows) as advance:
            recordings = record(model, windows_SW, {0, last}, advance)
        if recordings.keys() == {0, last}:
            choices = _choices(modules[names[0]])
            pair = _next_token_pair(recordings[last], recordings[0], choices, window, model.device, trained)
            with progress("fitting", steps) as advance:
                fits[last], qualities[last] = _fit_pair(pair, None, settings, advance)
    return fits, qualities


def _fit_steps(settings: FitSettings, trained: int) -> int:
    """Training steps of one estimator, with its two trials."""
    trial = min(_TRIAL_TOKENS, trained)
    return settings.epochs * (trained // min(settings.batch, trained)) + 2 * _TRIAL_EPOCHS * (
        trial // min(settings.batch, trial)
    )


def _choices(module: nn.Module) -> int:
    """Experts that a layer's router chooses from, those without weights included."""
    return num_weighted_experts(module) + int(getattr(module, "zero_expert_num", None) or 0)


def _next_token_pair(
    last: LayerRecording, first: LayerRecording, choices: int, window: int, device: torch.device, trained: int
) -> _TrainingPair:
    """The last layer's inputs, and the first layer's choices for the token behind. A window's last token has none."""
    hidden_SWH, last_SWK, first_SWK = (t.unflatten(0, (-1, window)) for t in (last.hidden_NH, last.index_NK, first.index_NK))
    source = LayerRecording(hidden_SWH[:, :-1].flatten(0, 1), last_SWK[:, :-1].flatten(0, 1))
    return _TrainingPair(source, first_SWK[:, 1:].flatten(0, 1), choices, window - 1, device, trained // window * (window - 1))


def _verified(router: LinearRouter | None, recording: LayerRecording, name: str, device: torch.device) -> LinearRouter | None:
    """The router if it makes the layer's own choices, else None."""
    if router is not None:
        hidden_TH, index_TK = (t[:_EVALUATED_ROWS].to(device) for t in (recording.hidden_NH, recording.index_NK))
        if agreement(router, hidden_TH, index_TK) >= _LEAST_AGREEMENT:
            return router
    logger.info("%s: its router is no linear map of its experts' input; its estimator starts from zero", name)
    return None


def _fit_pair(
    pair: _TrainingPair, router: LinearRouter | None, settings: FitSettings, advance: Advance
) -> tuple[FittedEstimator, FitQuality]:
    """Fit one estimator; a calibrated router instead, if the fit is no better than the router. Depends only on the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        naive = None if router is None else pair.recall(router.scores, history=False)
        trials = {
            history: pair.recall(_train(pair, router, settings, history, advance, _TRIAL_TOKENS, _TRIAL_EPOCHS), history)
            for history in (False, True)
        }
        history = trials[True][0] > trials[False][0] + _LEAST_HISTORY_GAIN
        network = _train(pair, router, settings, history, advance, pair.trained, settings.epochs)
        fitted = pair.recall(network, history)
        if router is not None and naive is not None and (fitted[0] < naive[0] or fitted[1] < naive[1]):
            return _calibrate(router, pair), FitQuality(naive, naive, False)
        return network.estimator(pair.log_unused(), history), FitQuality(naive, fitted, history)


def _train(
    pair: _TrainingPair,
    router: LinearRouter | None,
    settings: FitSettings,
    history: bool,
    advance: Advance,
    tokens: int,
    epochs: int,
) -> _EstimatorNetwork:
    """Train on the first ``tokens`` that aren't held out."""
    tokens = min(tokens, pair.trained)
    batch = min(settings.batch, tokens)
    size = pair.source.hidden_NH.shape[1]
    start = router if router is not None and router.weight_EH.shape[1] == size else None
    network = _EstimatorNetwork(size * (2 if history else 1), pair.choices, settings.hidden, start).to(pair.device)
    steps = epochs * (tokens // batch)
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.rate, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _one_cycle(step / steps))
    for _ in range(epochs):
        for which_B in torch.randperm(tokens).split(batch)[: tokens // batch]:
            logits_BE = network(pair.rows(which_B, history, _HISTORY_DROPOUT))
            loss = functional.binary_cross_entropy_with_logits(logits_BE, pair.chosen(which_B))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            advance(1)
    return network.eval()


def _one_cycle(done: float) -> float:
    """Share of the peak rate: up within the first tenth, then down along a cosine."""
    return done / 0.1 if done < 0.1 else 0.5 * (1 + math.cos(math.pi * min(1.0, (done - 0.1) / 0.9)))


def _calibrate(router: LinearRouter, pair: _TrainingPair) -> FittedEstimator:
    """The router itself, its logits scaled and shifted so that they are calibrated: the order of the experts stays."""
    which_B = torch.arange(min(pair.trained, _TRIAL_TOKENS))
    with torch.inference_mode():
        logits_BE = router.logits(pair.rows(which_B, history=False))
    chosen_BE, logits_BE = pair.chosen(which_B), logits_BE.clone()
    log_scale, shift = (nn.Parameter(torch.full((), value, device=pair.device)) for value in (0.0, -2.0))
    optimizer = torch.optim.LBFGS([log_scale, shift], max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        found = functional.binary_cross_entropy_with_logits(logits_BE * log_scale.exp() + shift, chosen_BE)
        found.backward()
        return found

    optimizer.step(loss)
    scale = log_scale.detach().exp()
    no_network = router.weight_EH.new_zeros(0, pair.choices)
    return FittedEstimator(router.weight_EH * scale, router.bias_E * scale + shift.detach(), no_network, pair.log_unused())
