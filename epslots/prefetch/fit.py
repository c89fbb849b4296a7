"""Fitting a predictor to a model: run text through it, record what each layer is given and chooses, train an estimator a pair.

An estimator starts as the next layer's router and learns the rest: a correction of that linear map, and a small network for
what isn't linear (the experts' own contribution to the next layer's hidden state, most of all). Logits are trained by binary
cross-entropy, expert by expert, so that they are calibrated: what is told at 30 % happens three times in ten. A layer whose
choice hangs on the previous token is given that as well, if a short trial says that it pays.

Recording takes memory for the hidden states of two layers at least; as many layers are recorded in one pass over the text as
fit into ``Settings.memory``.

Legend of shape suffixes: S windows of text, W tokens of a window, N = S * W tokens, K experts of a token, E experts to choose
from, H hidden size, M hidden units, B tokens of a training batch.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from epslots.errors import ConfigError
from epslots.models.experts import experts_modules, num_weighted_experts
from epslots.prefetch.predictor import Fitted
from epslots.prefetch.routers import Router, agreement, find_routers

logger = logging.getLogger(__name__)

Advance = Callable[[int], object]
# The last part of the windows judges what the others have taught.
HELD_BACK = 20
# What the previous token's hidden state must add to recall to be looked at in every step; tried with so many tokens.
WORTH_HISTORY = 0.01
TRIAL_TOKENS = 120_000
# Rows that are trained as if nothing were known of the previous token: at run time that happens.
FORGET = 0.1
# A router that was found by structure must make this part of the model's own choices. (In bf16 near-ties fall either way.)
AGREES = 0.9
# Tokens of a forward pass while recording, and rows that are judged at a time.
PASS_TOKENS = 2048
JUDGED_ROWS = 8192


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """How an estimator is fitted.

    Attributes:
        tokens: most tokens of text that are used.
        window: tokens that the model sees in one piece.
        hidden: units of the small network's one layer; 0 = a linear estimator.
        epochs, batch, rate: training passes, tokens of a step, peak learning rate (AdamW, one cycle).
        memory: bytes that records may take.
        distance: layers ahead.
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


class Quality(msgspec.Struct, frozen=True):
    """Recall on windows that took no part: the share of the k experts chosen that are among the likeliest k or 2k.

    Attributes:
        naive: at k and 2k of the next layer's router as it is; None where no router was found.
        fitted: at k and 2k of the estimator.
        history: whether it is given the previous token.
    """

    naive: tuple[float, float] | None
    fitted: tuple[float, float]
    history: bool


@dataclass(frozen=True)
class Seen:
    """What one layer was given and chose: hidden states float16 [N, H] and ids int16 [N, K], on the CPU."""

    hidden_NH: torch.Tensor
    index_NK: torch.Tensor


