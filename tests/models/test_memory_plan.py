"""The memory plan: quotas by hand and by property, every term against its definition, the message, the command."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from epslots.cli.plan import plan as plan_command
from epslots.config import EngineConfig
from epslots.errors import CheckpointError, ConfigError, DoesNotFitError
from epslots.example import example_model
from epslots.generation.next_token import PART_LOGITS
from epslots.layout import LayerSpec, RecordLayout, TensorSpec
from epslots.models.captured_sizes import GRAPH_BYTES, PIECE_BYTES
from epslots.models.checkpoint import open_checkpoint
from epslots.models.expert_reader import pack_layers
from epslots.models.experts import expert_layers
from epslots.models.known_shapes import KNOWN_SHAPES
from epslots.models.memory_plan import (
    CHOICE_LOGITS,
    NCCL_BYTES,
    MemoryPlan,
    default_reserve,
    moe_workspace_bytes,
)
from epslots.models.memory_report import alternatives, check_fits, largest_fit, plan_items
from epslots.models.model_shape import OF_THE_CACHE, CacheTensor, ModelShape
from epslots.models.page_sizes import PageSizes
from epslots.models.pretrained import build_skeleton, read_config, resolve_class
from epslots.models.quotas import describe_quotas, pool_bytes, resolve_quotas
from epslots.moe.packed_gemm import KERNELS
from epslots.prefetch.predictor_file import PREDICTOR_FILE_NAME, file_bytes
from epslots.units import SlotsSetting, format_bytes, parse_slots
from tests.support.memory_plans import plan_of
from tests.support.zoo import make_checkpoint, make_fp8, make_mxfp4

MIB = 1024**2
AUTO = SlotsSetting()


def record(nbytes: int) -> RecordLayout:
    """A layout of a given size, for tests that look at nothing else."""
    return RecordLayout((TensorSpec("w", (nbytes // 2,), "bfloat16", 0),), nbytes)


def moe_layers(*sizes: tuple[int, int]) -> tuple[LayerSpec, ...]:
    """Layers from (experts, bytes of a record)."""
    return tuple(LayerSpec(f"layers.{i}", experts, record(nbytes)) for i, (experts, nbytes) in enumerate(sizes))


def tiny_shape(**changes: Any) -> ModelShape:
    """Two layers of 8 experts, H = 64, I = 96, in bfloat16; a record is 3 * 64 * 96 * 2 = 36,864 bytes."""
    layout = RecordLayout.of([("gate_up_proj", (192, 64), "bfloat16"), ("down_proj", (64, 96), "bfloat16")])
    fields: dict[str, Any] = {
        "name": "tiny",
        "dtype": "bfloat16",
        "layers": (LayerSpec("layers.0", 8, layout), LayerSpec("layers.1", 8, layout)),
        "top_k": 2,
        "dense_bytes": 1_000_000,
        "cache": (
            CacheTensor(0, ("keys",), "token", (2, 64), "bfloat16", (0, 2)),
            CacheTensor(1, ("keys",), "window", (2, 64), "bfloat16", (0, 2), window=16),
            CacheTensor(2, ("recurrent_states", "0"), "row", (1250,), "float32", (0, None)),
        ),
        "hidden_size": 64,
        "vocab_size": 320,
    }
    return ModelShape(**(fields | changes))


# --- quotas ----------------------------------------------------------------------------------------------------------


def test_an_int_is_capped_by_each_layer_and_by_the_largest() -> None:
    layers = moe_layers((8, 256), (64, 256), (16, 512))
    assert resolve_quotas(SlotsSetting(per_layer=1), layers, None) == (1, 1, 1)
    assert resolve_quotas(SlotsSetting(per_layer=12), layers, None) == (8, 12, 12)
    assert resolve_quotas(SlotsSetting(per_layer=64), layers, None) == (8, 64, 16)
    for wrong in (0, 65):
        with pytest.raises(ConfigError, match=rf"slots={wrong}.*1 to 64"):
            resolve_quotas(SlotsSetting(per_layer=wrong), layers, None)


@example(percent=290, experts=100)
@given(percent=st.integers(1, 1000), experts=st.integers(1, 600))
def test_a_share_is_the_exact_product_rounded_down(percent: int, experts: int) -> None:
    """Tenths of a percent, for which floats are not exact: 29 % of 100 experts are 29."""
    setting = parse_slots(f"{percent / 10}%")
    (quota,) = resolve_quotas(setting, moe_layers((experts, 256)), None)
    assert quota == max(1, percent * experts // 1000)


def test_a_share_leaves_every_layer_a_slot() -> None:
    assert resolve_quotas(parse_slots("25%"), moe_layers((2, 256), (8, 256), (9, 256)), None) == (1, 2, 2)


def test_bytes_are_spread_over_equal_layers() -> None:
    layers = moe_layers((8, 1000), (8, 1000), (8, 1000))
    assert resolve_quotas(SlotsSetting(total_bytes=3_000), layers, None) == (1, 1, 1)
    assert resolve_quotas(SlotsSetting(total_bytes=3_999), layers, None) == (1, 1, 1)
    assert resolve_quotas(SlotsSetting(total_bytes=8_500), layers, None) == (3, 3, 2)
    assert resolve_quotas(SlotsSetting(total_bytes=10**9), layers, None) == (8, 8, 8)


def test_bytes_give_layers_equal_shares_not_equal_numbers() -> None:
    layers = moe_layers((8, 1000), (16, 1000), (32, 1000))
    assert resolve_quotas(SlotsSetting(total_bytes=28_000), layers, None) == (4, 8, 16)


def test_what_no_longer_holds_a_large_record_holds_small_ones() -> None:
    layers = moe_layers((4, 1000), (4, 100))
    # One of each and a second of each are 2200; of the 600 left no large one comes in, but both small ones.
    assert resolve_quotas(SlotsSetting(total_bytes=2_800), layers, None) == (2, 4)


def test_auto_takes_the_given_pool_or_all_without_a_bound() -> None:
    layers = moe_layers((8, 1000), (8, 1000))
    assert resolve_quotas(AUTO, layers, 7_000) == (4, 3)
    assert resolve_quotas(AUTO, layers, None) == (8, 8)
    assert resolve_quotas(SlotsSetting(total_bytes=4_000), layers, 999_999) == (2, 2)


def test_bytes_below_a_slot_per_layer_are_refused_with_the_sum() -> None:
    layers = moe_layers((8, 2 * MIB), (8, 2 * MIB), (8, 3 * MIB))
    assert resolve_quotas(SlotsSetting(total_bytes=7 * MIB), layers, None) == (1, 1, 1)
    with pytest.raises(DoesNotFitError) as refused:
        resolve_quotas(SlotsSetting(total_bytes=7 * MIB - 1), layers, None)
    assert "2 x 2 MiB + 1 x 3 MiB = 7 MiB" in str(refused.value)


sizes = st.lists(st.tuples(st.integers(1, 40), st.sampled_from([256, 512, 1024, 1280])), min_size=1, max_size=12)


@given(sizes=sizes, extra=st.integers(0, 60_000))
@settings(max_examples=150)
def test_a_pool_is_filled_and_never_overfilled(sizes: list[tuple[int, int]], extra: int) -> None:
    layers = moe_layers(*sizes)
    budget = pool_bytes(layers, [1] * len(layers)) + extra
    quotas = resolve_quotas(SlotsSetting(total_bytes=budget), layers, None)
    used = pool_bytes(layers, quotas)
    assert used <= budget
    assert all(1 <= quota <= layer.num_experts for quota, layer in zip(quotas, layers, strict=True))
    # No slot that is missing anywhere would still fit.
    missing = [layer.layout.nbytes for quota, layer in zip(quotas, layers, strict=True) if quota < layer.num_experts]
    assert all(used + nbytes > budget for nbytes in missing)
    # Equal layers differ by one slot at most, and the earlier has it.
    for i, layer in enumerate(layers):
        for j in range(i + 1, len(layers)):
            if (layers[j].num_experts, layers[j].layout) == (layer.num_experts, layer.layout):
                assert 0 <= quotas[i] - quotas[j] <= 1


@given(experts=st.lists(st.integers(1, 40), min_size=1, max_size=12), slots=st.integers(0, 200))
@settings(max_examples=150)
def test_shares_are_as_equal_as_slots_of_one_size_allow(experts: list[int], slots: int) -> None:
    layers = moe_layers(*((e, 256) for e in experts))
    quotas = resolve_quotas(SlotsSetting(total_bytes=256 * (len(layers) + slots)), layers, None)
    assert sum(quotas) == min(len(layers) + slots, sum(experts))
    # No layer was given a slot that left it above what another, which still lacks slots, would have had with it.
    for a, ea in zip(quotas, experts, strict=True):
        for b, eb in zip(quotas, experts, strict=True):
            if a > 1 and b < eb:
                assert a * eb <= (b + 1) * ea


def test_quotas_of_the_largest_models_take_no_time() -> None:
    layers = moe_layers(*[(512, 1 << 20)] * 100)
    start = time.process_time()
    quotas = resolve_quotas(SlotsSetting(total_bytes=40_000 << 20), layers, None)
    assert set(quotas) == {400}
    assert time.process_time() - start < 2


# --- terms -----------------------------------------------------------------------------------------------------------


def tensor(kind: Any, **more: Any) -> CacheTensor:
    """Of 100 bytes a token or row."""
    return CacheTensor(0, ("keys",), kind, (25,), "float32", (0, 2), **more)


def test_pools_have_room_for_the_tokens_of_all_requests() -> None:
    """One entry more than tokens stays zero, for the positions before a row's first token."""
    assert tensor("token").nbytes(kv_tokens=50, max_requests=3, in_flight=9) == 51 * 100
    assert tensor("token", stride=4).nbytes(50, 3, 9) == 13 * 100
    assert tensor("row").nbytes(50, 3, 9) == 3 * 100


