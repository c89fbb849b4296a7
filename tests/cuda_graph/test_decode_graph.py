"""Decoding by a step of fixed shape: plain transformers' tokens, the usual path's hits and misses, and no value asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import epslots
from epslots.cache.slot_pool import SlotPool
from epslots.cuda_graph.decode_graph import DecodeGraph
from epslots.cuda_graph.static_cache import make_static_cache, tensor_addresses
from epslots.errors import ConfigError, CorruptExpertError
from epslots.runtime import runtime_of
from tests.support import zoo
from tests.support.device_slot_helpers import NoValues

TOLERANCE = 2e-5
SERVED = [name for name, tiny in zoo.ZOO.items() if tiny.interface or tiny.decorate]
# Refused: those that have no static cache, beyond a window, or in a graph. See below.
NOT_STATIC, WINDOW_ALONE, NOT_CAPTURED = {"deepseek_v4", "minimax"}, {"inkling2"}, {"qwen4_exp"}


def load(folder: Path, cache_dir: Path, **settings: Any) -> PreTrainedModel:
    settings = {"slots": "50%", "device": "cpu", "dtype": "float32", "progress": False} | settings
    return epslots.load(folder, cache_dir=cache_dir, **settings)


def greedy(model: PreTrainedModel, ids: torch.Tensor, new_tokens: int, mask: torch.Tensor | None = None) -> list[list[int]]:
    mask = torch.ones_like(ids) if mask is None else mask
    settings = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(ids, attention_mask=mask, **settings).tolist()


def padded(batch: int, length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of different lengths, padded on the left."""
    ids, mask = zoo.random_ids(batch, length, seed=seed), torch.ones(batch, length, dtype=torch.int64)
    for row in range(batch - 1):
        mask[row, : 2 * row + 1] = 0
        ids[row, : 2 * row + 1] = 0
    return ids, mask


