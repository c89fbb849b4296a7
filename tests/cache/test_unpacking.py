"""Records that stay as a quantised checkpoint stores them, and come out as transformers would have dequantised them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel
from transformers.core_model_loading import Transpose, WeightConverter
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import epslots
from epslots.cache import unpacking
from epslots.cache.host_store import HostStore, Manifest, StoreShape
from epslots.cache.node_store import open_node_store
from epslots.cache.unpacking import SlotWriter, assert_consistent, record_views
from epslots.layout import LayerSpec, PackedLayout, PackedPart, RecordLayout, unpacking_bytes
from epslots.models.checkpoint import Checkpoint
from epslots.models.conversions import conversions_of
from epslots.models.expert_reader import ExpertReader, pack_layers
from epslots.models.fp8 import BlockDequantize
from epslots.models.memory_plan import UNPACKED_AT_A_TIME, plan_memory
from epslots.models.memory_report import plan_items
from epslots.models.model_shape import ModelShape
from epslots.models.opening import load_dense, open_model
from epslots.models.quantised_formats import find_packing
from epslots.progress import ProgressDisplay
from epslots.units import parse_slots
from tests.support import zoo

SLOT_DTYPES = ["float32", "bfloat16", "float16"]
CPU = torch.device("cpu")


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes; one NaN is as good as another."""
    tensor = torch.where(tensor.isnan(), torch.full((), math.nan, dtype=tensor.dtype), tensor)
    return tensor.contiguous().view(-1).view(torch.uint8)


def one_matrix(
    rows: int, columns: int, dtype: str, codes: tuple[tuple[int, int], str], scales: tuple[tuple[int, int], str], block: Any
) -> LayerSpec:
    """A layer whose slots hold one matrix, in the middle of which the codes begin at row 0."""
    slot = RecordLayout.of([("bias", (columns,), dtype), ("matrix", (rows, columns), dtype)])
    record = RecordLayout.of([("bias", (columns,), dtype), ("codes", *codes), ("scales", *scales)])
    layer = LayerSpec("l", 1, slot, PackedLayout(record, (PackedPart("matrix", 0, rows, "codes", "scales", block),)))
    assert_consistent(layer)
    return layer


def unpack(layer: LayerSpec, *, by_table: bool | None = None, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    record = torch.zeros(layer.record.nbytes, dtype=torch.uint8)
    for name, view in record_views(record, layer.record).items():
        view.copy_(tensors[name])
    slot = torch.full((layer.layout.nbytes,), 0xAB, dtype=torch.uint8)
    write = SlotWriter(layer, by_table=by_table)
    write(slot, record)
    assert write.same(slot, record)
    for spec in layer.layout.tensors:
        spoilt = slot.clone()
        spoilt[spec.offset + spec.nbytes - 1] ^= 1
        assert not write.same(spoilt, record)
    return record_views(slot, layer.layout)


@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    block=st.tuples(st.integers(1, 17), st.integers(1, 17)),
    code=st.sampled_from([torch.float8_e4m3fn, torch.float8_e5m2]),
    scale=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu, torch.uint8]),
    dtype=st.sampled_from(SLOT_DTYPES),
    by_table=st.booleans(),
    run=st.sampled_from([1, 50, 1 << 18]),
    seed=st.integers(0, 2**32 - 1),
)
def test_fp8_blocks_come_out_as_transformers_has_them(
    shape: tuple[int, int],
    block: tuple[int, int],
    code: torch.dtype,
    scale: torch.dtype,
    dtype: str,
    by_table: bool,
    run: int,
    seed: int,
):
    """Any codes at all, NaN among them; blocks cut short; runs of many sizes; looked up or converted, as on a GPU."""
    random = torch.Generator().manual_seed(seed)
    rows, columns = shape
    grid = (-(-rows // block[0]), -(-columns // block[1]))
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=random).view(code)
    if scale.itemsize == 1:
        scales = torch.randint(90, 160, grid, dtype=torch.uint8, generator=random).view(scale)
    else:
        scales = torch.randn(grid, generator=random).to(scale)
    config = SimpleNamespace(quantization_config=SimpleNamespace(weight_block_size=block))
    operation = BlockDequantize(config)
    ragged = rows % block[0] or columns % block[1]
    wanted = codes.float() if ragged else codes  # padding a ragged one, it makes it float32 itself
    expected = operation._dequantize_one(wanted, scales, getattr(torch, dtype))
    names = (str(code).removeprefix("torch."), str(scale).removeprefix("torch."))
    layer = one_matrix(rows, columns, dtype, (shape, names[0]), (grid, names[1]), block)
    bias = torch.randn(columns, generator=random).to(getattr(torch, dtype))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unpacking, "CPU_RUN", run)
        found = unpack(layer, by_table=by_table, bias=bias, codes=codes, scales=scales)
    assert torch.equal(bits(found["matrix"]), bits(expected))
    assert torch.equal(found["bias"], bias)