def test_windows_have_room_for_all_requests_and_a_step() -> None:
    """New tokens have entries before the oldest ones of the windows give theirs back; all of a short cache fit anyway."""
    window = tensor("window", window=16)
    assert window.entries(kv_tokens=100, max_requests=3, in_flight=9) == 3 * 15 + 9 + 1
    assert window.entries(50, 3, 9) == 50 + 1


def test_rows_of_their_own_are_counted_with_their_next_state() -> None:
    """Such layers make new tensors in a step, before the old ones are let go."""
    for kind in ("token", "window", "row"):
        pooled, own = (tensor(kind, window=16, pooled=pooled) for pooled in (True, False))
        spare = kind != "row"
        assert own.nbytes(1000, 3, 9) == 2 * (pooled.nbytes(1000, 3, 9) - 100 * spare)


def test_every_term_is_what_its_definition_says() -> None:
    engine = EngineConfig(kv_tokens=100, max_requests=5, max_batch_tokens=10)
    result = plan_of(tiny_shape(), SlotsSetting(per_layer=3), memory_bytes=100 * MIB, engine=engine, reserve_bytes=1234)
    assert result.quotas == (3, 3)
    assert result.slot_bytes == 6 * 36_864
    tables = 2 * 5 * 100 * 4  # the cell of each position of each row: of all tokens, and of the window
    assert result.kv_bytes == 101 * 256 + (5 * 15 + 10 + 1) * 256 + 5 * 5000 + tables
    rows = 10 * 2
    activations = rows * 64 + rows * 192 + rows * 96 + rows * 64  # sorted copies, gate and up, activation, output
    weighted = 2 * rows * 64  # widened to fp32, and multiplied
    logits, choice = (2 + 4) * 5 * 320, 50 * 5 * 320
    assert result.workspace_bytes == 2 * activations + 4 * weighted + logits + choice
    assert result.reserve_bytes == 1234
    assert result.total_bytes == 1_000_000 + result.slot_bytes + result.kv_bytes + result.workspace_bytes + 1234
    assert result.free_bytes == 100 * MIB - result.total_bytes
    assert sum(size for _, size, _ in plan_items(result)) == result.total_bytes
    assert result.host_store_bytes == 16 * 36_864


