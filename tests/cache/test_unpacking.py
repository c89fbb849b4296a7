"""Packed records: what unpacking gives for any form, and what readers, stores and plans make of packed checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.core_model_loading import Transpose

import epslots
from epslots.cache import unpacking
from epslots.cache.host_store import HostStore, Manifest, StoreShape
from epslots.cache.node_store import open_node_store
from epslots.cache.unpacking import assert_consistent, record_views, unpack, unpack_record
from epslots.layout import LayerSpec, PackedForm, PackedLayout, PackedMatrix, RecordLayout, unpacking_bytes
from epslots.models.checkpoint import Checkpoint
from epslots.models.conversions import conversions_of
from epslots.models.expert_reader import ExpertReader, pack_layers
from epslots.models.memory_report import plan_items
from epslots.models.model_shape import ModelShape
from epslots.models.opening import load_dense, open_model
from epslots.models.packing import find_packing
from epslots.progress import ProgressDisplay
from epslots.units import parse_slots
from tests.support import zoo
from tests.support.memory_plans import plan_of
from tests.support.quantised import E2M1

CPU = torch.device("cpu")
Checkpoints = Callable[[str], Path]


def random_parts(form: PackedForm, random: torch.Generator) -> dict[str, torch.Tensor]:
    """Any codes at all, also NaN; scales of moderate size."""
    parts = {}
    for name, (shape, dtype) in form.tensors.items():
        if name == "perm":
            parts[name] = torch.randperm(form.columns, generator=random).int()
        elif name == "row" or (name == "group" and dtype in ("float32", "bfloat16", "float16")):
            parts[name] = torch.randn(shape, generator=random).to(getattr(torch, dtype))
        else:
            least, most = {"zero": (0, 17), "group": (100, 126)}.get(name, (0, 256))
            found = torch.randint(least, most, shape, generator=random).to(torch.uint8)
            parts[name] = found.view(getattr(torch, dtype))
    return parts


def by_definition(form: PackedForm, parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """Weight by weight, from its own code, scale and zero."""
    n, k = torch.meshgrid(torch.arange(form.rows), torch.arange(form.columns), indexing="ij")
    block = n // form.block[0], k // form.block[1]
    if form.kind in ("int4", "e2m1"):
        byte = parts["codes"].long()[n, k // 32 * 16 + k % 16]
        code = torch.where(k % 32 >= 16, byte // 16, byte % 16)
        value = code.float() if form.kind == "int4" else E2M1[code]
    else:
        value = parts["codes"].float()[n, k]
    if form.zero or form.kind == "int4":
        value = value - (parts["zero"].float()[block] if form.zero else 8)
    scale = torch.ones(())
    if form.group is not None:
        raw = parts["group"][block]
        scale = torch.pow(2.0, raw.double() - 127).float() if form.group == "uint8" else raw.float()
    if form.row:
        scale = scale * parts["row"][n]
    weights = torch.empty(form.rows, form.columns)
    weights[n, parts["perm"].long()[k] if form.perm else k] = value * scale
    return weights


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes; one NaN is as good as another."""
    tensor = torch.where(tensor.isnan(), torch.full((), math.nan, dtype=tensor.dtype), tensor)
    return tensor.contiguous().view(-1).view(torch.uint8)


@given(
    kind=st.sampled_from(["e4m3", "int8", "int4", "e2m1"]),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 70)),
    block=st.tuples(st.integers(1, 5), st.one_of(st.integers(1, 40), st.sampled_from([16, 32, 48, 64]))),
    group=st.sampled_from([None, "float32", "bfloat16", "float16", "float8_e4m3fn", "uint8"]),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    run=st.sampled_from([1, 150, 1 << 17]),
    loops=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_form_unpacks_as_it_is_defined(
    kind: str,
    shape: tuple[int, int],
    block: tuple[int, int],
    group: str | None,
    flags: tuple[bool, bool, bool],
    dtype: torch.dtype,
    run: int,
    loops: bool,
    seed: int,
):
    """To the bit, by loops and by operations: blocks cut short, columns that don't fill their bytes, runs of many sizes."""
    zero, row, perm = flags
    form = PackedForm(kind, *shape, group, block, zero and kind == "int4" and group is not None, row, perm)
    parts = random_parts(form, torch.Generator().manual_seed(seed))
    out = torch.full((shape[1], shape[0]), 7.0, dtype=dtype).t()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unpacking, "UNPACK_RUN", run)
        unpack(form, parts, out, loops=loops)
    assert torch.equal(bits(out), bits(by_definition(form, parts).to(dtype)))


@pytest.mark.parametrize("kind", ["e4m3", "int8", "int4", "e2m1"])
@pytest.mark.parametrize("width", [16, 32, 48, 64, 96])
def test_loops_know_blocks_of_any_lanes(kind: str, width: int):
    """Halves of a byte in one block or in two, blocks cut short, and one block of all."""
    form = PackedForm(kind, 5, 96, "float32", (2, width), zero=kind == "int4", row=True)
    parts = random_parts(form, torch.Generator().manual_seed(width))
    for columns in (96, 90):
        form = msgspec.structs.replace(form, columns=columns)
        parts["codes"] = parts["codes"][:, : form.tensors["codes"][0][1]].contiguous()
        out = torch.empty(5, columns)
        unpack(form, parts, out)
        assert torch.equal(bits(out), bits(by_definition(form, parts)))


