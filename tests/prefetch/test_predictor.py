"""Routers are found, estimators learn, and what is told comes true as often as it says; on models made on the spot."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

import epslots
from epslots.errors import ConfigError
from epslots.example import example_model
from epslots.models.experts import experts_modules
from epslots.prefetch.fit import FitQuality, FitSettings, count_recalled, fit
from epslots.prefetch.predictor import (
    HISTORY_ROWS,
    SATURATING_CHOICES,
    FittedEstimator,
    Predictor,
    RouterEstimator,
    guess_previous,
)
from epslots.prefetch.predictor_file import (
    PREDICTOR_FILE_NAME,
    PredictorMetadata,
    file_bytes,
    load_predictor,
    read_predictor,
    router_predictor,
    write_predictor,
)
from epslots.prefetch.predictor_kernel import USAGE_MAX, USAGE_SCALE
from epslots.prefetch.recording import HELD_OUT_EVERY, cut_windows, plan_recordings, record
from epslots.prefetch.routers import LinearRouter, agreement, find_routers
from epslots.runtime import runtime_of
from tests.support import zoo

# Layers whose routers are no linear maps of what the experts are given.
WITHOUT = {"zaya": 3, "muse_spark": 2, "deepseek_v4": 1, "doge": 3}
NAMES = [name for name, tiny in zoo.ZOO.items() if tiny.served]


def silent(title: str, total: int) -> nullcontext[Callable[[int], None]]:
    return nullcontext(lambda done: None)


def watched(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Hidden states and choices of each experts module."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, module in zoo.experts_modules(model).items():

        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], name: str = name) -> None:
            seen[name] = args[0].flatten(0, -2), args[1]

        module.register_forward_pre_hook(hook)
    with torch.no_grad():
        model(**inputs)
    return seen


# --- routers


@pytest.mark.parametrize("name", NAMES)
def test_routers_reproduce_the_models_choice(name: str, checkpoint: Callable[[str], Path], shared_stores: Path):
    tiny = zoo.ZOO[name]
    if tiny.rebuilt:
        model = epslots.load(checkpoint(name), slots="100%", device="cpu", cache_dir=shared_stores, progress=False)
    else:
        model = zoo.reference(checkpoint(name))
    inputs = zoo.mixed_inputs(8, 40) if tiny.idle_layers else {"input_ids": zoo.random_ids(8, 40)}
    seen, modules = watched(model, inputs), zoo.experts_modules(model)
    routers = find_routers(model, modules)
    assert len(routers) == len(seen) == tiny.moe_layers
    for number, (router, module) in enumerate(zip(routers, modules, strict=True)):
        if number < WITHOUT.get(name, 0):
            assert router is None
        else:
            assert router is not None and agreement(router, *seen[module]) >= 0.999


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "minimax_m2", "longcat_flash", "lfm2_moe", "inkling2"])
def test_each_part_of_a_router_takes_part(name: str, checkpoint: Callable[[str], Path]):
    """Without its bias, correction or groups, a router of these makes other choices: so the test above has seen them."""
    model = zoo.reference(checkpoint(name))
    seen = watched(model, {"input_ids": zoo.random_ids(8, 40)})
    modules = zoo.experts_modules(model)
    router, module = next(iter(zip(find_routers(model, modules), modules, strict=True)))
    assert router is not None
    bare = LinearRouter(router.weight_EH, torch.zeros_like(router.bias_E))
    assert agreement(bare, *seen[module]) < 0.99


def test_what_looks_like_a_router_and_is_none(checkpoint: Callable[[str], Path]):
    model = zoo.reference(checkpoint("qwen3_moe"))
    modules = zoo.experts_modules(model)
    block: Any = model.get_submodule("model.layers.0.mlp")
    block.gate = nn.Sequential(nn.Linear(zoo.HIDDEN, 8), nn.ReLU(), nn.Linear(8, 8))
    block = model.get_submodule("model.layers.1.mlp")
    block.gate = nn.Linear(zoo.HIDDEN, 9)
    assert [router is None for router in find_routers(model, modules)] == [True, True, False]


def test_routers_of_the_models_type_share_its_weights(checkpoint: Callable[[str], Path]):
    model = zoo.reference(checkpoint("mixtral")).bfloat16()
    modules = zoo.experts_modules(model)
    gate: Any = model.get_submodule("model.layers.0.mlp.gate")
    assert find_routers(model, modules, torch.bfloat16)[0].weight_EH.data_ptr() == gate.weight.data_ptr()  # type: ignore[union-attr]
    exact = find_routers(model, modules)[0]
    assert exact is not None and exact.weight_EH.dtype == exact.bias_E.dtype == torch.float32
    short = find_routers(model, modules, torch.bfloat16)[0]
    rows = torch.randn(20, zoo.HIDDEN)
    assert short is not None and short.logits(rows).dtype == torch.float32
    assert torch.allclose(short.logits(rows), exact.logits(rows), atol=0.05, rtol=0.02)


# --- estimators at run time


def fitted(experts: int = 6, size: int = 5, hidden: int = 3, history: bool = False, seed: int = 0) -> FittedEstimator:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    inputs = 2 * size if history else size
    share_E = torch.rand(experts, generator=generator)
    return FittedEstimator(
        normal(hidden + experts, inputs), normal(hidden + experts), normal(hidden, experts), torch.log1p(-share_E), history
    )


def predictor(*estimators: FittedEstimator | RouterEstimator | None, experts: int = 6) -> Predictor:
    """The last layer has nothing to tell of."""
    layers = [*estimators, None]
    return Predictor(layers, [experts] * len(layers), torch.device("cpu"), torch.float32)


def by_hand(estimator: FittedEstimator, rows: torch.Tensor) -> torch.Tensor:
    """Logits, token by token."""
    hidden = len(estimator.second)
    found = []
    for row in rows:
        both = estimator.first @ row + estimator.first_bias
        inner = both[:hidden] / (1 + torch.exp(-both[:hidden]))
        found.append(both[hidden:] + inner @ estimator.second)
    return torch.stack(found)


@pytest.mark.parametrize("hidden", [0, 3])
@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_usage_is_the_chance_that_any_token_chooses(tokens: int, hidden: int):
    estimator, rows = fitted(hidden=hidden), torch.randn(tokens, 5)
    usage = predictor(estimator).usage(0, rows, torch.zeros(tokens, 2, dtype=torch.int64))
    assert usage is not None and usage.dtype == torch.int32
    chance = torch.sigmoid(by_hand(estimator, rows).double())
    expected = (USAGE_SCALE * (1 - (1 - chance).prod(0))).clamp(max=USAGE_MAX)
    assert (usage - expected).abs().max() <= 0.501


def test_the_certain_and_the_impossible():
    estimator = FittedEstimator(torch.zeros(3, 5), torch.tensor([60.0, 0.0, -60.0]), torch.zeros(0, 3), torch.zeros(3))
    usage = predictor(estimator, experts=3).usage(0, torch.randn(1, 5), torch.zeros(1, 1, dtype=torch.int64))
    assert usage is not None and usage.tolist() == [USAGE_MAX, USAGE_SCALE // 2, 0]
    usage = predictor(estimator, experts=3).usage(0, torch.randn(3, 5), torch.zeros(3, 1, dtype=torch.int64))
    assert usage is not None and usage.tolist() == [USAGE_MAX, USAGE_SCALE * 7 // 8, 0]


def test_no_token_wants_nothing():
    usage = predictor(fitted()).usage(0, torch.zeros(0, 5), torch.zeros(0, 2, dtype=torch.int64))
    assert usage is not None and usage.tolist() == [0] * 6


def test_many_tokens_are_told_of_by_what_is_usual():
    estimator, tokens = fitted(), SATURATING_CHOICES * 6 // 2 + 1
    usage = predictor(estimator).usage(0, torch.randn(tokens, 5), torch.zeros(tokens, 2, dtype=torch.int64))
    expected = (USAGE_SCALE * (1 - torch.exp(estimator.unlikely_E.double() * tokens))).clamp(max=USAGE_MAX)
    assert usage is not None and (usage - expected).abs().max() <= 0.501


def test_identity_experts_are_not_told_of():
    usage = predictor(fitted(experts=8)).usage(0, torch.randn(2, 5), torch.zeros(2, 2, dtype=torch.int64))
    assert usage is not None and usage.shape == (6,)


def test_ids_are_the_likeliest_first():
    estimator, rows = fitted(), torch.randn(4, 5)
    ids = predictor(estimator).ids(0, rows, 3)
    assert ids.dtype == torch.int64
    assert ids.tolist() == by_hand(estimator, rows).argsort(-1, descending=True)[:, :3].tolist()


def test_layers_of_which_nothing_is_told():
    found = predictor(None)
    assert not found.predicts(0) and not found.predicts(1) and predictor(fitted()).predicts(0)
    assert found.usage(0, torch.randn(2, 5), torch.zeros(2, 2, dtype=torch.int64)) is None
    with pytest.raises(ConfigError, match="no estimator predicts the layer after MoE layer 0"):
        found.ids(0, torch.randn(2, 5), 2)


def told(found: Predictor, rows: torch.Tensor) -> torch.Tensor:
    usage = found.usage(0, rows, torch.zeros(len(rows), 2, dtype=torch.int64))
    assert usage is not None
    return usage


def expected(estimator: FittedEstimator, rows: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    logits = by_hand(estimator, torch.cat([rows, before], 1))
    return ((1 - (1 - torch.sigmoid(logits)).prod(0)) * USAGE_SCALE + 0.5).to(torch.int32).clamp(max=USAGE_MAX)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal but for the rounding of what lies between two integers."""
    return bool(((a - b).abs() <= 1).all())