def test_ranks_on_gpus_need_room_for_communication() -> None:
    plans = {
        (ranks, device): plan_of(tiny_shape(), AUTO, memory_bytes=8 * 1024 * MIB, ranks=ranks, kind=device)
        for ranks in (1, 2)
        for device in ("cpu", "cuda")
    }
    assert {key: plan.communication_bytes for key, plan in plans.items() if plan.communication_bytes} == {
        (2, "cuda"): NCCL_BYTES
    }
    assert "communication" in [name for name, *_ in plan_items(plans[2, "cuda"])]
    for plan in plans.values():
        assert sum(size for _, size, _ in plan_items(plan)) == plan.total_bytes


def test_graphs_of_decoding_steps_need_room() -> None:
    """One for 1, 2, 4 and 5 rows, and for 64 to 512 positions; each with its logits. States and activations stand once."""
    engine = EngineConfig(kv_tokens=500, max_requests=5, max_batch_tokens=10)
    arguments: dict[str, Any] = {"memory_bytes": 8 * 1024 * MIB, "kind": "cuda", "engine": engine}
    plan = plan_of(tiny_shape(), AUTO, **arguments)
    logits, activations = (1 + 2 + 4 + 5) * 4 * 320 * 2, moe_workspace_bytes(tiny_shape(), 5, 1)
    kept = logits + activations + 4 * 4 * GRAPH_BYTES
    assert plan.captured_bytes == kept + 5 * 512 * (256 + 2 * 32) + 5 * 5000
    assert ("captured steps", plan.captured_bytes) in [item[:2] for item in plan_items(plan)]
    assert sum(size for _, size, _ in plan_items(plan)) == plan.total_bytes
    paged = tiny_shape(pages=PageSizes(layers=(2,), layer_bytes=256, page_tokens=16, mask_bytes=2))
    assert plan_of(paged, AUTO, **arguments).captured_bytes == kept + 5 * 512 * (256 + 32)
    unwanted, uncaptured = EngineConfig(capture=False), tiny_shape(capture_obstacle="it asks the host")
    for changes in ({"kind": "cpu"}, {"engine": unwanted}, {"shape": uncaptured}, {"ranks": 2, "engine": unwanted}):
        other = plan_of(**{"shape": tiny_shape(), "setting": AUTO} | arguments | changes)
        assert other.captured_bytes == 0 and other.fixed_bytes > 0 and not other.captures_in_pieces