@pytest.mark.parametrize("dtype", SLOT_DTYPES)
@pytest.mark.parametrize("run", [1, 300, 1 << 18])
def test_mxfp4_comes_out_as_transformers_has_it(dtype: str, run: int, monkeypatch: pytest.MonkeyPatch):
    """All codes, all exponents but 255, which is none: zeros of either sign, subnormals, infinities of float16."""
    outputs, groups = 64, 8
    random = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (1, outputs, groups, 16), dtype=torch.uint8, generator=random)
    scales = torch.arange(outputs * groups).remainder(255).to(torch.uint8).view(1, outputs, groups)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=getattr(torch, dtype))[0]
    rows = groups * 32
    layer = one_matrix(rows, outputs, dtype, ((rows // 2, outputs), "uint8"), ((groups, outputs), "uint8"), (32, 1))
    monkeypatch.setattr(unpacking, "CPU_RUN", run)
    bias = torch.zeros(outputs, dtype=getattr(torch, dtype))
    found = unpack(layer, bias=bias, codes=blocks[0].flatten(1).t(), scales=scales[0].t())["matrix"]
    assert torch.equal(bits(found), bits(expected))


def test_a_record_that_is_not_packed_is_its_slot():
    layer = LayerSpec("l", 1, RecordLayout.of([("matrix", (3, 5), "float32")]))
    record = torch.arange(layer.record.nbytes, dtype=torch.uint8)
    slot = torch.zeros_like(record)
    SlotWriter(layer)(slot, record)
    assert torch.equal(slot, record) and SlotWriter(layer).same(slot, record) and not SlotWriter(layer).same(slot + 1, record)


@pytest.mark.parametrize(
    "part",
    [
        PackedPart("matrix", 0, 62, "codes", "scales", (16, 16)),
        PackedPart("matrix", 2, 62, "codes", "scales", (16, 16)),
        PackedPart("matrix", 0, 64, "codes", "scales", (8, 16)),
        PackedPart("bias", 0, 64, "codes", "scales", (16, 16)),
    ],
)
def test_layouts_that_leave_something_out_are_mistakes(part: PackedPart):
    layer = one_matrix(64, 32, "float32", ((64, 32), "float8_e4m3fn"), ((4, 2), "float32"), (16, 16))
    assert layer.packed is not None
    with pytest.raises(AssertionError):
        assert_consistent(msgspec.structs.replace(layer, packed=msgspec.structs.replace(layer.packed, parts=(part,))))


# --- checkpoints -----------------------------------------------------------------------------------------------------


@dataclass
class Opened:
    """A quantised checkpoint, its model, and its layers as they are and packed."""

    checkpoint: Checkpoint
    skeleton: PreTrainedModel
    model: PreTrainedModel
    plain: tuple[LayerSpec, ...]
    packed: tuple[LayerSpec, ...]


def open_quantised(folder: Path, dtype: torch.dtype = torch.float32) -> Opened:
    opened = open_model(folder, dtype)
    packed = pack_layers(opened.checkpoint, opened.skeleton, opened.layers)
    model = load_dense(opened, device=CPU, show_progress=False)
    return Opened(opened.checkpoint, opened.skeleton, model, opened.layers, packed)


def ragged_fp8(source: Path, folder: Path) -> Path:
    """Blocks of 24: 64 = 24 + 24 + 16."""
    return zoo.make_fp8(source, folder, block=24)


MAKERS = [("deepseek_v3", zoo.make_fp8, 3), ("deepseek_v3", ragged_fp8, 3), ("gpt_oss", zoo.make_mxfp4, 2)]
Checkpoints = Callable[[str], Path]


@pytest.mark.parametrize(("name", "make", "parts"), MAKERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_expert_of_a_quantised_checkpoint(
    name: str, make: Callable[..., Path], parts: int, dtype: torch.dtype, checkpoint: Checkpoints, tmp_path: Path
):
    """Half of bf16's bytes or less, and what comes out of them is what transformers' own operations give, bit for bit."""
    opened = open_quantised(make(checkpoint(name), tmp_path / "quantised"), dtype)
    packed, plain = (ExpertReader(opened.checkpoint, opened.model, x) for x in (opened.packed, opened.plain))
    for index, layer in enumerate(opened.packed):
        assert layer.layout == opened.plain[index].layout
        assert layer.packed is not None and len(layer.packed.parts) == parts
        scales = sum(math.prod(t.shape) * 4 for t in layer.record.tensors if t.name.endswith("scales"))
        assert layer.record.nbytes <= layer.layout.elements + scales + 256 * len(layer.record.tensors)
        for expert in range(layer.num_experts):
            unpacked = unpack(layer, **packed.read_expert(index, expert))
            for tensor, expected in plain.read_expert(index, expert).items():
                assert torch.equal(bits(unpacked[tensor]), bits(expected.to(dtype)))


@pytest.mark.parametrize(("name", "make", "parts"), MAKERS)
def test_conversions_are_known_before_anything_is_loaded(
    name: str, make: Callable[..., Path], parts: int, checkpoint: Checkpoints, tmp_path: Path
):
    """transformers tells them of a loaded model; ``conversions_of`` works them out beforehand."""

    def described(conversions: Sequence[Any]) -> list[Any]:
        return [
            (c.source_patterns, c.target_patterns, [isinstance(o, Fp8Dequantize) or type(o) for o in c.operations])
            for c in conversions
            if isinstance(c, WeightConverter)
        ]

    opened = open_quantised(make(checkpoint(name), tmp_path / "quantised"))
    assert described(conversions_of(opened.skeleton)) == described(opened.model._weight_conversions)


def test_what_is_not_quantised_is_not_packed(checkpoint: Checkpoints):
    opened = open_quantised(checkpoint("mixtral"))
    assert opened.packed == opened.plain


def test_wider_slots_are_filled_as_ever(checkpoint: Checkpoints, tmp_path: Path):
    """transformers rounds the products to float32, which a slot of float64 would show."""
    opened = open_quantised(zoo.make_fp8(checkpoint("deepseek_v3"), tmp_path / "fp8"), torch.float64)
    assert opened.packed == opened.plain


def test_an_unknown_operation_keeps_a_tensor_unpacked(checkpoint: Checkpoints, tmp_path: Path):
    opened = open_quantised(zoo.make_fp8(checkpoint("deepseek_v3"), tmp_path / "fp8"))
    reader = ExpertReader(opened.checkpoint, opened.model, opened.plain)
    spec, parameter = opened.plain[0].layout.tensors[1], reader._layers[0]["down_proj"]
    headers, experts = opened.checkpoint.tensors, opened.plain[0].num_experts
    converter = parameter.converter
    assert find_packing(spec, parameter, headers, experts) is not None
    assert find_packing(spec, replace(parameter, converter=None), headers, experts) is None
    converter.operations.append(Transpose(1, 2))
    assert find_packing(spec, parameter, headers, experts) is None
    converter.operations.pop()
    merge = converter.operations[1]
    converter.operations[1] = Transpose(0, 1)
    assert find_packing(spec, parameter, headers, experts) is None
    converter.operations[1] = merge
    other = {key: changed(header, dtype="BF16") for key, header in headers.items()}
    assert find_packing(spec, parameter, other, experts) is None
    assert find_packing(spec, parameter, headers, experts + 1) is None


def changed(header: Any, **changes: Any) -> Any:
    return SimpleNamespace(**{**vars(header), **changes})


def test_a_form_that_only_looks_known_is_refused(checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    opened = open_quantised(zoo.make_fp8(checkpoint("deepseek_v3"), tmp_path / "fp8"))
    reader = ExpertReader(opened.checkpoint, opened.model, opened.packed)
    reader.read_expert(0, 0)
    original = BlockDequantize._dequantize_one
    monkeypatch.setattr(BlockDequantize, "_dequantize_one", lambda self, q, s, output_dtype: original(self, q, 2 * s))
    with pytest.raises(epslots.CheckpointError, match=r"resembles a known quantised format"):
        reader.read_expert(0, 0)


def open_store(opened: Opened, cache_dir: Path, kind: str) -> HostStore:
    return open_node_store(
        Manifest("k3y", "model", opened.packed),
        lambda: ExpertReader(opened.checkpoint, opened.model, opened.packed),
        kind=kind,
        cache_dir=cache_dir,
        start_progress=ProgressDisplay(shown=False),
    )


def test_the_store_holds_records_as_they_are_stored(checkpoint: Checkpoints, tmp_path: Path, cache_dir: Path):
    """A file, then shared memory filled from it; digests are of the packed records."""
    opened = open_quantised(zoo.make_mxfp4(checkpoint("gpt_oss"), tmp_path / "mxfp4"))
    on_disk, in_memory = (open_store(opened, cache_dir, kind) for kind in ("file", "memory"))
    layer = opened.packed[0]
    assert on_disk.nbytes == StoreShape(on_disk.manifest).nbytes < StoreShape(Manifest("k", "m", opened.plain)).nbytes
    assert on_disk.verify() == in_memory.verify() == []
    for expert in range(layer.num_experts):
        assert on_disk.record(0, expert).nbytes == layer.record.nbytes
        assert torch.equal(on_disk.record(0, expert), in_memory.record(0, expert))
    on_disk.close()
    in_memory.close()


def test_the_plan_counts_stored_records_and_room_to_unpack():
    packed = one_matrix(64, 32, "bfloat16", ((32, 32), "uint8"), ((2, 32), "uint8"), (32, 1))
    plain = LayerSpec("l", 1, packed.layout)
    shapes = [ModelShape("m", "bfloat16", (layer,), 1, 1000, (), 32, 100) for layer in (packed, plain)]
    ours, theirs = (plan_memory(shape, parse_slots(1), memory_bytes=10**9) for shape in shapes)
    assert (ours.host_store_bytes, theirs.host_store_bytes) == (packed.record.nbytes, plain.layout.nbytes)
    # The record itself, 4 bytes twice for each of 64 scales, and likewise for each of 32 x 32 bytes of codes.
    assert unpacking_bytes(packed) == packed.record.nbytes + 8 * (64 + 1024)
    assert ours.total_bytes - theirs.total_bytes == ours.unpacking_bytes == UNPACKED_AT_A_TIME * unpacking_bytes(packed)
    assert theirs.unpacking_bytes == 0 and unpacking_bytes(plain) == 0
    assert [name for name, *_ in plan_items(ours) if name not in {n for n, *_ in plan_items(theirs)}] == ["unpacking"]
    assert sum(size for _, size, _ in plan_items(ours)) == ours.total_bytes
    assert ours.slot_bytes == theirs.slot_bytes
