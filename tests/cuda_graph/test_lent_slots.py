"""Slots lent to the device's decision, on the CPU: the usual path's tokens, hits and misses, and its tables afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import epslots
from epslots.cuda_graph.lent_slots import LentSlots, device_obstacle, most_rows
from epslots.errors import ConfigError, CorruptExpertError
from epslots.generation.captured_decoding import CapturedDecoding
from epslots.runtime import runtime_of
from tests.support import zoo
from tests.support.remembered import Reference

COUNTED = ("steps", "hits", "misses", "passes", "evictions", "host_bytes", "tokens_per_expert")


def load(folder: Path, cache_dir: Path, **settings: Any) -> PreTrainedModel:
    settings = {"slots": "50%", "device": "cpu", "dtype": "float32", "progress": False} | settings
    return epslots.load(folder, cache_dir=cache_dir, **settings)


def greedy(model: PreTrainedModel | Reference, ids: torch.Tensor, new_tokens: int) -> list[list[int]]:
    settings = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **settings).tolist()


@contextmanager
def lent(model: PreTrainedModel, **settings: Any) -> Iterator[LentSlots]:
    """The device decides within the context, for one token at a time."""
    slots = LentSlots(runtime_of(model), runtime_of(model).plan.shape.top_k, **settings)
    slots.take()
    try:
        yield slots
    finally:
        slots.give_back()


@torch.no_grad()
def decode(model: PreTrainedModel, ids: torch.Tensor, new_tokens: int, **settings: Any) -> list[list[int]]:
    """Greedy tokens: the prompt in the usual way, all others by the device's decision."""
    output, tokens = model(ids, use_cache=True), ids
    with lent(model, **settings) as slots:
        for _ in range(new_tokens - 1):
            tokens = torch.cat([tokens, output.logits[:, -1:].argmax(-1)], 1)
            with slots.step(torch.ones(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), 1):
                output = model(tokens[:, -1:], past_key_values=output.past_key_values, use_cache=True)
    return torch.cat([tokens, output.logits[:, -1:].argmax(-1)], 1).tolist()


