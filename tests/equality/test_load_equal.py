"""Invariant 1 on one rank, beside the matrix: policies, layouts on disk, precisions, threads, odd inputs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import epslots
from epslots.models.pretrained import quiet
from epslots.runtime import runtime_of
from tests.support import zoo
from tests.support.equality import TOLERANCE, assert_equal, greedy, load


def test_two_experts_modules_a_layer_and_both_reached(checkpoint: Callable[[str], Path], cache_dir: Path):
    """ernie4_5_vl_moe sends text and image tokens to experts of different width: two pools."""
    folder = checkpoint("ernie4_5_vl_moe")
    reference, model = zoo.reference(folder), load(folder, cache_dir, slots=2)
    assert_equal(model, reference, **zoo.mixed_inputs(2, 40))
    assert len(runtime_of(model).loaders) == 2
    assert all(layer.steps for layer in epslots.stats(model).layers)


@pytest.mark.parametrize("policy", ["lru", "lfu", "lrfu", "adaptive", lambda history: -history.last_use])
def test_any_policy_gives_the_same_tokens(policy: Any, checkpoint: Callable[[str], Path], cache_dir: Path):
    folder = checkpoint("qwen3_moe")
    prompt = zoo.random_ids(1, 9, seed=3)
    model = load(folder, cache_dir, slots=5, policy=policy)
    assert greedy(model, prompt, 24) == greedy(zoo.reference(folder), prompt, 24)


@pytest.mark.parametrize("layout", [zoo.make_fused, zoo.make_single_file])
def test_other_layouts_on_disk(
    layout: Callable[..., Path], checkpoint: Callable[[str], Path], tmp_path: Path, cache_dir: Path
):
    folder = layout(checkpoint("qwen3_moe"), tmp_path / "other")
    assert_equal(load(folder, cache_dir), zoo.reference(folder))


@pytest.mark.parametrize(("name", "make"), [("deepseek_v3", zoo.make_fp8), ("gpt_oss", zoo.make_mxfp4)])
def test_quantised_checkpoints_are_dequantised_per_expert(
    name: str, make: Callable[..., Path], checkpoint: Callable[[str], Path], tmp_path: Path, cache_dir: Path
):
    folder = make(checkpoint(name), tmp_path / "quantised")
    reference, prompt = zoo.reference_dequantised(folder), zoo.random_ids(1, 9, seed=2)
    for slot_format in ("packed", "unpacked"):
        model = load(folder, cache_dir, slot_format=slot_format)
        assert_equal(model, reference)
        assert greedy(model, prompt) == greedy(reference, prompt)


def fp8_and_twin(source: Path, folder: Path, block: int) -> tuple[Path, Path]:
    """A checkpoint in FP8, and one of the weights that its codes stand for, worked out by hand."""
    quantised = zoo.make_fp8(source, folder / "fp8", block=block)
    tensors, plain = zoo.read_tensors(quantised), {}
    for key, tensor in tensors.items():
        if not key.endswith("_scale_inv"):
            scales = tensors.get(f"{key}_scale_inv")
            if scales is not None:
                rows, columns = tensor.shape
                every = scales.repeat_interleave(block, 0)[:rows].repeat_interleave(block, 1)[:, :columns]
                tensor = tensor.float() * every
            plain[key] = tensor
    return quantised, zoo.write_checkpoint(source, folder / "plain", plain)


def test_fp8_weights_of_ragged_blocks_like_deepseek_v3s(checkpoint: Callable[[str], Path], tmp_path: Path, cache_dir: Path):
    """Blocks of 16 don't divide kv_a_proj_with_mqa's 24 rows, as 128 doesn't divide the real one's 576.

    transformers can't be the reference here: it infers the wrong block.
    """
    folder, twin = fp8_and_twin(checkpoint("deepseek_v3"), tmp_path, 16)
    assert zoo.read_tensors(twin)["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"].shape[0] % 16
    assert_equal(load(folder, cache_dir, slot_format="packed"), zoo.reference(twin))


@pytest.mark.parametrize(("name", "end"), [("gemma4", "router.scale"), ("inkling2", "q_l2_clip.scale")])
def test_a_models_own_scales_are_no_codes_scales(
    name: str, end: str, checkpoint: Callable[[str], Path], tmp_path: Path, cache_dir: Path
):
    """DeepSeek-V4's codes have scales of that name, and these models have parameters."""
    folder, twin = fp8_and_twin(checkpoint(name), tmp_path, 8)
    chance = torch.Generator().manual_seed(1)
    scales = {
        key: 1 + torch.rand(old.shape, generator=chance) for key, old in zoo.read_tensors(twin).items() if key.endswith(end)
    }
    assert scales
    for written in (folder, twin):
        zoo.write_checkpoint(written, tmp_path / f"{written.name}-scaled", zoo.read_tensors(written) | scales)
    assert_equal(load(tmp_path / "fp8-scaled", cache_dir), zoo.reference(tmp_path / "plain-scaled"))