def test_pieces_of_decoding_steps_need_room() -> None:
    """Each step's graphs, chosen experts, and hidden states and results of a layer; but none of a layer's activations.

    Steps of one request keep those of all layers.
    """
    engine = EngineConfig(kv_tokens=500, max_requests=5, max_batch_tokens=10)
    arguments: dict[str, Any] = {"memory_bytes": 8 * 1024 * MIB, "kind": "cuda", "engine": engine}
    whole, shape = plan_of(tiny_shape(), AUTO, **arguments), tiny_shape()
    layers, rows = len(shape.layers), 4 * (2 + 4 + 5)
    chosen, states = layers * shape.top_k * (8 + 4), 2 * shape.hidden_size * 2
    more = (
        rows * (chosen + states)
        + 4 * (chosen + layers * states)
        + 16 * layers * PIECE_BYTES
        - moe_workspace_bytes(shape, 5, 1)
    )
    for changes in ({"ranks": 2}, {"captures": False}):
        plan = plan_of(tiny_shape(), AUTO, **arguments | changes)
        assert plan.captures_in_pieces and plan.captured_sizes == whole.captured_sizes
        assert plan.captured_bytes == whole.captured_bytes + more
        assert [what for name, _, what in plan_items(plan) if name == "captured steps"] == [
            "CUDA graphs in pieces of decoding up to 5 requests at a time (capture)"
        ]


def test_graphs_serve_as_many_rows_as_there_are_slots_for() -> None:
    """With 2 experts a token, 5 of 8 slots serve 2 rows; 1 slot serves none. Pieces, for a GPU that can't fetch, serve any."""
    engine = EngineConfig(kv_tokens=500, max_requests=5, max_batch_tokens=10)
    arguments: dict[str, Any] = {"memory_bytes": 8 * 1024 * MIB, "kind": "cuda", "engine": engine}
    found = {
        (slots, fetches): plan_of(tiny_shape(), SlotsSetting(per_layer=slots), fetches=fetches, **arguments)
        for slots in (1, 5, 8)
        for fetches in (True, False)
    }
    assert {key: plan.captured_sizes.rows for key, plan in found.items()} == {
        (1, True): 0, (5, True): 2, (8, True): 5, (1, False): 5, (5, False): 5, (8, False): 5
    }  # fmt: skip
    assert [key for key, plan in found.items() if plan.captures_in_pieces] == [(1, False), (5, False)]
    assert found[1, True].captured_bytes == 0 < found[5, True].captured_bytes < found[8, True].captured_bytes


@pytest.mark.parametrize("spare_slots", [0, 3, 600, 1300, 1800, 1829, 1840, 9000])
def test_automatic_slots_leave_room_for_their_graphs(spare_slots: int) -> None:
    """Graphs take as much as 1,800 slots here: the most slots are taken that fit together with their graphs."""
    engine = EngineConfig(kv_tokens=500, max_requests=5, max_batch_tokens=10)
    arguments: dict[str, Any] = {"kind": "cuda", "engine": engine, "reserve_bytes": 1000}
    least = plan_of(tiny_shape(), SlotsSetting(per_layer=1), **arguments).total_bytes
    plan = plan_of(tiny_shape(), AUTO, memory_bytes=least + spare_slots * 36_864, **arguments)
    assert plan.fits and plan.resident_share >= (1 if spare_slots == 9000 else 0.1)
    larger = plan.with_slots(SlotsSetting(per_layer=min(8, min(plan.quotas) + 1)))
    assert plan.all_resident or not larger.fits


def test_a_step_has_a_token_of_every_request() -> None:
    """However few tokens a chunk may have; and a prompt that can't be cut is as long as the cache."""
    engine = EngineConfig(kv_tokens=1000, max_requests=32, max_batch_tokens=8)
    assert tiny_shape().step_tokens(engine) == 32
    whole = tiny_shape(whole_prompts=True)
    assert whole.step_tokens(engine) == 1000
    plan = plan_of(whole, AUTO, engine=engine)
    assert plan.workspace_bytes == moe_workspace_bytes(whole, 1000, 1) + plan.logits_bytes + plan.choice_bytes


def test_tokens_are_chosen_in_parts() -> None:
    """The planned room is of as many logits as are in work at a time, and of one row of the largest vocabulary."""
    assert CHOICE_LOGITS == PART_LOGITS
    plan = plan_of(tiny_shape(vocab_size=150_000), AUTO, engine=EngineConfig(max_requests=100))
    assert plan.choice_bytes == 50 * PART_LOGITS
    plan = plan_of(tiny_shape(vocab_size=2 * PART_LOGITS), AUTO)
    assert plan.choice_bytes == 50 * 2 * PART_LOGITS


def test_pages_take_the_place_of_rows() -> None:
    pages = PageSizes(layers=(2,), layer_bytes=256, page_tokens=16, mask_bytes=2)
    shape, engine = tiny_shape(pages=pages), EngineConfig(kv_tokens=100, max_requests=5, max_batch_tokens=10)
    assert (shape.cache_kind, shape.token_bytes) == ("pages", 512)
    assert shape.kv_bytes(engine) == pages.nbytes(100, 5, 10) > 7 * 16 * 512
    assert (tiny_shape().cache_kind, tiny_shape().token_bytes) == ("rows", 256)


