"""Invariant 1 for quantised checkpoints: slots hold the stored bytes, and the logits are those of the weights they stand for.

The reference is plain transformers on the twin of each checkpoint, whose weights were worked out from the codes before they
were packed (``support/quantised.py``): transformers itself loads several of these formats wrongly without a word.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import epslots
from epslots.errors import ConfigError
from epslots.formats.quantise import quantise_int4
from epslots.runtime import runtime_of
from tests.support import zoo
from tests.support.cpu_hosting import OFTEN, hosting
from tests.support.equality import assert_equal, compare, greedy, load
from tests.support.grouped_ranks import Grouped
from tests.support.quantised import SCHEMES, Made, make_deepseek_v4, make_quantised
from tests.support.remembered import Reference

Checkpoints = Callable[[str], Path]
BASE = "qwen3_moe_short"
# tests/formats has every scheme, as has this module if it is asked to; the makers' own whole models are next door.
ALL = bool(os.environ.get("EPSLOTS_ALL_FORMATS"))
ALONE = SCHEMES if ALL else ("ct int8", "ct int4 asymmetric")
ON_TWO_RANKS = SCHEMES if ALL else ("gptq act order",)


@pytest.fixture
def made(checkpoint: Checkpoints, tmp_path: Path) -> Callable[[str], Made]:
    return lambda scheme: make_quantised(checkpoint(BASE), scheme, tmp_path)


@pytest.mark.parametrize("scheme", ALONE)
def test_slots_hold_what_is_stored(scheme: str, made: Callable[[str], Made], cache_dir: Path):
    """Experts and dense layers; the pool and the store take the codes' bytes and little more."""
    checkpoint = made(scheme)
    model, reference = load(checkpoint.folder, cache_dir, slot_format="packed"), Reference(checkpoint.twin)
    assert_equal(model, reference)
    prompt = zoo.random_ids(1, 9, seed=2)
    assert greedy(model, prompt) == greedy(reference, prompt)
    runtime = runtime_of(model)
    runtime.check_integrity()
    layer, pool = runtime.layers[0], runtime.loaders[0].pool
    codes = sum(spec.nbytes for spec in layer.layout.tensors if spec.name.endswith("codes"))
    assert codes == layer.weights.elements * SCHEMES[scheme].bits // 8
    assert layer.layout.nbytes <= 2 * codes
    assert pool.memory.nbytes == pool.num_slots * layer.layout.nbytes
    stats = epslots.stats(model)
    assert sum(found.host_bytes for found in stats.layers) == stats.misses * layer.layout.nbytes


@pytest.mark.parametrize("scheme", ON_TWO_RANKS)
def test_packed_slots_of_two_ranks(scheme: str, made: Callable[[str], Made], cache_dir: Path):
    """Records go from peer to peer as they are."""
    checkpoint = made(scheme)
    grouped = Grouped(checkpoint.folder, cache_dir, slots=[2, "50%"], slot_format="packed")
    compare(grouped, Reference(checkpoint.twin))


def test_packed_records_are_computed_on_the_host(made: Callable[[str], Made], cache_dir: Path):
    checkpoint = made("ct nvfp4")
    model = hosting(load(checkpoint.folder, cache_dir, slot_format="packed"), OFTEN, concurrent=False)
    assert_equal(model, Reference(checkpoint.twin))
    assert sum(layer.cpu_misses for layer in epslots.stats(model).layers) > 0


