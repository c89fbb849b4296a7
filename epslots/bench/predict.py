"""Quality of the predictor of the next layers' experts: recall by layer and distance, calibration, cost, approximate mode.

On the example model, and on text that neither the model nor its predictor has seen: the files of the standard library that
training held out.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from epslots.bench.models import load_fp32
from epslots.bench.report import US, BenchReport
from epslots.example import example_model
from epslots.example_text import library_texts
from epslots.generation.text import load_tokenizer
from epslots.models.experts import experts_modules
from epslots.prefetch.fit import FitSettings, count_recalled, fit
from epslots.prefetch.predictor import Estimator, Predictor
from epslots.prefetch.predictor_file import PREDICTOR_FILE_NAME, load_predictor, router_predictor
from epslots.prefetch.predictor_kernel import USAGE_SCALE
from epslots.prefetch.recording import LayerRecording, cut_windows, record
from epslots.prefetch.routers import LinearRouter, find_routers
from epslots.progress import counting
from epslots.runtime import predictor_of, runtime_of

DISTANCES = (1, 2, 3)
WINDOW = 256
# Predicted usage is held against actual usage in so many bins, for steps of so many tokens.
BINS = 8
BATCHES = (1, 4, 16)
JUDGED_WINDOWS = 64
COST_TOKENS = (1, 4, 16, 64)  # of the steps whose cost is measured
CALLS = 100  # of which one time is the mean
ROWS_AT_ONCE = 8192  # of hidden states that recall is computed on


def bench_predict(
    report: BenchReport, cache_dir: Path, *, held_tokens: int = 60_000, tokens: int = 100_000, rounds: int = 15
) -> None:
    """Judge the predictor beside the model, and fit one more for each distance.

    Args:
        held_tokens: text that recall is measured on.
        tokens: text that the fits of this run learn from.
        rounds: of timing; the best one counts.
    """
    model = load_fp32(example_model(), cache_dir)
    held_SW = windows_of(model, library_texts(held_out=True), held_tokens)
    with counting("recording held-out text", len(held_SW)) as advance:
        seen = record(model, held_SW, range(len(runtime_of(model).layers)), advance)
    routers = [router for router in find_routers(model, experts_modules(model)) if router is not None]
    predictor = load_predictor(example_model() / PREDICTOR_FILE_NAME, model)
    report.table("recall on held-out text, one layer ahead, as shipped", recalls(seen, routers, predictor.estimators, 1))
    report.table(
        "recall of the first layer's experts for the next token, told by the last layer", to_next_token(seen, predictor)
    )
    known_SW = windows_of(model, library_texts(held_out=False), tokens)
    for distance in DISTANCES:
        fits, _ = fit(model, known_SW, FitSettings(tokens=tokens, distance=distance), counting)
        title = f"recall on held-out text, distance {distance}, fitted here on {known_SW.numel():,} tokens"
        report.table(title, recalls(seen, routers, fits, distance))
    report.table("usage as told, and as it was (as shipped, all layers)", calibration(predictor, seen))
    report.table("thread time of one prediction", costs(model, predictor, rounds))
    rows = losses(model, held_SW[:JUDGED_WINDOWS], cache_dir)
    report.table("predicted experts executed instead of chosen ones (execute_predicted=True)", rows)


def windows_of(model: PreTrainedModel, texts: Sequence[str], tokens: int) -> torch.Tensor:
    """Windows of text, int64 [S, W]."""
    tokenizer = load_tokenizer(model.name_or_path)
    ids = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
    return cut_windows(ids, WINDOW, tokens, tokenizer.eos_token_id, seed=1)


def recalls(
    seen: dict[int, LayerRecording], routers: Sequence[LinearRouter], fits: Sequence[Estimator | None], distance: int
) -> list[dict[str, Any]]:
    """A row of recalls for each layer, and their mean.

    Recall of the layer's own router on earlier hidden states, and of the estimator.
    """
    rows: list[dict[str, Any]] = []
    for layer in range(len(routers) - distance):
        estimator, target_NK = fits[layer], seen[layer + distance].index_NK
        assert estimator is not None, "text reaches all layers of the example model"
        naive = recall(seen[layer], target_NK, routers[layer + distance].scores, history=False)
        fitted = recall(seen[layer], target_NK, estimator.scores, history=estimator.history)
        rates = {"naive at k": naive[0], "at 2k": naive[1], "fitted at k": fitted[0], "fitted at 2k": fitted[1]}
        rows.append({"layer": str(layer + distance), **rates, "token before": str(estimator.history)})
    mean = {key: float(np.mean([row[key] for row in rows])) for key, value in rows[0].items() if isinstance(value, float)}
    return [*rows, {"layer": "mean", **mean, "token before": ""}]


def to_next_token(seen: dict[int, LayerRecording], predictor: Predictor) -> list[dict[str, Any]]:
    """Recall of the first layer's experts from the last layer's hidden states of the token before."""
    last, estimator = max(seen), predictor.estimators[max(seen)]
    assert estimator is not None, "it is fitted"
    hidden_SWH, index_SWK = (t.unflatten(0, (-1, WINDOW)) for t in (seen[last].hidden_NH, seen[0].index_NK))
    found = torch.zeros(2)
    for hidden_WH, index_WK in zip(hidden_SWH, index_SWK, strict=True):
        rows_WH = hidden_WH.float()
        if estimator.history:
            rows_WH = torch.cat([rows_WH, functional.pad(rows_WH, (0, 0, 1, 0))[:-1]], 1)
        found += count_recalled(estimator.scores(rows_WH[:-1]), index_WK[1:])
    at_k, at_2k = (found / index_SWK[:, 1:].numel()).tolist()
    return [{"layer": "0, next token", "fitted at k": at_k, "fitted at 2k": at_2k, "token before": str(estimator.history)}]


def recall(
    seen: LayerRecording, target_NK: torch.Tensor, logits: Callable[[torch.Tensor], torch.Tensor], *, history: bool
) -> list[float]:
    """The share of the chosen experts that are among the likeliest k, and 2k."""
    found = torch.zeros(2)
    for start in range(0, len(target_NK), ROWS_AT_ONCE):
        rows_NH = seen.hidden_NH[start : start + ROWS_AT_ONCE].float()
        if history:  # whole windows: a window's first token has none before it
            before_SWH = functional.pad(rows_NH.unflatten(0, (-1, WINDOW)), (0, 0, 1, 0))[:, :-1]
            rows_NH = torch.cat([rows_NH, before_SWH.flatten(0, 1)], 1)
        found += count_recalled(logits(rows_NH), target_NK[start : start + ROWS_AT_ONCE])
    return [float(share) for share in found / target_NK.numel()]


def calibration(predictor: Predictor, seen: dict[int, LayerRecording]) -> list[dict[str, Any]]:
    """Actual usage of experts by predicted usage, step by step as at run time, for batches of several sizes."""
    rows: list[dict[str, Any]] = []
    for batch in BATCHES:
        predicted, used = (np.concatenate(parts) for parts in zip(*steps(predictor, seen, batch), strict=True))
        bin_of = np.minimum(predicted * BINS // USAGE_SCALE, BINS - 1)
        for number in range(BINS):
            here = bin_of == number
            rows.append(
                {
                    "tokens a step": batch,
                    "told between": f"{number / BINS:.1%} and {(number + 1) / BINS:.1%}",
                    "told, mean": float(predicted[here].mean() / USAGE_SCALE) if here.any() else 0.0,
                    "was used": float(used[here].mean()) if here.any() else 0.0,
                    "share of all": float(here.mean()),
                }
            )
    return rows


def steps(predictor: Predictor, seen: dict[int, LayerRecording], batch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Predicted and true usage of the experts of each layer and step. ``batch`` windows run at a time."""
    first_S = torch.arange(JUDGED_WINDOWS) * WINDOW
    with torch.inference_mode():
        for first_B in first_S.split(batch):
            predictor.forget()
            for layer in range(len(seen) - 1):
                for position in range(WINDOW):
                    row_B = first_B + position
                    hidden_TH, index_TK = seen[layer].hidden_NH[row_B].float(), seen[layer + 1].index_NK[row_B]
                    usage_E = predictor.usage(layer, hidden_TH, index_TK)
                    assert usage_E is not None
                    yield usage_E.numpy(), np.bincount(index_TK.flatten().numpy(), minlength=len(usage_E)) > 0