def test_every_exponent_is_a_power_of_two():
    form = PackedForm("int8", 256, 1, "uint8")
    parts = {"codes": torch.ones(256, 1, dtype=torch.int8), "group": torch.arange(256).to(torch.uint8).view(256, 1)}
    out = torch.empty(256, 1)
    unpack(form, parts, out)
    assert out[:255, 0].tolist() == [2.0 ** (n - 127) for n in range(255)] and out[255].isnan()


def packed_layer() -> LayerSpec:
    weights = RecordLayout.of([("bias", (32,), "bfloat16"), ("matrix", (64, 32), "bfloat16")])
    matrix = PackedMatrix("matrix", (PackedForm("e2m1", 64, 32, "uint8", (1, 32)),))
    record = RecordLayout.of([("bias", (32,), "bfloat16"), *matrix.tensors])
    return LayerSpec("l", 1, record, PackedLayout(weights, (matrix,)))


def test_a_record_that_is_not_packed_holds_its_weights():
    layer = LayerSpec("l", 1, RecordLayout.of([("matrix", (3, 5), "float32")]))
    record = torch.arange(layer.layout.nbytes, dtype=torch.uint8)
    assert torch.equal(unpack_record(layer, record)["matrix"], record_views(record, layer.layout)["matrix"])
    assert layer.weights == layer.layout


@pytest.mark.parametrize(
    "matrix",
    [
        PackedMatrix("matrix", (PackedForm("e2m1", 62, 32, "uint8", (1, 32)),)),
        PackedMatrix("matrix", (PackedForm("e2m1", 64, 32, "uint8", (1, 16)),)),
        PackedMatrix("matrix", (PackedForm("e2m1", 64, 32, "uint8", (1, 32), row=True),)),
        PackedMatrix("bias", (PackedForm("e2m1", 64, 32, "uint8", (1, 32)),)),
    ],
)
def test_layouts_that_leave_something_out_are_mistakes(matrix: PackedMatrix):
    layer = packed_layer()
    assert_consistent(layer)
    assert layer.packed is not None
    with pytest.raises(AssertionError):
        assert_consistent(msgspec.structs.replace(layer, packed=PackedLayout(layer.weights, (matrix,))))


# --- checkpoints -----------------------------------------------------------------------------------------------------


class Opened:
    """A quantised checkpoint, its model, and its layers as they are computed with and packed."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        opened = open_model(folder, dtype)
        self.checkpoint: Checkpoint = opened.checkpoint
        self.skeleton, self.plain = opened.skeleton, opened.layers
        self.packed = pack_layers(opened.checkpoint, opened.skeleton, opened.layers)
        self.model = load_dense(opened, device=CPU, show_progress=False)

    def reader(self, layers: tuple[LayerSpec, ...]) -> ExpertReader:
        return ExpertReader(self.checkpoint, self.model, layers)


def ragged_fp8(source: Path, folder: Path) -> Path:
    """Blocks of 24: 64 = 24 + 24 + 16."""
    return zoo.make_fp8(source, folder, block=24)


MAKERS = [("deepseek_v3", zoo.make_fp8, 2), ("deepseek_v3", ragged_fp8, 3), ("gpt_oss", zoo.make_mxfp4, 2)]


@pytest.mark.parametrize(("name", "make", "forms"), MAKERS)
def test_every_expert_of_a_quantised_checkpoint(
    name: str, make: Callable[..., Path], forms: int, checkpoint: Checkpoints, tmp_path: Path
):
    """Its record unpacks to the weights that the model's conversions make, bit for bit."""
    opened = Opened(make(checkpoint(name), tmp_path / "quantised"), torch.bfloat16)
    packed, plain = opened.reader(opened.packed), opened.reader(opened.plain)
    for index, layer in enumerate(opened.packed):
        assert layer.weights == opened.plain[index].layout and layer.packed is not None
        assert sum(len(matrix.forms) for matrix in layer.packed.matrices) == forms
        for expert in range(layer.num_experts):
            record = torch.zeros(layer.layout.nbytes, dtype=torch.uint8)
            for part, tensor in packed.read_expert(index, expert).items():
                record_views(record, layer.layout)[part].copy_(tensor)
            for part, tensor in unpack_record(layer, record).items():
                expected = plain.read_expert(index, expert)[part]
                assert torch.equal(bits(tensor), bits(expected.to(tensor.dtype)))