def test_states_beside_the_layers_count() -> None:
    engine = EngineConfig(kv_tokens=0, max_requests=3)
    beside = CacheTensor(OF_THE_CACHE, ("linear_cache", "0"), "row", (7,), "float32", (0, None))
    assert tiny_shape(cache=(beside,)).kv_bytes(engine) == 3 * 7 * 4


def test_workspace_ignores_transposition_and_biases() -> None:
    plain = moe_workspace_bytes(tiny_shape(), 10, 1)
    layout = RecordLayout.of(
        [
            ("gate_up_proj", (64, 192), "bfloat16"),
            ("gate_up_proj_bias", (192,), "bfloat16"),
            ("down_proj", (96, 64), "bfloat16"),
            ("down_proj_bias", (64,), "bfloat16"),
        ]
    )
    assert moe_workspace_bytes(tiny_shape(layers=(LayerSpec("layers.0", 8, layout),)), 10, 1) == plain
    # Rows that travel to other ranks and back take two more buffers.
    assert moe_workspace_bytes(tiny_shape(), 10, 2) == plain + 2 * 20 * 64 * 2


def test_workspace_is_that_of_the_widest_layer() -> None:
    narrow = RecordLayout.of([("gate_up_proj", (32, 64), "bfloat16"), ("down_proj", (64, 16), "bfloat16")])
    shape = tiny_shape()
    mixed = tiny_shape(layers=(LayerSpec("narrow", 8, narrow), *shape.layers))
    assert moe_workspace_bytes(mixed, 10, 1) == moe_workspace_bytes(shape, 10, 1)


def test_the_reserve_is_a_share_with_a_floor() -> None:
    assert default_reserve(None) == default_reserve(0) == default_reserve(2 * 1024 * MIB) == 512 * MIB
    assert default_reserve(80_000 * MIB) == 4_000 * MIB
    assert plan_of(tiny_shape(), AUTO, memory_bytes=80_000 * MIB).reserve_bytes == 4_000 * MIB


def test_parameters_count_dense_and_expert_weights() -> None:
    assert tiny_shape().parameters == 16 * 3 * 64 * 96 + 500_000
    assert tiny_shape().num_experts == 16


def test_residency_counts_slots_of_one_rank_and_of_all() -> None:
    alone = plan_of(tiny_shape(), parse_slots("25%"))
    assert (alone.resident_share, alone.slots_per_expert, alone.all_resident) == (0.25, 0.25, False)
    four = plan_of(tiny_shape(), parse_slots("25%"), ranks=4)
    assert (four.resident_share, four.slots_per_expert, four.all_resident) == (0.25, 1.0, True)
    # Slots enough in sum, but one layer lacks some.
    uneven = tiny_shape(layers=moe_layers((2, 256), (32, 256)))
    plenty = plan_of(uneven, SlotsSetting(per_layer=9), ranks=4)
    assert plenty.quotas == (2, 9)
    assert plenty.all_resident
    short = plan_of(uneven, SlotsSetting(per_layer=7), ranks=4)
    assert short.slots_per_expert > 1
    assert not short.all_resident


# --- plans -----------------------------------------------------------------------------------------------------------


def test_a_plan_fits_to_the_byte() -> None:
    shape, setting = tiny_shape(), SlotsSetting(per_layer=2)
    need = plan_of(shape, setting, reserve_bytes=1000).total_bytes
    exact = plan_of(shape, setting, memory_bytes=need, reserve_bytes=1000)
    assert (exact.fits, exact.free_bytes) == (True, 0)
    check_fits(exact)
    over = plan_of(shape, setting, memory_bytes=need - 1, reserve_bytes=1000)
    assert (over.fits, over.free_bytes) == (False, -1)
    with pytest.raises(DoesNotFitError):
        check_fits(over)


@given(memory=st.integers(0, 6 * MIB), batch=st.integers(1, 64), ranks=st.integers(1, 4))
def test_auto_takes_all_that_is_left_and_no_more(memory: int, batch: int, ranks: int) -> None:
    shape = tiny_shape()
    engine = EngineConfig(kv_tokens=64, max_requests=2, max_batch_tokens=batch)
    result = plan_of(shape, AUTO, memory_bytes=memory, engine=engine, ranks=ranks, reserve_bytes=10_000)
    least = result.fixed_bytes + 2 * 36_864
    assert result.fits == (memory >= least)
    if not result.fits:
        assert result.quotas == (1, 1)
    elif result.quotas != (8, 8):
        assert result.free_bytes is not None
        assert 0 <= result.free_bytes < 36_864


def test_unknown_memory_fits_everything() -> None:
    result = plan_of(tiny_shape(), AUTO)
    assert result.quotas == (8, 8)
    assert result.fits
    assert result.free_bytes is None
    check_fits(result)
    assert all(other.fits for other in alternatives(result))
    assert largest_fit(result) is not None
    assert largest_fit(result).resident_share == 1


