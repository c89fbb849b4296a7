"""Routing traces hold exactly what the router chose, sequence by sequence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import epslots
from epslots import ConfigError, Trace
from tests.support import zoo


def routed(reference: torch.nn.Module, ids: torch.Tensor) -> np.ndarray:
    """[tokens, layers, k] that plain transformers chooses for one sequence."""
    return np.stack([ids.numpy() for ids, _ in zoo.routing(reference, input_ids=ids).values()], axis=1)


@pytest.fixture
def loaded(checkpoint: Callable[[str], Path], cache_dir: Path) -> Any:
    folder = checkpoint("qwen3_moe")
    return zoo.reference(folder), epslots.load(folder, slots=3, device="cpu", cache_dir=cache_dir, progress=False)


def test_generation_is_recorded_token_by_token(loaded: Any):
    reference, model = loaded
    prompt = zoo.random_ids(1, 7)
    with epslots.record_trace(model) as recorder:
        tokens = model.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
        model.generate(prompt, max_new_tokens=1, do_sample=False, eos_token_id=None, pad_token_id=0)
    trace = recorder.trace()
    assert trace.starts.tolist() == [0, 12]
    assert trace.num_experts.tolist() == [16, 16, 16]
    assert np.array_equal(np.sort(trace.expert_ids[:12]), np.sort(routed(reference, tokens[:, :12])))
    model(prompt)
    assert len(recorder.trace().expert_ids) == 19, "recording ends with the block"


def test_a_padded_batch_is_told_apart_and_padding_left_out(loaded: Any):
    reference, model = loaded
    ids = zoo.random_ids(2, 8)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with epslots.record_trace(model) as recorder:
        tokens = model.generate(ids, attention_mask=mask, **settings)
    trace = recorder.trace()
    assert trace.starts.tolist() == [0, 8]
    assert np.array_equal(np.sort(trace.expert_ids[8:]), np.sort(routed(reference, tokens[1:, :11])))
    assert np.array_equal(np.sort(trace.expert_ids[:8]), np.sort(routed(reference, tokens[:1, 3:11])))


def test_a_file_gives_back_the_trace(loaded: Any, tmp_path: Path):
    _, model = loaded
    with epslots.record_trace(model) as recorder:
        model(zoo.random_ids(2, 5))
    trace = recorder.trace()
    trace.save(tmp_path / "trace.npz")
    again = Trace.load(tmp_path / "trace.npz")
    assert np.array_equal(again.expert_ids, trace.expert_ids)
    assert again.expert_ids.dtype == np.int16
    assert again.starts.tolist() == [0, 5]
    assert [p.name for p in tmp_path.glob("trace*")] == ["trace.npz"]


def test_a_trace_that_cannot_be_written(tmp_path: Path):
    trace = Trace(np.zeros((1, 1, 1), np.int16), np.zeros(1, np.int64), np.ones(1, np.int64))
    (tmp_path / "t.npz").mkdir()
    with pytest.raises(ConfigError, match=r"t\.npz can't be written: Is a directory"):
        trace.save(tmp_path / "t.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["t.npz"]


def test_probabilities_are_those_that_the_router_chose_by(loaded: Any, tmp_path: Path):
    reference, model = loaded
    prompt = zoo.random_ids(2, 9)
    mask = torch.ones_like(prompt)
    mask[1, :4] = 0
    with epslots.record_trace(model, probs=True) as recorder:
        model.generate(prompt, attention_mask=mask, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    trace = recorder.trace()
    assert trace.probs is not None and trace.probs.dtype == np.float16 and trace.probs.shape == (11 + 7, 3, 16)
    assert np.allclose(trace.probs.astype(np.float32).sum(-1), 1, atol=2e-3)
    # Rounded to float16, an expert that wasn't chosen may be equal to one that was, and is never above it.
    chosen = np.zeros(trace.probs.shape, bool)
    np.put_along_axis(chosen, trace.expert_ids.astype(np.int64), True, -1)
    assert np.array_equal(chosen.sum(-1), np.full(chosen.shape[:-1], 4))
    assert np.all(np.where(chosen, trace.probs, 1).min(-1) >= np.where(chosen, 0, trace.probs).max(-1))
    with torch.no_grad():
        logits = reference(prompt[:1, :5], output_router_logits=True).router_logits
    expected = torch.stack([layer.softmax(-1) for layer in logits], 1).numpy()
    assert np.abs(trace.probs[:5].astype(np.float32) - expected).max() < 1e-3
    trace.save(tmp_path / "trace.npz")
    again = Trace.load(tmp_path / "trace.npz")
    assert again.probs is not None and np.array_equal(again.probs, trace.probs)
    model(prompt)
    assert len(recorder.trace().expert_ids) == 18, "recording ends with the block"


@pytest.mark.parametrize("name", ["longcat_flash", "zaya"])
def test_probabilities_of_layers_that_differ(name: str, checkpoint: Callable[[str], Path], cache_dir: Path):
    """Identity experts have no column; a router that is no linear map leaves zeros."""
    model = epslots.load(checkpoint(name), slots=3, device="cpu", cache_dir=cache_dir, progress=False)
    with epslots.record_trace(model, probs=True) as recorder:
        model(zoo.random_ids(1, 6))
    trace = recorder.trace()
    assert trace.probs is not None and trace.probs.shape == (6, *trace.num_experts.shape, trace.num_experts.max())
    assert (trace.expert_ids == -1).any() == (name == "longcat_flash"), "identity experts have no id either"
    if name == "zaya":
        assert not trace.probs.any()
    else:
        sums = trace.probs.astype(np.float32).sum(-1)
        assert (sums > 0).all() and (sums < 0.99).any(), "some of it is the identity experts'"


def test_nothing_recorded_is_an_empty_trace(loaded: Any):
    with epslots.record_trace(loaded[1]) as recorder:
        pass
    assert recorder.trace().expert_ids.shape == (0, 3, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expert_ids": np.zeros((3, 2), np.int16)}, r"must be int16 \[steps, layers, k\]"),
        ({"expert_ids": np.zeros((3, 2, 1), np.int32)}, "int32"),
        ({"expert_ids": np.zeros((2**40, 2, 0), np.int16)}, "allowed: at least one layer, and k of at least 1"),
        ({"expert_ids": np.zeros((2**40, 0, 1), np.int16), "num_experts": np.zeros(0, np.int64)}, "at least one layer"),
        ({"num_experts": np.zeros(3, np.int64)}, r"layers=2"),
        ({"starts": np.array([0, 0])}, "starts must begin with 0"),
        ({"starts": np.array([0, 9])}, "stay below"),
        ({"starts": np.array([1])}, "begin with 0"),
        ({"probs": np.zeros((3, 2, 4), np.float32)}, r"probs is float32\[3, 2, 4\]; it must be float16 \[3, 2, 4\]"),
        ({"probs": np.zeros((3, 2, 5), np.float16)}, r"must be float16 \[3, 2, 4\]"),
    ],
)
def test_a_bad_trace_is_refused(change: dict[str, Any], message: str, tmp_path: Path):
    arrays = {"expert_ids": np.zeros((3, 2, 1), np.int16), "starts": np.array([0]), "num_experts": np.array([4, 4])}
    np.savez(tmp_path / "t.npz", **(arrays | change))
    with pytest.raises(ConfigError, match=message):
        Trace.load(tmp_path / "t.npz")


def test_what_is_no_trace_at_all(tmp_path: Path):
    (tmp_path / "t.npz").write_text("nothing of the kind")
    with pytest.raises(ConfigError, match="is not a routing trace"):
        Trace.load(tmp_path / "t.npz")
    with pytest.raises(ConfigError, match=r"missing\.npz: no such file"):
        Trace.load(tmp_path / "missing.npz")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"starts": np.zeros(0, np.int64)}, "starts must begin with 0"),
        ({"num_experts": np.array([4, 0])}, "from 1 to 32768"),
        ({"num_experts": np.array([4.0, 4.0])}, "whole numbers"),
        ({"num_experts": np.array([4, 2**40])}, "from 1 to 32768"),
        ({"num_experts": np.array([4, 2**64 - 1], np.uint64)}, "from 1 to 32768"),
        ({"num_experts": np.array([4, -4])}, "from 1 to 32768"),
        ({"expert_ids": np.full((3, 2, 1), 4, np.int16)}, r"layer 0 go from 4 to 4; allowed: -1 \(none\) to 3"),
        ({"expert_ids": np.full((3, 2, 1), 4, np.int16), "num_experts": np.array([5, 4])}, "expert_ids of layer 1"),
        ({"expert_ids": np.full((3, 2, 1), -7, np.int16)}, "go from -7 to -7"),
        ({"starts": np.array([0, np.nan])}, "starts is float64; it must be int64"),
        ({"starts": np.array([0.0])}, "starts is float64"),
        ({"starts": np.array([0, 2**64 - 1], np.uint64)}, "stay below the number of steps"),
        ({"starts": np.array([0, 2, 1], np.uint8)}, "rise"),
        ({"starts": np.array([-1, 0])}, "begin with 0"),
        ({"probs": np.full((3, 2, 4), np.nan, np.float16)}, "probs has values that are no probabilities"),
        ({"probs": np.full((3, 2, 4), -0.5, np.float16)}, "allowed: 0 to 1"),
        ({"probs": np.full((3, 2, 4), np.inf, np.float16)}, "allowed: 0 to 1"),
        (
            {"expert_ids": np.zeros((0, 5000, 1), np.int16), "starts": np.zeros(0, int), "num_experts": np.full(5000, 2)},
            "5000 layers of up to 2 experts on 1 ranks: allowed: 4096 layers",
        ),
        (
            {"expert_ids": np.zeros((1, 64, 1), np.int16), "num_experts": np.full(64, 32768)},
            "allowed: .* 1,048,576 experts of all layers",
        ),
    ],
)
def test_traces_that_make_no_sense_are_refused(change: dict[str, np.ndarray], says: str, tmp_path: Path):
    fields = {"expert_ids": np.zeros((3, 2, 1), np.int16), "starts": np.array([0]), "num_experts": np.array([4, 4])}
    np.savez(tmp_path / "trace.npz", **(fields | change))
    with pytest.raises(ConfigError, match=says):
        Trace.load(tmp_path / "trace.npz")


def test_an_unusual_order_of_bytes_and_axes_is_read(tmp_path: Path):
    ids = np.arange(24, dtype=np.int16).reshape(4, 3, 2)
    np.savez(
        tmp_path / "t.npz",
        expert_ids=np.asfortranarray(ids.astype(">i2")),
        starts=np.array([0, 2], ">u4"),
        num_experts=np.array([24] * 3, np.uint8),
    )
    trace = Trace.load(tmp_path / "t.npz")
    assert np.array_equal(trace.expert_ids, ids) and trace.expert_ids.dtype == np.int16 and trace.expert_ids.flags.c_contiguous
    assert trace.starts.dtype == trace.num_experts.dtype == np.int64