def costs(model: PreTrainedModel, predictor: Predictor, rounds: int) -> list[dict[str, Any]]:
    """Microseconds of one layer's prediction, and of its experts, all resident. Thread time: other processes don't count."""
    runtime, rows = runtime_of(model), []
    experts = runtime.runners[1].experts
    candidates = {"fitted": predictor, "naive": router_predictor(model)}
    for tokens in COST_TOKENS:
        hidden_TH = torch.randn(tokens, experts.kernel.hidden_size)
        weights_TK, index_TK = torch.rand(tokens, experts.cache.num_experts).topk(runtime.plan.shape.top_k)
        row: dict[str, Any] = {"tokens": tokens}
        with torch.inference_mode():
            for name, layer in product(candidates, (0, 1)):
                run = partial(candidates[name].usage, layer, hidden_TH, index_TK)
                row[f"{name}, layer {layer}, us"] = thread_us(run, rounds)
            row["the experts, us"] = thread_us(partial(runtime.runners[1], hidden_TH, index_TK, weights_TK), rounds)
        rows.append(row)
    return rows


def thread_us(run: Callable[[], object], rounds: int) -> float:
    """Microseconds of a call: the best mean of several."""
    best = float("inf")
    for _ in range(rounds):
        began = time.thread_time()
        for _ in range(CALLS):
            run()
        best = min(best, (time.thread_time() - began) / CALLS)
    return best * US