@pytest.mark.parametrize("name", ["qwen3_moe", "gemma4", "longcat_flash"])
def test_the_device_leaves_behind_what_the_host_would(name: str, checkpoint: Callable[[str], Path], tmp_path: Path):
    """The same text by the usual path and by the device, twice: the same counters, tables and histories."""
    folder, prompt = checkpoint(name), zoo.random_ids(1, 9, seed=5)
    slots = max(zoo.ZOO[name].top_k, zoo.ZOO[name].num_experts // 3)
    usual, other = (load(folder, tmp_path / which, slots=slots, policy="lrfu") for which in ("usual", "other"))
    for _ in range(2):
        assert decode(other, prompt, 30, policy="lrfu") == greedy(usual, prompt, 30)
        mine, yours = epslots.stats(other), epslots.stats(usual)
        for one, two in zip(mine.layers, yours.layers, strict=True):
            for field in COUNTED:
                assert getattr(one, field) == getattr(two, field), field
            assert one.misses > 0 or not one.steps
        assert (mine.steps, mine.zero_miss_steps) == (yours.steps, yours.zero_miss_steps)
        for a, b in zip(runtime_of(other).loaders, runtime_of(usual).loaders, strict=True):
            assert np.array_equal(a.pool.slot_of, b.pool.slot_of)
            assert np.array_equal(a.pool.expert_of, b.pool.expert_of)
        for c, d in zip(runtime_of(other).runners, runtime_of(usual).runners, strict=True):
            assert c.steps == d.steps
            for field in ("last_use", "decayed"):
                assert np.array_equal(getattr(c.history, field), getattr(d.history, field)), field


def test_the_device_prefetches_for_the_next_layer(checkpoint: Callable[[str], Path], tmp_path: Path):
    """By the model's predictor, whose verdict goes to and fro; not for the first layer, which the last one predicts."""
    folder, prompt = checkpoint("qwen3_moe"), zoo.random_ids(1, 9, seed=5)
    model = load(folder, tmp_path, slots="50%", link="20MB/s,200us")
    expected = greedy(Reference(folder), prompt, 40)
    assert decode(model, prompt, 40) == expected
    runtime_of(model).check_integrity()
    first, *others = [layer.prefetches for layer in epslots.stats(model).layers]
    assert min(others) > 0 == first
    assert greedy(model, prompt, 40) == expected
    assert epslots.stats(model).total("prefetches") > sum(others), "the usual path goes on predicting"


@pytest.mark.parametrize("policy", ["lru", "lfu", "lrfu", "adaptive"])
def test_any_policy_gives_the_same_tokens(policy: str, checkpoint: Callable[[str], Path], cache_dir: Path):
    folder, prompt = checkpoint("mixtral"), zoo.random_ids(1, 9, seed=7)
    model = load(folder, cache_dir, slots=3, policy="lfu")
    expected = greedy(Reference(folder), prompt, 20)
    assert decode(model, prompt, 20, policy=policy) == expected
    assert greedy(model, prompt, 20) == expected


def test_slots_bound_the_rows_of_a_step(checkpoint: Callable[[str], Path], cache_dir: Path):
    """Each may need other experts; layers with a slot for all don't count."""
    top_k = zoo.ZOO["qwen3_moe"].top_k
    runtime = runtime_of(load(checkpoint("qwen3_moe"), cache_dir, slots=2 * top_k - 1))
    assert most_rows(runtime) == 1
    assert device_obstacle(runtime, top_k) is None
    found = device_obstacle(runtime, 2 * top_k)
    assert found is not None and f"{2 * top_k - 1} slots, and a step may need {2 * top_k}" in found
    resident = runtime_of(load(checkpoint("qwen3_moe"), cache_dir, slots="100%"))
    assert most_rows(resident) is None and device_obstacle(resident, 10**6) is None


def test_captured_rows_never_exceed_the_planned_ones(
    checkpoint: Callable[[str], Path], cache_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    """Slots that have moved to another layer make room for more: the memory plan has counted the graphs of fewer."""
    top_k = zoo.ZOO["qwen3_moe"].top_k
    model = load(checkpoint("qwen3_moe"), cache_dir, slots=3 * top_k, kv_tokens=64, max_requests=4)
    runtime = runtime_of(model)
    monkeypatch.setattr(CapturedDecoding, "_first_obstacle", lambda *_: None)  # this device
    decoding: CapturedDecoding[Any] = CapturedDecoding(model, model, runtime.plan.engine, None)
    assert decoding.takes(3, 9) and not decoding.takes(4, 9)
    planned = msgspec.structs.replace(runtime.plan, quotas=(2 * top_k, *runtime.plan.quotas[1:]))
    object.__setattr__(runtime, "plan", planned)
    assert decoding.takes(2, 9) and not decoding.takes(3, 9)


@pytest.mark.parametrize(
    ("settings", "why"),
    [({"execute_predicted": True}, "predicted experts are executed"), ({"batch_invariant": True}, "batch-invariant products")],
)
def test_some_settings_keep_the_host_in_charge(
    settings: dict[str, Any], why: str, checkpoint: Callable[[str], Path], cache_dir: Path
):
    found = device_obstacle(runtime_of(load(checkpoint("qwen3_moe"), cache_dir, **settings)), 4)
    assert found is not None and found.startswith(why)


def test_slots_that_move_between_layers_are_followed(checkpoint: Callable[[str], Path], cache_dir: Path):
    folder, prompt = checkpoint("qwen3_moe"), zoo.random_ids(1, 9, seed=8)
    model = load(folder, cache_dir, slots=8)
    runtime = runtime_of(model)
    slots = LentSlots(runtime, runtime.plan.shape.top_k)
    assert slots.take(), "nothing was known"
    assert not slots.take()
    slots.give_back()
    assert not slots.take(), "as before"
    slots.give_back()
    runtime.divide([6, 10, *[8] * (len(runtime.layers) - 2)])
    assert slots.take(), "what was captured is void"
    slots.give_back()
    assert decode(model, prompt, 15) == greedy(Reference(folder), prompt, 15)
    runtime.check_integrity()


def test_other_use_in_between_is_refused(checkpoint: Callable[[str], Path], cache_dir: Path):
    folder, prompt = checkpoint("qwen3_moe"), zoo.random_ids(1, 9, seed=8)
    model = load(folder, cache_dir)
    other = LentSlots(runtime_of(model), 4)
    with lent(model):
        with pytest.raises(ConfigError, match="end the engine's requests"):
            model(prompt)
        with pytest.raises(ConfigError, match="another engine"):
            other.take()
    other.take()
    assert other.taken
    epslots.stats(model)
    assert not other.taken, "who reads statistics gets those of the device, too"
    assert greedy(model, prompt, 5) == greedy(Reference(folder), prompt, 5)


def test_a_corrupt_record_ends_the_step_and_nothing_else(
    checkpoint: Callable[[str], Path], cache_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    folder, prompt = checkpoint("qwen3_moe"), zoo.random_ids(1, 9, seed=8)
    model = load(folder, cache_dir, slots=5)
    expected = greedy(Reference(folder), prompt, 25)

    def corrupt(layer: int, expert: int) -> torch.Tensor:
        raise CorruptExpertError("a layer", expert, "a test")

    with lent(model), monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(runtime_of(model).store, "record", corrupt)
        with pytest.raises(CorruptExpertError):
            [model(torch.tensor([[token]])) for token in expected[0]]
    assert not any(runner.slots_are_lent for runner in runtime_of(model).runners)
    runtime_of(model).check_integrity()
    assert decode(model, prompt, 25) == expected


def test_the_device_evicts_by_the_models_policy(checkpoint: Callable[[str], Path], cache_dir: Path):
    """As the host does: other misses than by another one. A function that only the host has keeps the host in charge."""
    folder, prompt = checkpoint("mixtral"), zoo.random_ids(1, 9, seed=7)
    misses = list[int]()
    for settings, policy in (({"policy": "lru"}, None), ({}, "lru"), ({}, None)):
        model = load(folder, cache_dir, slots=3, **settings)
        decode(model, prompt, 20, **({} if policy is None else {"policy": policy}))
        misses.append(epslots.stats(model).total("misses"))
    assert misses[0] == misses[1] != misses[2]
    found = device_obstacle(runtime_of(load(folder, cache_dir, slots=3, policy=lambda history: -history.last_use)), 2)
    assert found is not None and found.startswith("policy=tests.cuda_graph.test_lent_slots.")
    assert "is a function of the host; allowed: lru, lfu, lrfu, adaptive" in found
    resident = load(folder, cache_dir, slots="100%", policy=lambda history: -history.last_use)
    assert device_obstacle(runtime_of(resident), 2) is None, "nothing is ever evicted"