@pytest.mark.parametrize("name", sorted({*SERVED} - NOT_STATIC - WINDOW_ALONE))
def test_tokens_and_logits_equal(name: str, checkpoint: Callable[[str], Path], cache_dir: Path):
    """One sequence, then two of different lengths, from one model; slots for half of the experts, or for all."""
    folder = checkpoint(name)
    reference = zoo.reference(folder)
    tiny = zoo.ZOO[name]
    model = load(folder, cache_dir, slots=max(2 * tiny.top_k, tiny.num_experts // 2))
    graph = DecodeGraph(model, 1, 24)
    assert graph.obstacle is None
    prompt = zoo.random_ids(1, 9, seed=2)
    assert graph.generate(prompt, 14).tolist() == greedy(reference, prompt, 14)
    runtime_of(model).check_integrity()

    pair = DecodeGraph(model, 2, 16)
    ids, mask = padded(2, 8, seed=3)
    sequence, columns = ids, mask
    found = pair.prefill(ids, mask).clone()
    with pair, torch.no_grad():
        for _ in range(5):
            positions = (columns.cumsum(1) - 1).clamp(min=0)
            expected = reference(input_ids=sequence, attention_mask=columns, position_ids=positions).logits[:, -1]
            assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()
            tokens = expected.argmax(-1)
            sequence = torch.cat([sequence, tokens[:, None]], 1)
            columns = torch.cat([columns, torch.ones_like(tokens[:, None])], 1)
            found = pair.step(tokens).clone()
    runtime_of(model).check_integrity()


def steps_of(model: Any) -> tuple[int, int]:
    """A model's steps, and those without a miss."""
    stats = epslots.stats(model)
    return stats.steps, stats.zero_miss_steps


@pytest.mark.parametrize("name", ["qwen3_moe", "gemma4", "longcat_flash"])
def test_the_device_leaves_behind_what_the_host_would(name: str, checkpoint: Callable[[str], Path], tmp_path: Path):
    """The same text by the usual path and by the device, twice: the same counters, tables and histories."""
    folder, prompt = checkpoint(name), zoo.random_ids(1, 9, seed=5)
    slots = max(zoo.ZOO[name].top_k, zoo.ZOO[name].num_experts // 3)
    usual, other = (load(folder, tmp_path / which, slots=slots, policy="lrfu") for which in ("usual", "other"))
    graph = DecodeGraph(other, 1, 40, policy="lrfu")
    for _ in range(2):
        assert graph.generate(prompt, 30).tolist() == greedy(usual, prompt, 30)
        for mine, yours in zip(epslots.stats(other).layers, epslots.stats(usual).layers, strict=True):
            for field in ("steps", "hits", "misses", "passes", "evictions", "host_bytes", "tokens_per_expert"):
                assert getattr(mine, field) == getattr(yours, field), field
            assert mine.misses > 0 or not mine.steps
        assert steps_of(other) == steps_of(usual)
        for one, two in zip(runtime_of(other).loaders, runtime_of(usual).loaders, strict=True):
            assert np.array_equal(one.pool.slot_of, two.pool.slot_of)
            assert np.array_equal(one.pool.expert_of, two.pool.expert_of)
        for a, b in zip(runtime_of(other).runners, runtime_of(usual).runners, strict=True):
            assert a.steps == b.steps
            for field in ("last_use", "decayed"):
                assert np.array_equal(getattr(a.history, field), getattr(b.history, field)), field


def test_no_prefetch_goes_to_slots_that_the_device_rules(checkpoint: Callable[[str], Path], tmp_path: Path):
    folder, prompt = checkpoint("qwen3_moe"), zoo.random_ids(1, 9, seed=5)
    model = load(folder, tmp_path, slots="50%", link="20MB/s,200us")
    graph, expected = DecodeGraph(model, 1, 60), greedy(zoo.reference(folder), prompt, 40)
    assert graph.generate(prompt, 40).tolist() == expected
    runtime_of(model).check_integrity()
    before = sum(layer.prefetches for layer in epslots.stats(model).layers)
    assert greedy(model, prompt, 40) == expected
    assert sum(layer.prefetches for layer in epslots.stats(model).layers) > before, "the usual path predicts again"


class TablesApart(SlotPool):
    """A pool whose device tables are memory of their own, as on a GPU: each side knows what it was told."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.slot_of_device, self.expert_of_device = self.slot_of_device.clone(), self.expert_of_device.clone()

    def publish(self, layer: int) -> None:
        window = self.window(layer)
        self.slot_of_device[layer].copy_(torch.from_numpy(self.slot_of[layer]))
        self.expert_of_device[window].copy_(torch.from_numpy(self.expert_of[window]))


class Replayed:
    """What stands for a captured step: runs it, and leaves behind no trace of having gone through Python."""

    def __init__(self, graph: DecodeGraph) -> None:
        self.graph = graph
        for runner, experts in zip(graph._runtime.runners, graph._experts, strict=True):
            graph._runtime.telemetry.count(runner.index, steps=1, passes=1)  # capturing does
            experts.calls += 1
        graph._runtime.telemetry.count_steps(steps=1, missed=0)

    def replay(self) -> None:
        calls = [experts.calls for experts in self.graph._experts]
        self.graph._forward()
        for runner, experts, before in zip(self.graph._runtime.runners, self.graph._experts, calls, strict=True):
            self.graph._runtime.telemetry.count(runner.index, steps=before - experts.calls, passes=before - experts.calls)
            experts.calls = before
        self.graph._runtime.telemetry.count_steps(steps=-1, missed=0)


def test_replayed_steps_on_tables_of_their_own(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The way through graphs, with CUDA's part played: what is counted and handed over is what the usual path leaves."""
    folder, prompt = checkpoint("qwen3_moe"), zoo.random_ids(1, 9, seed=5)
    usual = load(folder, tmp_path / "usual", slots=5, policy="lrfu")
    monkeypatch.setattr("epslots.loading.SlotPool", TablesApart)
    model = load(folder, tmp_path / "other", slots=5, policy="lrfu")
    monkeypatch.setattr(DecodeGraph, "_forward_on_side_stream", DecodeGraph._forward)
    monkeypatch.setattr(DecodeGraph, "_capture_step", lambda self: Replayed(self))
    graph = DecodeGraph(model, 1, 40, policy="lrfu")
    graph._capture = True
    for turn in range(2):
        assert graph.generate(prompt, 30).tolist() == greedy(usual, prompt, 30)
        assert graph.replays == (27, 27 + 29)[turn]
        for mine, yours in zip(epslots.stats(model).layers, epslots.stats(usual).layers, strict=True):
            for field in ("steps", "hits", "misses", "passes", "evictions", "host_bytes", "tokens_per_expert"):
                assert getattr(mine, field) == getattr(yours, field), field
        assert steps_of(model) == steps_of(usual)
        assert 0 < epslots.stats(model).zero_miss_steps < epslots.stats(model).steps
        runtime_of(model).check_integrity()
        assert np.array_equal(runtime_of(model).loaders[0].pool.slot_of, runtime_of(usual).loaders[0].pool.slot_of)


@pytest.mark.parametrize("name", sorted({*SERVED} - NOT_STATIC - NOT_CAPTURED))
@pytest.mark.parametrize("slots", ["some", "100%"])
def test_a_step_could_be_captured(
    name: str, slots: str, checkpoint: Callable[[str], Path], cache_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    """Nothing in a step asks for a value, and the cache stays where it is, when transformers believes that it is captured.

    Copies into slots aside, which are Triton's part on a GPU.
    """
    tiny = zoo.ZOO[name]
    model = load(checkpoint(name), cache_dir, slots="100%" if slots == "100%" else max(tiny.top_k, tiny.num_experts // 2))
    graph = DecodeGraph(model, 1, 16)
    token = graph.prefill(zoo.random_ids(1, 6, seed=1)).argmax(-1)
    with graph:
        graph.step(token)
        before = tensor_addresses(graph._cache)
        assert before
        monkeypatch.setattr("epslots.cuda_graph.device_slots.TorchKernels.copy", lambda *_: None)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with NoValues():
            graph.step(token)
        assert tensor_addresses(graph._cache) == before


def test_the_host_is_not_asked_and_looks_at_no_plan(checkpoint: Callable[[str], Path], cache_dir: Path):
    model = load(checkpoint("qwen3_moe"), cache_dir)
    runners = runtime_of(model).runners
    graph = DecodeGraph(model, 1, 20)
    token = graph.prefill(zoo.random_ids(1, 6, seed=1)).argmax(-1)
    steps = [runner.steps for runner in runners]
    with graph:
        graph.step(token)
        assert all(runner.slots_are_lent for runner in runners) and all(one.calls == 1 for one in graph._experts)
        assert [runner.steps for runner in runners] == steps, "the host's plan was not made"
    assert [runner.steps for runner in runners] == [step + 1 for step in steps]
    assert not any(runner.slots_are_lent for runner in runners)


@pytest.mark.parametrize("policy", ["lru", "lfu", "lrfu", "adaptive"])
def test_any_policy_gives_the_same_tokens(policy: str, checkpoint: Callable[[str], Path], cache_dir: Path):
    folder, prompt = checkpoint("mixtral"), zoo.random_ids(1, 9, seed=7)
    model = load(folder, cache_dir, slots=3, policy="lfu")
    expected = greedy(zoo.reference(folder), prompt, 20)
    assert DecodeGraph(model, 1, 40, policy=policy).generate(prompt, 20).tolist() == expected
    assert greedy(model, prompt, 20) == expected


def test_too_few_slots_take_the_usual_path(checkpoint: Callable[[str], Path], cache_dir: Path):
    folder, prompt = checkpoint("qwen3_moe"), zoo.random_ids(2, 9, seed=7)
    top_k = zoo.ZOO["qwen3_moe"].top_k
    model = load(folder, cache_dir, slots=2 * top_k - 1)
    graph = DecodeGraph(model, 2, 20)
    assert graph.obstacle is not None and f"{2 * top_k - 1} slots, and a step may need {2 * top_k}" in graph.obstacle
    assert graph.generate(prompt, 8).tolist() == greedy(zoo.reference(folder), prompt, 8)
    assert DecodeGraph(model, 1, 20).obstacle is None


def test_slots_that_move_between_layers_are_followed(checkpoint: Callable[[str], Path], cache_dir: Path):
    folder, prompt = checkpoint("qwen3_moe"), zoo.random_ids(1, 9, seed=8)
    model = load(folder, cache_dir, slots=8)
    runtime = runtime_of(model)
    graph = DecodeGraph(model, 1, 30)
    expected = greedy(zoo.reference(folder), prompt, 15)
    assert graph.generate(prompt, 15).tolist() == expected
    quotas = [8] * len(runtime.layers)
    quotas[0], quotas[1] = 6, 10
    runtime.divide(quotas)
    assert graph.generate(prompt, 15).tolist() == expected
    runtime.check_integrity()
    misses = epslots.stats(model).misses
    for fewest, obstacle in ((zoo.ZOO["qwen3_moe"].top_k - 1, True), (8, False)):
        quotas[0], quotas[1] = fewest, 16 - fewest
        runtime.divide(quotas)
        assert graph.generate(prompt, 15).tolist() == expected
        assert (graph.obstacle is not None) == obstacle
        runtime.check_integrity()
    assert epslots.stats(model).misses > misses


def test_other_use_in_between_is_refused(checkpoint: Callable[[str], Path], cache_dir: Path):
    folder, prompt = checkpoint("qwen3_moe"), zoo.random_ids(1, 9, seed=8)
    model = load(folder, cache_dir)
    one, two = DecodeGraph(model, 1, 30), DecodeGraph(model, 1, 30)
    token = one.prefill(prompt).argmax(-1)
    two.prefill(prompt)
    one.step(token)
    with pytest.raises(ConfigError, match="close the DecodeGraph"):
        model(prompt)
    with pytest.raises(ConfigError, match="another DecodeGraph"):
        two.step(token)
    one.close()
    two.step(token)
    two.close()
    assert greedy(model, prompt, 5) == greedy(zoo.reference(folder), prompt, 5)


def test_a_corrupt_record_ends_the_step_and_nothing_else(
    checkpoint: Callable[[str], Path], cache_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    folder, prompt = checkpoint("qwen3_moe"), zoo.random_ids(1, 9, seed=8)
    model = load(folder, cache_dir, slots=5)
    graph = DecodeGraph(model, 1, 40)
    expected = greedy(zoo.reference(folder), prompt, 25)
    graph.prefill(prompt)

    def corrupt(layer: int, expert: int) -> torch.Tensor:
        raise CorruptExpertError("a layer", expert, "a test")

    with monkeypatch.context() as patch:
        patch.setattr(runtime_of(model).store, "record", corrupt)
        with pytest.raises(CorruptExpertError):
            [graph.step(torch.tensor([token])) for token in expected[0][9:]]
    assert not any(runner.slots_are_lent for runner in runtime_of(model).runners), "the slots are given back"
    runtime_of(model).check_integrity()
    assert graph.generate(prompt, 25).tolist() == expected


def test_routes_are_observed(checkpoint: Callable[[str], Path], cache_dir: Path):
    model = load(checkpoint("qwen3_moe"), cache_dir)
    seen: list[tuple[int, ...]] = []
    runtime_of(model).runners[0].observe(lambda layer, index_TK: seen.append((layer, *index_TK.shape)))
    DecodeGraph(model, 1, 30).generate(zoo.random_ids(1, 9, seed=8), 4)
    top_k = zoo.ZOO["qwen3_moe"].top_k
    assert seen == [(0, 9, top_k), *[(0, 1, top_k)] * 3]


@pytest.mark.parametrize("name", sorted(NOT_STATIC | WINDOW_ALONE))
def test_models_without_a_static_cache_are_refused(name: str, checkpoint: Callable[[str], Path], cache_dir: Path):
    message = (
        "window of 16 tokens: allowed: up to max_tokens=16$" if name in WINDOW_ALONE else "can't decode from a static cache"
    )
    with pytest.raises(ConfigError, match=message):
        DecodeGraph(load(checkpoint(name), cache_dir), 1, 24)


def test_steps_that_ask_the_host_are_not_captured():
    for name in NOT_CAPTURED:
        make_static_cache(zoo.ZOO[name].build(), 24, captured=False)
        with pytest.raises(ConfigError, match="asks the host for values in each step; allowed: capture=False"):
            make_static_cache(zoo.ZOO[name].build(), 24, captured=True)


def test_what_is_refused(checkpoint: Callable[[str], Path], cache_dir: Path):
    model = load(checkpoint("qwen3_moe"), cache_dir, kv_tokens=64)
    with pytest.raises(ConfigError, match="kv_tokens=80"):
        DecodeGraph(model, 2, 40)
    with pytest.raises(ConfigError, match="at least one sequence"):
        DecodeGraph(model, 0, 40)
    with pytest.raises(ConfigError, match="CUDA graphs need a GPU"):
        DecodeGraph(model, 1, 40, capture=True)
    with pytest.raises(ConfigError, match="not loaded by"):
        DecodeGraph(zoo.reference(checkpoint("qwen3_moe")), 1, 40)
    graph = DecodeGraph(model, 2, 12)
    with pytest.raises(ConfigError, match="prefill first"):
        graph.step(torch.tensor([20, 20]))
    with pytest.raises(ConfigError, match="2 prompts of 1 to 11 tokens"):
        graph.prefill(zoo.random_ids(1, 5))
    with pytest.raises(ConfigError, match="2 prompts of 1 to 11 tokens"):
        graph.prefill(zoo.random_ids(2, 12))
    with pytest.raises(ConfigError, match="padded on the left"):
        graph.prefill(zoo.random_ids(2, 5), torch.tensor([[1, 1, 1, 1, 0]] * 2))
    with pytest.raises(ConfigError, match="allowed: 1 to 7"):
        graph.generate(zoo.random_ids(2, 5), 8)
    graph.prefill(zoo.random_ids(2, 11))
    graph.step(torch.tensor([20, 20]))
    with pytest.raises(ConfigError, match="have 12 tokens"):
        graph.step(torch.tensor([20, 20]))
    with pytest.raises(ConfigError, match="'fifo': the device knows lru, lfu, lrfu, adaptive"):
        DecodeGraph(model, 2, 12, policy="fifo")