def losses(model: PreTrainedModel, windows_SW: torch.Tensor, cache_dir: Path) -> list[dict[str, Any]]:
    """Next-token loss of the model, and of the model where each layer but the first executes the predicted experts."""
    rows: list[dict[str, Any]] = []
    exact: torch.Tensor | None = None
    with without_predictor(example_model()) as bare:
        candidates = {"chosen by the router": None, "predicted, fitted": example_model(), "predicted, naive": bare}
        for name, folder in candidates.items():
            judged = model if folder is None else load_fp32(folder, cache_dir, execute_predicted=True)
            with counting(f"loss, {name}", len(windows_SW)) as advance:
                loss, best_N = next_token_loss(judged, windows_SW, advance)
            exact = best_N if exact is None else exact
            same = float((best_N == exact).float().mean())
            figures = {"loss, nats": loss, "perplexity": float(np.exp(loss)), "likeliest token as exact": same}
            rows.append({"experts": name, **figures})
    return rows


@contextmanager
def without_predictor(folder: Path) -> Iterator[Path]:
    """The same checkpoint in a folder of its own, without the predictor beside it."""
    with tempfile.TemporaryDirectory(prefix="epslots-bench-") as other:
        for path in folder.iterdir():
            if path.name != PREDICTOR_FILE_NAME:
                (Path(other) / path.name).symlink_to(path.resolve())
        yield Path(other)


def next_token_loss(
    model: PreTrainedModel, windows_SW: torch.Tensor, advance: Callable[[int], object]
) -> tuple[float, torch.Tensor]:
    """Mean loss in nats, and the likeliest token at each position."""
    total, best = 0.0, []
    predictor = predictor_of(model)
    if predictor is not None:  # each row follows the one before; the first begins
        predictor.set_previous_rows(torch.arange(windows_SW.shape[1] - 1))
    with torch.inference_mode():
        for window_1W in windows_SW.split(1):
            logits_TV = model(input_ids=window_1W[:, :-1], use_cache=False).logits[0].float()
            total += float(functional.cross_entropy(logits_TV, window_1W[0, 1:]))
            best.append(logits_TV.argmax(-1))
            advance(1)
    return total / len(windows_SW), torch.cat(best)