def test_a_token_is_told_of_with_the_one_before():
    """A prompt of two sequences, then two tokens a step."""
    estimator = fitted(history=True)
    found, prompt, steps = predictor(estimator), torch.randn(8, 5), torch.randn(3, 2, 5)
    shifted = torch.cat([torch.zeros(1, 5), prompt[:-1]])
    assert close(told(found, prompt), expected(estimator, prompt, shifted))
    before = prompt[[3, 7]]
    for rows in steps:
        assert close(told(found, rows), expected(estimator, rows, before))
        assert not close(told(predictor(estimator), rows), expected(estimator, rows, before)), "the rows before matter"
        before = rows
    found.forget()
    one = torch.randn(1, 5)
    assert close(told(found, one), expected(estimator, one, torch.zeros(1, 5)))


def test_ids_and_usage_of_one_step_are_of_the_same_rows():
    """Asking for both must not make a token its own predecessor."""
    estimator = fitted(history=True)
    found, steps = predictor(estimator), torch.randn(3, 2, 5)
    before = torch.zeros(2, 5)
    for number, rows in enumerate(steps):
        if number == 0:
            before = torch.cat([torch.zeros(1, 5), rows[:1]])  # as a sequence that begins
        found.ids(0, rows, 2)
        assert close(told(found, rows), expected(estimator, rows, before))
        before = rows