def cut_windows(texts: Iterable[Sequence[int]], window: int, tokens: int, end: int | None, seed: int) -> torch.Tensor:
    """Windows of text in random order, those of the last texts behind all others: int64 [S, W], at most ``tokens`` in all.

    Args:
        texts: tokens of each text; they are put in random order and joined.
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
    held = max(1, min(count, tokens // window) // HELD_BACK)
    if count < 2 * HELD_BACK:
        raise ConfigError(
            f"text of {len(joined):,} tokens; a fit needs {2 * HELD_BACK * window:,} at least, and 200,000 to be good"
        )
    windows_SW = torch.from_numpy(joined[: count * window].reshape(count, window))
    taught = generator.permutation(count - held)[: max(1, tokens // window - held)]
    return torch.cat([windows_SW[torch.from_numpy(taught)], windows_SW[count - held :]])


def record(model: PreTrainedModel, windows_SW: torch.Tensor, layers: Iterable[int], advance: Advance) -> dict[int, Seen]:
    """Run all windows through the model, and keep what these layers saw. Layers that some tokens pass by are left out.

    Args:
        advance: told the number of windows done.
    """
    modules = dict(enumerate(experts_modules(model).values()))
    windows, window = windows_SW.shape
    at_once = max(1, PASS_TOKENS // window)
    kept: dict[int, Seen] = {}
    partial: set[int] = set()
    rows = slice(0, 0)

    def watch(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden_TH, index_TK = (*args, *kwargs.values())[:2]
            if len(hidden_TH) != rows.stop - rows.start:
                partial.add(layer)
                return
            if layer not in kept:
                size = windows * window
                empty = torch.empty(size, hidden_TH.shape[1], dtype=torch.float16)
                kept[layer] = Seen(empty, torch.empty(size, index_TK.shape[1], dtype=torch.int16))
            kept[layer].hidden_NH[rows] = hidden_TH.to("cpu", torch.float16)
            kept[layer].index_NK[rows] = index_TK.to("cpu", torch.int16)

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
    return {layer: seen for layer, seen in kept.items() if layer not in partial}


class _Net(nn.Module):
    """A ``Fitted`` in the making."""

    def __init__(self, inputs: int, choices: int, hidden: int, router: Router | None) -> None:
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

    def finish(self, unlikely_E: torch.Tensor, history: bool) -> Fitted:
        first = torch.cat([self.inner.weight, self.linear.weight]).detach()
        bias = torch.cat([self.inner.bias, self.linear.bias]).detach()
        return Fitted(first, bias, self.outer.weight.detach().t().contiguous(), unlikely_E, history)


@dataclass(frozen=True)
class _Pair:
    """Records of a layer and of the one it is to tell of, as training and judging want them."""

    seen: Seen
    target_NK: torch.Tensor
    choices: int
    window: int
    device: torch.device
    taught: int

    def rows(self, which_B: torch.Tensor, history: bool, forget: float = 0.0) -> torch.Tensor:
        """Float32 [B, H], or [B, 2 H] with the previous token's hidden state behind each token's own."""
        rows_BH = self.seen.hidden_NH[which_B].to(self.device, torch.float32)
        if not history:
            return rows_BH
        known_B = (which_B % self.window > 0) & (torch.rand(len(which_B)) >= forget)
        before_BH = self.seen.hidden_NH[(which_B - 1).clamp(min=0)].to(self.device, torch.float32)
        return torch.cat([rows_BH, before_BH * known_B.to(self.device)[:, None]], 1)

    def chosen(self, which_B: torch.Tensor) -> torch.Tensor:
        """Float32 [B, E], 1 where a token chose an expert."""
        index_BK = self.target_NK[which_B].to(self.device, torch.int64)
        return torch.zeros(len(which_B), self.choices, device=self.device).scatter_(1, index_BK, 1.0)

    def judge(self, logits: Callable[[torch.Tensor], torch.Tensor], history: bool) -> tuple[float, float]:
        """Recall at k and 2k on what was held back."""
        found, top_k = torch.zeros(2), self.target_NK.shape[1]
        held = torch.arange(self.taught, len(self.target_NK))
        with torch.inference_mode():
            for which_B in held.split(JUDGED_ROWS):
                found += recalled(logits(self.rows(which_B, history)), self.target_NK[which_B].to(self.device)).cpu()
        at_k, at_2k = (found / (len(held) * top_k)).tolist()
        return at_k, at_2k

    def usual(self) -> torch.Tensor:
        """log(1 - share of tokens that choose it) of each expert, float32 [E]."""
        count_E = torch.bincount(self.target_NK[: self.taught].flatten().to(torch.int64), minlength=self.choices)
        return torch.log1p(-(count_E / self.taught).clamp(max=1 - 1e-4)).to(self.device)


def recalled(logits_TE: torch.Tensor, index_TK: torch.Tensor) -> torch.Tensor:
    """How many of the chosen experts are among the likeliest k, and 2k: float32 [2]."""
    top_k = index_TK.shape[1]
    best_TD = logits_TE.topk(min(2 * top_k, logits_TE.shape[1]), -1).indices
    hit_TD = (best_TD[:, :, None] == index_TK[:, None, :]).any(-1)
    return torch.stack([hit_TD[:, :top_k].sum(), hit_TD.sum()]).float()


def _train(
    pair: _Pair, router: Router | None, settings: Settings, history: bool, advance: Advance, tokens: int, epochs: int
) -> _Net:
    """Train on the first ``tokens`` that aren't held back."""
    tokens = min(tokens, pair.taught)
    batch = min(settings.batch, tokens)
    inputs = pair.seen.hidden_NH.shape[1] * (2 if history else 1)
    usable = router if router is not None and router.weight_EH.shape[1] == pair.seen.hidden_NH.shape[1] else None
    net = _Net(inputs, pair.choices, settings.hidden, usable).to(pair.device)
    steps = epochs * (tokens // batch)
    optimizer = torch.optim.AdamW(net.parameters(), lr=settings.rate, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _one_cycle(step / steps))
    for _ in range(epochs):
        for which_B in torch.randperm(tokens).split(batch)[: tokens // batch]:
            logits_BE = net(pair.rows(which_B, history, FORGET))
            loss = functional.binary_cross_entropy_with_logits(logits_BE, pair.chosen(which_B))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            advance(1)
    return net.eval()


def _one_cycle(done: float) -> float:
    """Share of the peak rate: up within the first tenth, then down along a cosine."""
    return done / 0.1 if done < 0.1 else 0.5 * (1 + math.cos(math.pi * min(1.0, (done - 0.1) / 0.9)))


def _scaled(pair: _Pair, router: Router) -> Fitted:
    """The router itself, its logits stretched and shifted as one to be calibrated: the order of the experts stays."""
    which_B = torch.arange(min(pair.taught, TRIAL_TOKENS))
    with torch.inference_mode():
        logits_BE = router.logits(pair.rows(which_B, history=False))
    chosen_BE, logits_BE = pair.chosen(which_B), logits_BE.clone()
    stretch, shift = (nn.Parameter(torch.full((), value, device=pair.device)) for value in (0.0, -2.0))
    optimizer = torch.optim.LBFGS([stretch, shift], max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        found = functional.binary_cross_entropy_with_logits(logits_BE * stretch.exp() + shift, chosen_BE)
        found.backward()
        return found

    optimizer.step(loss)
    factor = stretch.detach().exp()
    none = router.weight_EH.new_zeros(0, pair.choices)
    return Fitted(router.weight_EH * factor, router.bias_E * factor + shift.detach(), none, pair.usual())


def fit_pair(pair: _Pair, router: Router | None, settings: Settings, advance: Advance) -> tuple[Fitted, Quality]:
    """Fit one layer's estimator. One that is no better than the naive one gives way to it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return _fit_pair(pair, router, settings, advance)


def _fit_pair(pair: _Pair, router: Router | None, settings: Settings, advance: Advance) -> tuple[Fitted, Quality]:
    naive = None if router is None else pair.judge(router.scores, history=False)
    trials = {
        history: pair.judge(_train(pair, router, settings, history, advance, TRIAL_TOKENS, 2), history)
        for history in (False, True)
    }
    history = trials[True][0] > trials[False][0] + WORTH_HISTORY
    net = _train(pair, router, settings, history, advance, pair.taught, settings.epochs)
    fitted = pair.judge(net, history)
    if router is not None and naive is not None and (fitted[0] < naive[0] or fitted[1] < naive[1]):
        return _scaled(pair, router), Quality(naive, naive, False)
    return net.finish(pair.usual(), history), Quality(naive, fitted, history)


def passes(layers: int, distance: int, bytes_of_layer: int, memory: int) -> Iterator[range]:
    """The layers to record in each pass over the text, so that each and the one it tells of are recorded together."""
    at_once = max(distance + 1, memory // max(1, bytes_of_layer))
    start = 0
    while start + distance < layers:
        yield range(start, min(layers, start + at_once))
        start += at_once - distance


def fit(
    model: PreTrainedModel,
    windows_SW: torch.Tensor,
    settings: Settings,
    progress: Callable[[str, int], Any],
) -> tuple[list[Fitted | None], list[Quality | None]]:
    """Fit an estimator for each MoE layer of a model, of the layer ``settings.distance`` behind it.

    Args:
        windows_SW: of ``cut_windows``.
        progress: opens a bar for a piece of work with so many parts: a context that yields an ``Advance``.

    Returns:
        Estimators and their quality by layer; None where there is no layer to tell of, or text doesn't reach both. One layer
        ahead of the last is the first, with the next token.
    """
    modules: Mapping[str, nn.Module] = experts_modules(model)
    names, routers = list(modules), find_routers(model, modules)
    held = max(1, len(windows_SW) // HELD_BACK)
    taught = (len(windows_SW) - held) * windows_SW.shape[1]
    fits: list[Fitted | None] = [None] * len(names)
    qualities: list[Quality | None] = [None] * len(names)
    size = windows_SW.numel() * 2 * (model.config.get_text_config().hidden_size + 8)
    trial = min(TRIAL_TOKENS, taught)
    steps = settings.epochs * (taught // min(settings.batch, taught)) + 4 * (trial // min(settings.batch, trial))
    for layers in passes(len(names), settings.distance, size, settings.memory):
        with progress("recording", len(windows_SW)) as advance:
            seen = record(model, windows_SW, layers, advance)
        pairs = [n for n in layers if n in seen and n + settings.distance in seen and fits[n] is None]
        with progress("fitting", steps * len(pairs)) as advance:
            for layer in pairs:
                target = layer + settings.distance
                module = modules[names[target]]
                index_NK = seen[target].index_NK
                pair = _Pair(seen[layer], index_NK, _choices(module), windows_SW.shape[1], model.device, taught)
                router = _checked(routers[target], seen[target], names[target], model.device)
                fits[layer], qualities[layer] = fit_pair(pair, router, settings, advance)
    if settings.distance == 1:
        last = len(names) - 1
        with progress("recording", len(windows_SW)) as advance:
            seen = record(model, windows_SW, {0, last}, advance)
        if seen.keys() == {0, last}:
            choices = _choices(modules[names[0]])
            pair = _to_next_token(seen[last], seen[0], choices, windows_SW.shape[1], model.device, taught)
            with progress("fitting", steps) as advance:
                fits[last], qualities[last] = fit_pair(pair, None, settings, advance)
    return fits, qualities


def _choices(module: nn.Module) -> int:
    """Experts that a layer's router chooses from, those without weights included."""
    return num_weighted_experts(module) + int(getattr(module, "zero_expert_num", None) or 0)


def _to_next_token(last: Seen, first: Seen, choices: int, window: int, device: torch.device, taught: int) -> _Pair:
    """What the last layer was given, and what the first chose for the token behind. A window's last token has none."""
    hidden_NH, index_NK = last.hidden_NH.unflatten(0, (-1, window)), first.index_NK.unflatten(0, (-1, window))
    seen = Seen(hidden_NH[:, :-1].flatten(0, 1), last.index_NK.unflatten(0, (-1, window))[:, :-1].flatten(0, 1))
    return _Pair(seen, index_NK[:, 1:].flatten(0, 1), choices, window - 1, device, taught // window * (window - 1))


def _checked(router: Router | None, seen: Seen, name: str, device: torch.device) -> Router | None:
    """The router, if it makes the layer's own choices."""
    if router is not None:
        hidden_TH, index_TK = (t[:JUDGED_ROWS].to(device) for t in (seen.hidden_NH, seen.index_NK))
        if agreement(router, hidden_TH, index_TK) >= AGREES:
            return router
    logger.info("%s: its router is no linear map of what its experts are given; its estimator starts from nothing", name)
    return None