def test_unpacked_slots_and_another_dtype(made: Callable[[str], Made], cache_dir: Path):
    """bfloat16 where the checkpoint says float32: every weight is of the dtype asked for, and nothing is mixed."""
    checkpoint = made("ct fp8 channel")
    reference = Reference(checkpoint.twin)
    unpacked = load(checkpoint.folder, cache_dir, slot_format="unpacked")
    assert_equal(unpacked, reference)
    assert runtime_of(unpacked).layers[0].packed is None
    other = load(checkpoint.folder, cache_dir, dtype="bfloat16", slot_format="packed")
    assert {parameter.dtype for parameter in other.parameters()} == {torch.bfloat16}
    ids = zoo.random_ids(2, 20)
    with torch.no_grad():
        expected, found = reference(input_ids=ids).logits, other(ids).logits.float()
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_batch_invariant_from_packed_slots(made: Callable[[str], Made], cache_dir: Path):
    checkpoint = made("ct int4")
    models = [
        load(checkpoint.folder, cache_dir, slots=slots, slot_format="packed", batch_invariant=True) for slots in (1, "100%")
    ]
    ids = zoo.random_ids(3, 12)
    with torch.no_grad():
        whole, alone = models[0](ids).logits, models[1](ids[1:2]).logits
    assert_equal(models[0], Reference(checkpoint.twin))
    assert torch.equal(whole[1].argmax(-1), alone[0].argmax(-1))


def test_deepseek_v4_as_published(checkpoint: Checkpoints, tmp_path: Path, cache_dir: Path):
    """Its keys are renamed before they are matched; experts in FP4 and dense layers in FP8 under one method."""
    made = make_deepseek_v4(checkpoint("deepseek_v4"), tmp_path)
    model = load(made.folder, cache_dir, slot_format="packed")
    assert_equal(model, Reference(made.twin))
    (form,) = {form.kind for layer in runtime_of(model).layers for matrix in layer.packed.matrices for form in matrix.forms}
    assert form == "e2m1"


def eight_bits(weight: torch.Tensor) -> torch.Tensor:
    """A weight [..., outputs, inputs] rounded to 255 steps of each output's largest."""
    step = weight.abs().amax(-1, keepdim=True) / 127
    return (weight / step).round() * step


def four_bits(weight: torch.Tensor) -> torch.Tensor:
    """The weights that int4's codes stand for; the codes are held to their error in tests/formats."""
    return quantise_int4(weight).weights()


@pytest.mark.parametrize(("name", "expert_format"), [(BASE, "int8"), ("gpt_oss", "int8"), (BASE, "int4")])
def test_experts_are_quantised_while_loading(
    name: str, expert_format: str, checkpoint: Checkpoints, tmp_path: Path, cache_dir: Path
):
    """As nothing but the rounding of experts' weights would change them; gpt_oss keeps them as [inputs, outputs]."""
    source, twin = checkpoint(name), {}
    for key, weight in zoo.read_tensors(source).items():
        is_matrix = ".experts." in key and "bias" not in key
        if not is_matrix:
            twin[key] = weight
        elif name == "gpt_oss":
            twin[key] = eight_bits(weight.transpose(-1, -2)).transpose(-1, -2)
        else:
            twin[key] = {"int8": eight_bits, "int4": four_bits}[expert_format](weight)
    folder = zoo.write_checkpoint(source, tmp_path / "twin", twin)
    model = load(source, cache_dir, expert_format=expert_format)
    assert_equal(model, Reference(folder))
    runtime = runtime_of(model)
    assert runtime.plan.shape.slot_note.startswith(f"quantised while loading, which changes outputs: {expert_format}")
    assert runtime.layers[0].layout.nbytes < runtime.layers[0].weights.nbytes / 3
    assert_equal(load(source, cache_dir), Reference(source))  # another store: its key knows


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"slot_format": "bf16"}, "slot_format='bf16': allowed: auto, packed, unpacked"),
        ({"expert_format": "nf4"}, "expert_format='nf4': allowed: None, int8, int4"),
        ({"expert_format": "int4", "slot_format": "unpacked"}, "leave one out"),
    ],
)
def test_formats_that_do_not_exist_are_refused(settings: dict[str, str], said: str, checkpoint: Checkpoints, cache_dir: Path):
    with pytest.raises(ConfigError, match=said):
        load(checkpoint(BASE), cache_dir, **settings)


def test_what_is_quantised_is_not_quantised_again(made: Callable[[str], Made], cache_dir: Path):
    with pytest.raises(ConfigError, match="is quantised already; allowed for it: None"):
        load(made("ct int8").folder, cache_dir, expert_format="int4")