def test_a_caller_says_what_follows_what():
    """A sequence that goes on, one that begins with two tokens, and one that goes on from amid the step before."""
    estimator = fitted(history=True)
    found, first, second = predictor(estimator), torch.randn(5, 5), torch.randn(4, 5)
    told(found, first)
    found.set_previous_rows(torch.tensor([-1, 0, 2, -4]))
    before = torch.stack([first[4], torch.zeros(5), second[1], first[1]])
    assert close(told(found, second), expected(estimator, second, before))
    # Another number of rows than was said: a guess.
    third = torch.randn(2, 5)
    assert close(told(found, third), expected(estimator, third, second[[1, 3]]))


def test_rows_kept_in_place_follow_their_own():
    """A captured step reads and writes the same memory, for any requests; a repeated row changes nothing."""
    estimator = fitted(history=True)
    found, steps = predictor(estimator), torch.randn(3, 3, 5)
    found.keep_rows_at(torch.tensor([2, 0]), 4)
    assert close(told(found, steps[0, :2]), expected(estimator, steps[0, :2], torch.zeros(2, 5)))
    kept = found._state.kept[0].data_ptr()
    found.keep_rows_at(torch.tensor([0, 3, 0]), 4)
    rows = steps[1][[0, 1, 0]]
    before = torch.stack([steps[0, 1], torch.zeros(5), steps[0, 1]])
    assert close(told(found, rows), expected(estimator, rows, before))
    found.keep_rows_at(torch.tensor([0, 2, 3]), 4)
    before = torch.stack([steps[1, 0], steps[0, 0], steps[1, 1]])
    assert close(told(found, steps[2]), expected(estimator, steps[2], before))
    assert found._state.kept[0].data_ptr() == kept
    found.keep_rows_at(None)
    found.forget()
    told(found, steps[0])
    assert close(told(found, steps[1]), expected(estimator, steps[1], steps[0])), "as before"