def test_conversions_are_known_before_anything_is_loaded(checkpoint: Checkpoints, tmp_path: Path):
    """transformers tells them of a loaded model; ``conversions_of`` works them out beforehand."""

    def described(conversions: list[Any]) -> list[Any]:
        return [(c.source_patterns, c.target_patterns, [type(o) for o in getattr(c, "operations", ())]) for c in conversions]

    opened = Opened(zoo.make_fp8(checkpoint("deepseek_v3"), tmp_path / "fp8"))
    used = [c for c in conversions_of(opened.skeleton) if c.source_patterns]
    assert [c for c in described(opened.model._weight_conversions) if c not in described(used)] == []


def test_what_is_not_quantised_is_not_packed(checkpoint: Checkpoints):
    opened = Opened(checkpoint("mixtral"))
    assert opened.packed == opened.plain


def test_wider_slots_are_filled_as_ever(checkpoint: Checkpoints, tmp_path: Path):
    """Weights are products in float32, which a slot of float64 would show."""
    opened = Opened(zoo.make_fp8(checkpoint("deepseek_v3"), tmp_path / "fp8"), torch.float64)
    assert opened.packed == opened.plain


def test_an_unknown_operation_keeps_a_tensor_unpacked(checkpoint: Checkpoints, tmp_path: Path):
    opened = Opened(zoo.make_fp8(checkpoint("deepseek_v3"), tmp_path / "fp8"))
    spec, source = opened.plain[0].layout.tensors[1], opened.reader(opened.plain)._layers[0]["down_proj"]
    headers, experts = opened.checkpoint.tensors, opened.plain[0].num_experts
    converter = source.converter
    assert converter is not None and find_packing(spec, source, headers, experts) is not None
    converter.operations.append(Transpose(1, 2))
    assert find_packing(spec, source, headers, experts) is None
    converter.operations.pop()
    merge = converter.operations[1]
    converter.operations[1] = Transpose(0, 1)
    assert find_packing(spec, source, headers, experts) is None
    converter.operations[1] = merge
    other: Any = {key: SimpleNamespace(**{**vars(header), "dtype": "BF16"}) for key, header in headers.items()}
    assert find_packing(spec, source, other, experts) is None
    assert find_packing(spec, source, headers, experts + 1) is None
    source.converter = None
    assert find_packing(spec, source, headers, experts) is None


def test_records_that_stand_for_other_weights_are_refused(
    checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The first expert of each layer is compared with what the model's own conversions make of it."""
    opened = Opened(zoo.make_fp8(checkpoint("deepseek_v3"), tmp_path / "fp8"))
    reader = opened.reader(opened.packed)
    reader.read_expert(0, 0)
    original = ExpertReader._read
    monkeypatch.setattr(ExpertReader, "_read", lambda *arguments: original(*arguments).flip(0))
    with pytest.raises(epslots.CheckpointError, match=r"stands for other weights than the model's"):
        reader.read_expert(0, 0)


def open_store(opened: Opened, cache_dir: Path, kind: str) -> HostStore:
    return open_node_store(
        Manifest("k3y", "model", opened.packed),
        lambda: opened.reader(opened.packed),
        kind=kind,
        cache_dir=cache_dir,
        start_progress=ProgressDisplay(shown=False),
    )


def test_the_store_holds_records_as_they_are_stored(checkpoint: Checkpoints, tmp_path: Path, cache_dir: Path):
    """A file, then shared memory filled from it; digests are of the packed records."""
    opened = Opened(zoo.make_mxfp4(checkpoint("gpt_oss"), tmp_path / "mxfp4"))
    on_disk, in_memory = (open_store(opened, cache_dir, kind) for kind in ("file", "memory"))
    layer = opened.packed[0]
    assert on_disk.nbytes == StoreShape(on_disk.manifest).nbytes < StoreShape(Manifest("k", "m", opened.plain)).nbytes
    assert on_disk.verify() == in_memory.verify() == []
    for expert in range(layer.num_experts):
        assert on_disk.record(0, expert).nbytes == layer.layout.nbytes
        assert torch.equal(on_disk.record(0, expert), in_memory.record(0, expert))
    on_disk.close()
    in_memory.close()


def test_the_plan_counts_packed_slots_and_room_to_unpack():
    packed = packed_layer()
    plain = LayerSpec("l", 1, packed.weights)
    shapes = [ModelShape("m", "bfloat16", (layer,), 1, 1000, (), 32, 100) for layer in (packed, plain)]
    ours, theirs = (plan_of(shape, parse_slots(1), memory_bytes=10**9) for shape in shapes)
    for plan, layer in ((ours, packed), (theirs, plain)):
        assert plan.host_store_bytes == plan.slot_bytes == layer.layout.nbytes
        assert sum(size for _, size, _ in plan_items(plan)) == plan.total_bytes
    assert ours.slot_bytes < theirs.slot_bytes and ours.workspace_bytes == theirs.workspace_bytes
    assert ours.unpacking_bytes == unpacking_bytes(packed) == 64 * 32 * 2 + 3 * 4 * (1 << 17)
    assert theirs.unpacking_bytes == unpacking_bytes(plain) == 0
    assert shapes[0].parameters == shapes[1].parameters
    assert [name for name, *_ in plan_items(ours) if name not in {n for n, *_ in plan_items(theirs)}] == ["unpacking"]