def test_alternatives_are_the_plans_of_those_settings() -> None:
    arguments: dict[str, Any] = {
        "memory_bytes": None,
        "engine": EngineConfig(kv_tokens=100),
        "ranks": 2,
        "reserve_bytes": 1000,
    }
    arguments["memory_bytes"] = plan_of(tiny_shape(), AUTO, **arguments).fixed_bytes + 9 * 36_864
    result = plan_of(tiny_shape(), SlotsSetting(per_layer=5), **arguments)
    assert [str(other.setting) for other in alternatives(result)] == ["1 per layer", "12.5%", "25%", "50%", "75%", "100%"]
    for other in alternatives(result):
        alone = plan_of(tiny_shape(), other.setting, **arguments)
        assert (other.quotas, other.total_bytes, other.fits) == (alone.quotas, alone.total_bytes, alone.fits)
        assert other.resident_share == alone.resident_share
    assert [other.fits for other in alternatives(result)] == [True, True, True, True, False, False]


@given(memory=st.integers(MIB, 2 * MIB))
def test_the_largest_fit_is_the_last_that_fits(memory: int) -> None:
    engine = EngineConfig(kv_tokens=100, max_requests=2, max_batch_tokens=2)

    def with_slots(per_layer: int) -> MemoryPlan:
        setting = SlotsSetting(per_layer=per_layer)
        return plan_of(tiny_shape(), setting, memory_bytes=memory, engine=engine, reserve_bytes=1000)

    plan = with_slots(8)
    most = max((n for n in range(1, 9) if with_slots(n).fits), default=None)
    assert (largest_fit(plan).setting.per_layer if largest_fit(plan) else None) == most


def test_a_refusal_shows_the_sum_and_what_would_fit() -> None:
    shape = tiny_shape(name="mixtral-mini", dense_bytes=600 * MIB)
    engine = EngineConfig(max_requests=3, max_batch_tokens=7)
    arguments: dict[str, Any] = {"engine": engine, "reserve_bytes": 2 * MIB}
    base = plan_of(shape, SlotsSetting(per_layer=1), **arguments).fixed_bytes
    over = plan_of(shape, parse_slots("75%"), memory_bytes=base + 4 * 2 * 36_864 + 5, **arguments)
    with pytest.raises(DoesNotFitError) as refused:
        check_fits(over)
    message = str(refused.value)
    lines = [" ".join(line.split()) for line in message.splitlines()]
    assert lines[0].startswith("mixtral-mini in bfloat16 with slots=75%")
    for name, size, note in plan_items(over):
        assert f"{name} {format_bytes(size)} {note}" in lines
    assert f"needed {format_bytes(over.total_bytes)}" in lines
    assert f"available {format_bytes(over.memory_bytes or 0)} memory of one rank" in lines
    assert f"short of {format_bytes(-(over.free_bytes or 0))}" in lines
    assert "rows: 4,096 tokens of up to 3 requests, 256 bytes a token, 9,096 a request" in message
    assert f"12 x {format_bytes(36_864)}: 6 per layer" in message
    assert "slots=4 (50% of the experts" in lines[-1]


def test_a_refusal_says_when_nothing_fits() -> None:
    hopeless = plan_of(tiny_shape(), SlotsSetting(per_layer=4), memory_bytes=100_000, reserve_bytes=0)
    assert largest_fit(hopeless) is None
    least = plan_of(tiny_shape(), SlotsSetting(per_layer=1), reserve_bytes=0).total_bytes
    with pytest.raises(DoesNotFitError, match=f"Not even one slot per layer fits, which needs {format_bytes(least)}"):
        check_fits(hopeless)


@pytest.mark.parametrize(("setting", "value"), [("ranks", 0), ("reserve_bytes", -1)])
def test_numbers_out_of_range_are_refused_by_name(setting: str, value: int) -> None:
    """Those of the engine are refused by ``EngineConfig``."""
    arguments: dict[str, Any] = {"memory_bytes": MIB, setting: value}
    with pytest.raises(ConfigError, match=f"{setting}={value}"):
        plan_of(tiny_shape(), AUTO, **arguments)


def test_quotas_are_described_by_their_range() -> None:
    assert describe_quotas((4, 4)) == "4 per layer"
    assert describe_quotas((5, 4, 5)) == "4 to 5 per layer"


def test_planning_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, epslots.models.memory_plan, epslots.models.known_shapes;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- the command -----------------------------------------------------------------------------------------------------

app = typer.Typer()
app.command()(plan_command)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_the_command_prints_the_plan_and_the_alternatives() -> None:
    result = run("--model", "grok-1", "--slots", "2", "--memory", "200GiB", "--ranks", "4", "--max-requests", "3")
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    for wanted in (
        "grok-1 in bfloat16, slots=2 per layer",
        "dense weights",
        "128 x 1.12 GiB: 2 per layer",
        "rows: 4,096 tokens of up to 3 requests, 262,144 bytes a token",
        "315.7 billion weights; 64 MoE layers of 8 experts, 2 for each token",
        "hold 25.0% of the experts; 4 ranks have 1 slots for each expert: every expert can be in a slot somewhere",
        "100% (all resident)",
        "2 per layer (the most that fits)",
    ):
        assert wanted in text, wanted
    assert result.stderr.startswith("fits: each of 4 ranks has ")
    assert result.stderr.endswith(" a host store of 576 GiB.\n")