@pytest.mark.parametrize("tokens", [3, 700])
def test_rows_that_were_not_kept_are_nobody_s(tokens: int):
    """A step that the layer wasn't asked about, or of which there is no more, changes nothing."""
    estimator = fitted(history=True)
    found, second = predictor(estimator), torch.randn(2, 5)
    found.set_previous_rows(torch.tensor([-tokens, -1]))
    assert close(told(found, second), expected(estimator, second, torch.zeros(2, 5)))
    found.forget()
    found.set_previous_rows(None)
    first = torch.randn(tokens, 5)
    told(found, first)
    found.set_previous_rows(torch.tensor([-tokens, -1]))
    before = torch.stack([first[0] if tokens <= HISTORY_ROWS else torch.zeros(5), first[-1]])
    assert close(told(found, second), expected(estimator, second, before))


def test_no_token_leaves_what_was_before():
    estimator = fitted(history=True)
    found, first, second = predictor(estimator), torch.randn(1, 5), torch.randn(1, 5)
    told(found, first)
    assert told(found, first[:0]).tolist() == [0] * 6
    assert close(told(found, second), expected(estimator, second, first))


def test_a_step_that_nobody_asks_about_counts():
    estimator = fitted(history=True)
    found, steps = predictor(estimator), torch.randn(3, 1, 5)
    told(found, steps[0])
    found.skip(0, steps[1])
    found.skip(1, steps[1])
    assert close(told(found, steps[2]), expected(estimator, steps[2], steps[1]))


def test_rows_are_kept_though_the_model_may_change_them():
    estimator = fitted(history=True)
    found, first, second = predictor(estimator), torch.randn(1, 5), torch.randn(1, 5)
    kept = first.clone()
    told(found, first)
    first.zero_()
    assert close(told(found, second), expected(estimator, second, kept))