def test_auto_dtype_is_the_checkpoints_own_and_bf16_is_close(
    checkpoint: Callable[[str], Path], tmp_path: Path, cache_dir: Path
):
    folder = tmp_path / "bf16"
    zoo.reference(checkpoint("mixtral")).to(torch.bfloat16).save_pretrained(folder)
    model = load(folder, cache_dir, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert {t.dtype for t in runtime_of(model).layers[0].layout.tensors} == {"bfloat16"}
    reference = type(zoo.reference(folder)).from_pretrained(folder, dtype=torch.bfloat16).eval()
    ids = zoo.random_ids(2, 40)
    with torch.no_grad():
        expected, actual = reference(ids).logits.float(), model(ids).logits.float()
    assert (expected - actual).norm() < 0.02 * expected.norm()


def test_transposed_weights_whose_rows_alone_are_unaligned(tmp_path: Path, cache_dir: Path):
    """34 fp32 activations a row are 136 bytes; the fused 68 columns of the weights are 272, which is a multiple of 16."""
    tiny = replace(zoo.ZOO["gpt_oss"], settings={**zoo.ZOO["gpt_oss"].settings, "intermediate_size": 34})
    tiny.build().save_pretrained(tmp_path / "odd")
    assert_equal(load(tmp_path / "odd", cache_dir), zoo.reference(tmp_path / "odd"))


def test_fp64_stays_fp64(checkpoint: Callable[[str], Path], cache_dir: Path):
    folder = checkpoint("mixtral")
    model, reference = load(folder, cache_dir, dtype="float64"), zoo.reference(folder).double()
    ids = zoo.random_ids(2, 20)
    with torch.no_grad():
        embeds = reference.get_input_embeddings()(ids)
        expected, actual = reference(inputs_embeds=embeds).logits, model(inputs_embeds=embeds).logits
    assert (expected - actual).abs().max() <= 1e-6 * expected.abs().max()
    layer = next(m for m in model.modules() if hasattr(m, "epslots_runner"))
    other = next(m for m in reference.modules() if type(m).__name__ == "MixtralExperts")
    hidden, index, weights = torch.randn(6, 64).double(), torch.randint(0, 8, (6, 2)), torch.rand(6, 2).double()
    with torch.no_grad():
        assert torch.allclose(layer(hidden, index, weights), other(hidden, index, weights), rtol=0, atol=1e-12)


def test_batches_padding_sampling_and_cache_work_as_usual(checkpoint: Callable[[str], Path], cache_dir: Path):
    folder = checkpoint("qwen3_moe")
    reference, model = zoo.reference(folder), load(folder, cache_dir)
    ids = zoo.random_ids(3, 10)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 10, "pad_token_id": 0, "eos_token_id": None}
    for extra in ({"do_sample": False}, {"do_sample": True, "temperature": 0.8, "top_p": 0.9}, {"num_beams": 3}):
        outputs = []
        for candidate in (reference, model):
            torch.manual_seed(5)
            outputs.append(candidate.generate(ids, **settings, **extra))
        assert torch.equal(*outputs)


def test_threads_that_share_a_model_do_not_disturb_each_other(checkpoint: Callable[[str], Path], cache_dir: Path):
    """Two slots, four threads: without taking turns, one gives up what another is about to compute with."""
    folder = checkpoint("qwen3_moe")
    model, reference = load(folder, cache_dir, slots=2), zoo.reference(folder)
    batches = [zoo.random_ids(1, 24, seed=seed) for seed in range(24)]
    with torch.no_grad():
        expected = [reference(ids).logits for ids in batches]

    def run(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():  # a thread's own setting
            return model(ids).logits

    with ThreadPoolExecutor(4) as pool:
        for logits, actual in zip(expected, pool.map(run, batches), strict=True):
            assert (logits - actual).abs().max() <= TOLERANCE * logits.abs().max()
    runtime_of(model).check_integrity()


def test_no_tokens_at_all(checkpoint: Callable[[str], Path], cache_dir: Path):
    """A rank with nothing to do takes part with zero tokens."""
    model = load(checkpoint("qwen3_moe"), cache_dir)
    module = next(m for m in model.modules() if hasattr(m, "epslots_runner"))
    out = module(torch.empty(0, zoo.HIDDEN), torch.empty(0, 4, dtype=torch.long), torch.empty(0, 4))
    assert out.shape == (0, zoo.HIDDEN)
    assert epslots.stats(model).misses == 0


def test_nan_spoils_its_own_token_alone(checkpoint: Callable[[str], Path], cache_dir: Path):
    """A NaN makes the router choose anything; other tokens of the batch are not touched."""
    folder = checkpoint("qwen3_moe")
    model = load(folder, cache_dir)
    embeds = model.get_input_embeddings()(zoo.random_ids(2, 12))
    with torch.no_grad():
        clean = model(inputs_embeds=embeds).logits
        spoilt = embeds.clone()
        spoilt[1] = float("nan")
        out = model(inputs_embeds=spoilt).logits
    assert torch.isnan(out[1]).all()
    assert torch.allclose(out[0], clean[0], atol=1e-5)
    assert torch.isfinite(model(zoo.random_ids(1, 8)).logits).all(), "nor is any later pass"
    runtime_of(model).check_integrity()


def test_the_original_class_is_left_alone(checkpoint: Callable[[str], Path], cache_dir: Path):
    """Loading changes no transformers class: plain models of the process, older or newer, stay as they were."""
    folder = checkpoint("longcat_flash")
    before = zoo.reference(folder)
    load(folder, cache_dir)
    assert_equal(zoo.reference(folder), before)


def test_save_pretrained_refuses(checkpoint: Callable[[str], Path], cache_dir: Path, tmp_path: Path):
    model = load(checkpoint("mixtral"), cache_dir)
    with pytest.raises(epslots.UnsupportedModelError, match="copy the original checkpoint"):
        model.save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_threads_that_load_leave_transformers_as_it_was():
    """Each puts back what it found, so one must not find what another one set."""
    verbosity = transformers.logging.get_verbosity()
    entered, second_entered = threading.Event(), threading.Event()

    def second() -> None:
        entered.wait()
        with quiet():
            second_entered.set()

    with ThreadPoolExecutor(1) as threads:
        with quiet():
            waiting = threads.submit(second)
            entered.set()
            assert not second_entered.wait(0.2)
        waiting.result()
    assert transformers.logging.get_verbosity() == verbosity