def test_the_command_says_what_does_not_fit_and_exits_with_1() -> None:
    result = run("--model", "grok-1", "--slots", "50%", "--memory", "200GiB")
    assert result.exit_code == 1
    assert "short of" in result.stdout
    assert "The most that fits is slots=2" in result.stderr
    # The pool itself is too small for a slot of every layer: there is no plan to print.
    result = run("--model", "grok-1", "--slots", "10GiB", "--memory", "200GiB")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "64 x 1.12 GiB = 72 GiB" in result.stderr


def test_the_command_gives_json() -> None:
    result = run("--model", "grok-1", "--slots", "auto", "--memory", "200GiB", "--ranks", "2", "--kv-tokens", "10", "--json")
    assert result.exit_code == 0
    given = json.loads(result.stdout)
    parts = ("dense_bytes", "slot_bytes", "kv_bytes", "workspace_bytes", "reserve_bytes")
    assert sum(given[part] for part in parts) == given["total_bytes"]
    assert given["free_bytes"] == 200 * 1024**3 - given["total_bytes"]
    # A cell for each token and one that stays empty; the cells of 16 requests.
    assert given["kv_bytes"] == (10 + 1) * 64 * 4096 + 16 * 10 * 4
    assert (given["cache"], given["token_bytes"]) == ("rows", 64 * 4096)
    assert (given["kv_tokens"], given["max_requests"], given["max_batch_tokens"]) == (10, 16, 512)
    assert given["fits"] is True
    assert given["checkpoint_bytes"] is None
    assert sum(given["quotas"]) == math.floor((given["free_bytes"] + given["slot_bytes"]) / (3 * 6144 * 32768 * 2))
    assert [other["slots"] for other in given["alternatives"]] == ["1 per layer", "12.5%", "25%", "50%", "75%", "100%"]
    assert given["largest_fit"]["slots"] == "2 per layer"


def test_the_command_plans_from_configuration_and_headers(tmp_path: Path) -> None:
    folder = make_checkpoint("mixtral", tmp_path / "mixtral")
    result = run("--model", str(folder), "--slots", "25%", "--memory", "4GiB", "--json")
    assert result.exit_code == 0, result.output
    given = json.loads(result.stdout)
    assert given["model"] == "mixtral"
    assert given["quotas"] == [2, 2]
    assert given["checkpoint_bytes"] == sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    # Every weight is stored once, in the dtype that is planned for; headers come on top.
    assert 0 < given["checkpoint_bytes"] - given["dense_bytes"] - given["host_store_bytes"] < 50_000
    half = json.loads(run("--model", str(folder), "--memory", "4GiB", "--dtype", "bfloat16", "--json").stdout)
    assert half["host_store_bytes"] * 2 == given["host_store_bytes"]
    # Without --memory it is this machine's, with which the plan compares.
    assert json.loads(run("--model", str(folder), "--json").stdout)["memory_bytes"] > 0


def test_slots_leave_room_for_the_predictor() -> None:
    """Fourteen slots fit; what tells of the next layer takes the place of two, and of a byte more."""
    shape, record = tiny_shape(), 36_864
    rest = plan_of(shape, AUTO, reserve_bytes=0).fixed_bytes
    memory = rest + 14 * record
    plain, less = (
        plan_of(shape, AUTO, memory_bytes=memory, reserve_bytes=0, predictor_bytes=nbytes) for nbytes in (0, 2 * record + 1)
    )
    assert (sum(plain.quotas), sum(less.quotas)) == (14, 11)
    assert less.total_bytes == less.slot_bytes + rest + 2 * record + 1 <= memory
    for plan in (plain, less):
        assert sum(size for _, size, _ in plan_items(plan)) == plan.total_bytes
    assert "predictor" in [name for name, *_ in plan_items(less)] and "predictor" not in [
        name for name, *_ in plan_items(plain)
    ]
    with pytest.raises(DoesNotFitError, match=r"predictor +72 KiB  predicts the next layer's experts"):
        check_fits(plan_of(shape, SlotsSetting(per_layer=7), memory_bytes=memory, reserve_bytes=0, predictor_bytes=73_729))