@given(before=st.integers(0, 12), now=st.integers(0, 12))
def test_guesses(before: int, now: int):
    last, rows = torch.arange(1.0, before + 1)[:, None], torch.arange(101.0, now + 101)[:, None]
    found = guess_previous(last, rows)[:, 0].tolist()
    if now and before >= now and before % now == 0:
        assert found == [(before // now) * (i + 1) for i in range(now)]
    elif now > before:
        assert found == [0.0, *(101.0 + i for i in range(now - 1))]
    else:
        assert found == [0.0] * now


def test_a_naive_predictor_is_the_next_router():
    router = LinearRouter(torch.randn(6, 5), torch.randn(6))
    rows = torch.randn(7, 5)
    found = predictor(RouterEstimator(router, 2))
    assert found.ids(0, rows, 2).tolist() == router.top(rows, 2).tolist()
    usage = found.usage(0, rows[:1], torch.zeros(1, 2, dtype=torch.int64))
    assert usage is not None
    chosen = router.top(rows[:1], 2)[0]
    assert int((usage >= USAGE_SCALE // 2).sum()) == 2 and (usage[chosen] >= USAGE_SCALE // 2).all()


# --- a few rows on a CPU


def chain(found: Predictor) -> Predictor:
    """The same by torch's calls alone."""
    found._kernel_weights = [None] * len(found._kernel_weights)
    return found


@given(
    tokens=st.integers(1, 9),
    hidden=st.integers(0, 4),
    history=st.booleans(),
    kind=st.sampled_from(["fitted", "naive", "identity experts"]),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    seed=st.integers(0, 10_000),
)
def test_a_few_rows_are_told_of_as_many_are(tokens: int, hidden: int, history: bool, kind: str, scale: float, seed: int):
    generator = torch.Generator().manual_seed(seed)
    experts = 8 if kind == "identity experts" else 6
    estimator: FittedEstimator | RouterEstimator = fitted(experts=experts, hidden=hidden, history=history, seed=seed)
    if kind == "naive":
        estimator = RouterEstimator(
            LinearRouter(torch.randn(6, 5, generator=generator), torch.randn(6, generator=generator)), 1 + seed % 6
        )
    one, other = predictor(estimator), chain(predictor(estimator))
    assert one._kernel_weights[0] is not None and one._kernel_weights[0].most_rows >= 9
    for _ in range(3):
        rows = torch.randn(tokens, 5, generator=generator) * scale
        assert close(told(one, rows), told(other, rows))


def test_rows_with_a_gradient_and_in_a_shorter_type():
    found = predictor(fitted(history=True))
    first, second = torch.randn(1, 5), torch.randn(1, 5)
    expected = [told(found, first), told(found, second)]
    found.forget()
    assert torch.equal(told(found, first.clone().requires_grad_()), expected[0])
    assert torch.equal(told(found, torch.randn(5, 1).copy_(second.t()).t()), expected[1])
    found.forget()
    assert close(told(found, first.bfloat16()), told(predictor(fitted(history=True)), first.bfloat16().float()))


def test_what_is_asked_of_many_rows_goes_through_torch():
    """Where arithmetic costs more than calls: one core would take longer than all of them."""
    wide = fitted(experts=6, size=64, hidden=700)
    found = predictor(wide)
    assert found._kernel_weights[0] is not None and found._kernel_weights[0].most_rows == 5
    for tokens in (5, 6):
        rows = torch.randn(tokens, 64)
        assert close(told(found, rows), told(chain(predictor(wide)), rows))


def test_each_thread_has_its_own_history():
    """Two sequences, one in each thread, step by step in turns."""
    estimator = fitted(history=True)
    found, steps = predictor(estimator), torch.randn(2, 4, 1, 5)
    alone = [[told(one, rows) for rows in steps[n]] for n, one in enumerate((predictor(estimator), predictor(estimator)))]
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        for step in range(4):
            for n, thread in enumerate((first, second)):
                assert torch.equal(thread.submit(told, found, steps[n, step]).result(60), alone[n][step])


# --- fitting


def test_windows_hold_text_once_and_the_last_of_it_back():
    texts = [list(range(1000 * n, 1000 * n + 400)) for n in range(1, 12)]
    windows = cut_windows(texts, 10, 3000, end=7, seed=3)
    assert windows.shape == (300, 10) and windows.dtype == torch.int64
    starts = windows[:, 0].tolist()
    assert len(set(starts) - {7}) == len([s for s in starts if s != 7]), "no window comes twice"
    held = windows[-(len(windows) // HELD_OUT_EVERY) :]
    order = [token // 1000 for token in held.flatten().tolist() if token != 7]
    assert len(set(order)) == 1, "what is held back is the end of the joined text"
    taught = {token for token in windows[: -len(held)].flatten().tolist() if token != 7}
    assert not taught & set(held.flatten().tolist())
    assert torch.equal(windows, cut_windows(texts, 10, 3000, end=7, seed=3))
    with pytest.raises(ConfigError, match=r"text of 120 tokens; a fit needs 400 at least"):
        cut_windows([[1] * 120], 10, 1000, end=None, seed=0)


@given(layers=st.integers(1, 40), distance=st.integers(1, 3), fit_in=st.integers(0, 12))
@settings(max_examples=60)
def test_every_pair_is_recorded_together_in_some_pass(layers: int, distance: int, fit_in: int):
    ranges = list(plan_recordings(layers, distance, 100, fit_in * 100))
    together = {n for r in ranges for n in r if n + distance in r}
    assert together == set(range(layers - distance))
    assert all(len(r) <= max(fit_in, distance + 1) for r in ranges)


def test_recall_counts_what_is_among_the_likeliest():
    logits = torch.tensor([[9.0, 8, 7, 6, 5, 4], [9.0, 8, 7, 6, 5, 4]])
    assert count_recalled(logits, torch.tensor([[0, 3], [5, 4]], dtype=torch.int16)).tolist() == [1.0, 2.0]
    assert count_recalled(torch.tensor([[3.0, 2, 1]]), torch.tensor([[0, 2]])).tolist() == [1.0, 2.0], (
        "2k may exceed the experts"
    )


def test_records_are_what_layers_saw(checkpoint: Callable[[str], Path], cache_dir: Path):
    model = epslots.load(checkpoint("qwen3_moe"), slots=4, device="cpu", cache_dir=cache_dir, progress=False)
    windows = zoo.random_ids(5, 16)
    done: list[int] = []
    seen = record(model, windows, range(1, 3), done.append)
    assert seen.keys() == {1, 2} and sum(done) == 5
    expected = watched(zoo.reference(checkpoint("qwen3_moe")), {"input_ids": windows})
    for layer, (hidden, index) in enumerate(expected.values()):
        if layer in seen:
            assert torch.allclose(seen[layer].hidden_NH.float(), hidden, atol=5e-3, rtol=5e-3)
            assert (seen[layer].index_NK.long().sort().values == index.sort().values).float().mean() > 0.99
    assert not any(module._forward_pre_hooks for module in experts_modules(model).values())


def repetitive(count: int, window: int) -> torch.Tensor:
    """Text in which a token tells much of the next: what a tiny random model's layers can be learned from."""
    generator = np.random.default_rng(0)
    text = [16]
    for _ in range(count * window - 1):
        text.append((text[-1] * 5 + int(generator.integers(3))) % 64 + 16)
    return torch.tensor(text).view(count, window)


@pytest.fixture(scope="module")
def trained(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A random model, and estimators of its layers."""
    cache_dir = tmp_path_factory.mktemp("cache")
    model = epslots.load(checkpoint("deepseek_v3"), slots="100%", device="cpu", cache_dir=cache_dir, progress=False)
    settings = FitSettings(window=32, hidden=48, epochs=4, batch=256, tokens=12_800)
    state = torch.random.get_rng_state()
    fits, quality = fit(model, repetitive(400, 32), settings, silent)
    assert torch.equal(state, torch.random.get_rng_state()), "a fit leaves the user's random numbers alone"
    return {"model": model, "fits": fits, "quality": quality, "settings": settings}


def test_a_fit_beats_the_naive_router(trained: dict[str, Any]):
    fits, quality = trained["fits"], trained["quality"]
    assert [f is None for f in fits] == [q is None for q in quality] == [False, False]
    assert quality[1].naive is None and quality[1].fitted[0] > 0.5, "what comes with the next token follows from this one"
    assert quality[0].naive is not None
    assert quality[0].fitted[0] > quality[0].naive[0] + 0.05 and quality[0].fitted[1] >= quality[0].naive[1]


def test_what_is_told_comes_true_as_often_as_it_says(trained: dict[str, Any]):
    """On new text, in the steps of a running model: single tokens, told of by the predictor."""
    model, (first, _) = trained["model"], trained["fits"]
    windows = repetitive(700, 32)[-60:]
    seen = record(model, windows, range(2), lambda done: None)
    estimator = Predictor([first, None], [16, 16], torch.device("cpu"), torch.float32)
    told, was = [], []
    for row in range(len(seen[0].hidden_NH)):
        usage = estimator.usage(0, seen[0].hidden_NH[row : row + 1].float(), seen[0].index_NK[row : row + 1])
        assert usage is not None
        told.append(usage.numpy())
        was.append(np.bincount(seen[1].index_NK[row].numpy(), minlength=16))
    chance, used = np.concatenate(told) / USAGE_SCALE, np.concatenate(was)
    for low in np.arange(0, 1, 0.25):
        here = (chance >= low) & (chance < low + 0.25)
        if here.sum() > 500:
            assert abs(chance[here].mean() - used[here].mean()) < 0.05
    assert abs(chance.mean() - used.mean()) < 0.01


def test_an_estimator_that_learned_nothing_yields_to_the_router(checkpoint: Callable[[str], Path], cache_dir: Path):
    """With a rate that wrecks what it trains, what remains is the naive order of the experts, and calibrated."""
    model = epslots.load(checkpoint("olmoe"), slots="100%", device="cpu", cache_dir=cache_dir, progress=False)
    windows = zoo.random_ids(100, 32)
    settings = FitSettings(window=32, hidden=4, epochs=1, batch=64, rate=30.0)
    fits, quality = fit(model, windows, settings, silent)
    first, router = fits[0], find_routers(model, experts_modules(model))[1]
    assert first is not None and router is not None and quality[0] is not None
    assert quality[0].fitted == quality[0].naive and not first.history and len(first.second) == 0
    rows = torch.randn(50, zoo.HIDDEN)
    assert first.scores(rows).topk(4).indices.tolist() == router.top(rows, 4).tolist()
    seen = record(model, windows, range(1), lambda done: None)[0]
    assert torch.sigmoid(first.scores(seen.hidden_NH.float())).sum(-1).mean() == pytest.approx(4, abs=0.2)


def test_a_layer_without_a_router_is_learned_from_nothing(checkpoint: Callable[[str], Path], cache_dir: Path):
    model = epslots.load(checkpoint("zaya"), slots="100%", device="cpu", cache_dir=cache_dir, progress=False)
    _, quality = fit(model, zoo.random_ids(100, 32), FitSettings(window=32, hidden=8, epochs=2, batch=128), silent)
    assert all(q is not None and q.naive is None and q.fitted[0] > 1 / 8 for q in quality[:-1])
    assert not any(map(router_predictor(model).predicts, range(3)))


def test_layers_that_text_passes_by_are_not_told_of(checkpoint: Callable[[str], Path], cache_dir: Path):
    model = epslots.load(checkpoint("ernie4_5_vl_moe"), slots="100%", device="cpu", cache_dir=cache_dir, progress=False)
    windows = zoo.random_ids(50, 16)
    fits, _ = fit(model, windows, FitSettings(window=16, hidden=0, epochs=1, batch=64), silent)
    assert [f is None for f in fits] == [True] * 4, "each layer of text experts is followed by one of vision experts"


def test_layers_that_see_some_of_the_tokens_are_not_told_of(checkpoint: Callable[[str], Path], cache_dir: Path):
    """Every other token counts as an image's: hidden states and tokens would no longer match."""
    model: Any = epslots.load(checkpoint("ernie4_5_vl_moe"), slots="100%", device="cpu", cache_dir=cache_dir, progress=False)
    decoder = model.get_decoder()

    def mixed(input_ids: torch.Tensor, **settings: Any) -> Any:
        return decoder(input_ids=input_ids, moe_mm_token_type_ids=torch.arange(16).remainder(2).expand(4, -1), **settings)

    assert record(model, zoo.random_ids(4, 16), range(4), lambda done: None).keys() == {0, 2}
    model.get_decoder = lambda: mixed
    assert not record(model, zoo.random_ids(4, 16), range(4), lambda done: None)


# --- the file


@pytest.fixture
def written(trained: dict[str, Any], tmp_path: Path) -> Path:
    about = PredictorMetadata(
        checkpoint=runtime_of(trained["model"]).checkpoint,
        model="tiny",
        experts=[16, 16],
        tokens=12_800,
        settings=trained["settings"],
        quality=trained["quality"],
    )
    write_predictor(tmp_path / "p.safetensors", trained["fits"], about)
    return tmp_path / "p.safetensors"


def test_a_predictor_comes_back_from_its_file(trained: dict[str, Any], written: Path):
    model, (first, _) = trained["model"], trained["fits"]
    found = load_predictor(written, model)
    rows = torch.randn(50, zoo.HIDDEN)
    rows = torch.cat([rows, torch.randn(50, zoo.HIDDEN)], 1) if first.history else rows
    loaded = found.estimators[0]
    assert loaded is not None and found.predicts(0) and found.predicts(1)
    assert torch.allclose(loaded.scores(rows), first.scores(rows), atol=0.1), "weights are kept in bfloat16"
    _, about = read_predictor(written)
    assert about.quality == trained["quality"] and about.settings == trained["settings"]
    assert [path.name for path in written.parent.iterdir()] == [written.name]


def test_a_predictor_of_another_checkpoint_is_refused(written: Path, checkpoint: Callable[[str], Path], cache_dir: Path):
    other = epslots.load(checkpoint("kimi"), slots=8, device="cpu", cache_dir=cache_dir, progress=False)
    with pytest.raises(ConfigError, match=r"was fitted to another checkpoint \(tiny, content .*fit it anew"):
        load_predictor(written, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "has format 2; allowed: 1"),
        ({"experts": [16]}, "2 qualities for 1 layers"),
        ({"experts": [16, 12]}, r"predicts layers with \[16, 12\] experts; this model has \[16, 16\]"),
        ({"experts": [16, 17]}, "layer 0 predicts 16 experts, which no layer has"),
        (
            {"experts": [16, 16, 16], "quality": [None] * 2 + [{"naive": None, "fitted": [1.0, 1.0], "history": False}]},
            "'2.first'",
        ),
        ({"settings": {"distance": 2}}, "layer 0 predicts 16 experts, which no layer has"),
        ({"checkpoint": 3}, "is not a predictor: Expected `str`"),
        ({"experts": [16, 0]}, r"layers of \[16, 0\] experts, 1 layers ahead; allowed: 1 and more"),
        ({"experts": [16, 2**40]}, "2 layers of up to 1099511627776 experts on 1 ranks: allowed"),
        ({"experts": [], "quality": []}, "allowed: 1 and more"),
        ({"settings": {"distance": -5}}, "-5 layers ahead; allowed: 1 and more"),
    ],
)
def test_files_that_say_what_is_not_so(trained: dict[str, Any], written: Path, change: dict[str, Any], message: str):
    _, about = read_predictor(written)
    told = json.loads(_metadata(written)) | change
    save_file(load_file(written), written, metadata={"epslots-predictor": json.dumps(told)})
    with pytest.raises(ConfigError, match=message):
        load_predictor(written, trained["model"])
    assert about.model == "tiny"


def _metadata(path: Path) -> str:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        text: str = file.metadata()["epslots-predictor"]
    return text


@pytest.mark.parametrize(
    ("tensor", "value"),
    [
        ("0.first", torch.zeros(7, 64)),
        ("0.first_bias", torch.zeros(2, 2)),
        ("0.first", torch.zeros(7)),
        ("0.unlikely", torch.full((16,), float("nan"))),
    ],
)
def test_tensors_that_do_not_fit_together(trained: dict[str, Any], written: Path, tensor: str, value: torch.Tensor):
    metadata = {"epslots-predictor": _metadata(written)}
    save_file(load_file(written) | {tensor: value}, written, metadata=metadata)
    with pytest.raises(ConfigError, match=r"the tensors of layer 0 .* don't fit together"):
        load_predictor(written, trained["model"])


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_tensors_of_other_types_are_refused_unread(trained: dict[str, Any], written: Path, dtype: torch.dtype):
    metadata = {"epslots-predictor": _metadata(written)}
    save_file(load_file(written) | {"0.second": torch.zeros(48, 16, dtype=dtype)}, written, metadata=metadata)
    for read in (load_predictor, lambda path, _: file_bytes(path, torch.device("cpu"), torch.float32)):
        with pytest.raises(ConfigError, match=r"its tensor 0\.second is .*; allowed: BF16, F16, F32, F64"):
            read(written, trained["model"])


def test_sizes_of_a_strange_predictor_are_those_of_its_tensors(trained: dict[str, Any], written: Path):
    told = json.loads(_metadata(written))
    told["quality"][0] = {"naive": None, "fitted": [1.0, 1.0], "history": True}
    tensors = load_file(written) | {"0.first": torch.zeros(7), "other": torch.zeros(1000)}
    save_file(tensors, written, metadata={"epslots-predictor": json.dumps(told)})
    total, _ = file_bytes(written, torch.device("cpu"), torch.float32)
    own = {key: tensor for key, tensor in tensors.items() if key != "other"}
    assert total == sum(4 * tensor.numel() for tensor in own.values())


def test_metadata_nested_without_end_is_refused(written: Path):
    text = _metadata(written)[:-1] + ', "more": ' + "[" * 100_000 + "]" * 100_000 + "}"
    save_file(load_file(written), written, metadata={"epslots-predictor": text})
    with pytest.raises(ConfigError, match="is not a predictor"):
        read_predictor(written)


def test_a_predictor_is_not_taken_for_weights(written: Path):
    """Loaders of weights take every file of these kinds in a folder."""
    assert not PREDICTOR_FILE_NAME.endswith(
        (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".npz")
    )
    assert [path.name for path in example_model().glob("*.safetensors")] == ["model.safetensors"]
    assert (example_model() / PREDICTOR_FILE_NAME).is_file()


def test_files_that_are_no_predictors(trained: dict[str, Any], tmp_path: Path, checkpoint: Callable[[str], Path]):
    text, weights = tmp_path / "text", next(checkpoint("mixtral").glob("*.safetensors"))
    text.write_text("no tensors")
    for path, message in (
        (tmp_path / "missing", "no such file; `epslots predict fit` makes one"),
        (text, "is not a predictor"),
        (weights, "its metadata has no 'epslots-predictor'"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_predictor(path, trained["model"])
    with pytest.raises(ConfigError, match="can't be written"):
        write_predictor(tmp_path / "no" / "folder", trained["fits"], read_quality(trained))


def read_quality(trained: dict[str, Any]) -> PredictorMetadata:
    quality: list[FitQuality | None] = trained["quality"]
    return PredictorMetadata(checkpoint="x", model="x", experts=[16, 16], tokens=1, settings=FitSettings(), quality=quality)