@pytest.mark.parametrize(("name", "quantise"), [("gpt_oss", make_mxfp4), ("qwen3_moe", make_fp8)])
def test_the_command_plans_quantised_checkpoints_per_device(
    name: str, quantise: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no kernel computes from packed slots, they are unpacked, and the plan says so; unless they are asked for."""
    folder = quantise(make_checkpoint(name, tmp_path / "whole"), tmp_path / "quantised")
    arguments = ("--model", str(folder), "--memory", "4GiB", "--dtype", "bfloat16")
    kind = {"gpt_oss": "e2m1", "qwen3_moe": "e4m3"}[name]
    monkeypatch.setitem(KERNELS, "cuda", KERNELS["cuda"] - {kind})
    settings = (("--device", "cpu", "--slot-format", "packed"), ("--device", "cuda:1"))
    on_cpu, on_gpu = (json.loads(run(*arguments, *setting, "--json").stdout) for setting in settings)
    config = read_config(folder)
    skeleton = build_skeleton(resolve_class(config), config, torch.bfloat16)
    layers = expert_layers(skeleton)
    packed = pack_layers(open_checkpoint(folder), skeleton, layers)
    assert on_gpu["host_store_bytes"] == sum(layer.num_experts * layer.layout.nbytes for layer in layers)
    assert on_cpu["host_store_bytes"] == sum(layer.num_experts * layer.layout.nbytes for layer in packed)
    assert on_cpu["host_store_bytes"] < 0.7 * on_gpu["host_store_bytes"]
    assert on_gpu["unpacking_bytes"] == on_cpu["predictor_bytes"] == 0 < on_cpu["unpacking_bytes"]
    for planned in (on_cpu, on_gpu):  # 4 GiB hold all experts
        assert planned["slot_bytes"] == planned["host_store_bytes"], "a slot holds its record"
        assert planned["parameters"] == on_cpu["parameters"]
    parts = ("dense", "slot", "kv", "workspace", "unpacking", "predictor", "captured", "reserve")
    for planned in (on_cpu, on_gpu):
        assert sum(planned[f"{part}_bytes"] for part in parts) == planned["total_bytes"]
    assert on_cpu["slot_note"].startswith(f"packed as stored: {kind} in blocks")
    assert on_gpu["slot_note"].startswith(f"unpacked: no kernel computes from {kind} in blocks of")
    told = run(*arguments, "--device", "cuda").stdout  # in lines of a table
    assert all(word in told for word in on_gpu["slot_note"].split())
    refusal = run(*arguments, "--device", "cuda", "--slot-format", "packed")
    assert isinstance(refusal.exception, ConfigError)
    assert f"no kernel computes from {kind} in blocks of" in str(refusal.exception)
    assert "slots on cuda; allowed there: auto, unpacked" in str(refusal.exception)
    monkeypatch.undo()
    with_kernel = json.loads(run(*arguments, "--device", "cuda", "--json").stdout)
    assert with_kernel["slot_note"] == on_cpu["slot_note"]


def test_the_command_counts_the_predictor_that_a_gpu_would_have() -> None:
    """The example's, which lies beside it: float32 on a CPU that fetches nothing ahead, thus none; bfloat16 on a GPU."""
    given = json.loads(run("--memory", "4GiB", "--device", "cuda", "--dtype", "bfloat16", "--json").stdout)
    expected, _ = file_bytes(example_model() / PREDICTOR_FILE_NAME, torch.device("cuda"), torch.bfloat16)
    assert given["predictor_bytes"] == expected > (example_model() / PREDICTOR_FILE_NAME).stat().st_size // 2
    assert json.loads(run("--memory", "4GiB", "--device", "cpu", "--json").stdout)["predictor_bytes"] == 0


def test_the_command_refuses_a_checkpoint_that_is_cut_short(tmp_path: Path) -> None:
    folder = make_checkpoint("mixtral", tmp_path / "mixtral")
    victim = sorted(folder.glob("*.safetensors"))[0]
    victim.write_bytes(victim.read_bytes()[:-1])
    result = run("--model", str(folder), "--memory", "4GiB")
    assert isinstance(result.exception, CheckpointError)
    assert victim.name in str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no-such-model"], "neither a checkpoint folder nor a known model"),
        (["--model", "grok-1", "--slots", "9"], "1 to 8 slots"),
        (["--model", "grok-1", "--slots", "most"], "slots="),
        (["--model", "grok-1", "--memory", "80"], "memory='80'"),
        (["--model", "grok-1", "--dtype", "int4"], "dtype='int4'"),
        (["--model", "grok-1", "--cache", "books"], "cache='books'"),
        (["--attn-implementation", "flash_attention_9"], "attn_implementation='flash_attention_9': Qwen3MoeForCausalLM: "),
        (["--model", "grok-1", "--memory", "80GiB", "--device", "tpu"], "device='tpu'"),
        (["--model", "grok-1", "--device", "cuda:99"], "device='cuda:99'"),
    ],
)
def test_the_command_refuses_wrong_settings(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)


def test_the_command_checks_ranges_and_lists_the_known_models() -> None:
    for option in ("--ranks", "--max-requests", "--max-batch-tokens"):
        assert run("--model", "grok-1", option, "0").exit_code == 2
    helped = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"})
    assert all(name in helped.output for name in KNOWN_SHAPES)
