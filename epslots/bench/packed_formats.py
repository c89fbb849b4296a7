"""Products with packed slots on the CPU against those with bfloat16 slots, by format; and random packed matrices."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from epslots.bench.report import US, Tables, compare
from epslots.cache.unpacking import PackedWeight
from epslots.layout import PackedForm, PackedMatrix
from epslots.moe.packed_product import PackedProduct
from epslots.moe.vector_gemm import ready_product
from epslots.progress import Advance

# An expert of Qwen3-30B-A3B.
HIDDEN, WIDTH = 2048, 768
# Experts that are used in turn: together larger than caches.
SLOTS = 8
ROWS = (1, 2, 4, 8, 16, 64)
SIDES = ("bf16", "packed")

# By name, the fields of ``PackedForm`` beside the shape.
FORMATS: dict[str, dict[str, Any]] = {
    "fp8, blocks": {"kind": "e4m3", "group": "float32", "block": (128, 128)},
    "fp8, channels": {"kind": "e4m3", "row": True},
    "int8, channels": {"kind": "int8", "row": True},
    "int4 of 32 with zeros": {"kind": "int4", "group": "bfloat16", "block": (1, 32), "zero": True},
    "int4 of 32": {"kind": "int4", "group": "bfloat16", "block": (1, 32)},
    "int4 of 128, act order": {"kind": "int4", "group": "float16", "block": (1, 128), "zero": True, "perm": True},
    "mxfp4": {"kind": "e2m1", "group": "uint8", "block": (1, 32)},
    "nvfp4": {"kind": "e2m1", "group": "float8_e4m3fn", "block": (1, 16), "row": True},
}


def random_packed(forms: Sequence[PackedForm], slots: int, dtype: torch.dtype) -> PackedWeight:
    """A matrix of random codes and scales in slots that hold as much again beside it."""
    parts = []
    for form in forms:
        wide = {name: _random_part(name, (2 * slots, *shape), kind) for name, (shape, kind) in form.tensors.items()}
        parts.append({name: part[::2] for name, part in wide.items()})
    return PackedWeight(PackedMatrix("w", tuple(forms)), tuple(parts), dtype)


def _random_part(name: str, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    if name == "perm":
        return torch.rand(shape).argsort(1).int()
    if name == "zero":
        return torch.randint(0, 17, shape, dtype=torch.uint8)
    if name == "codes" and dtype == "float8_e4m3fn":
        return (torch.randn(shape) * 20).to(torch.float8_e4m3fn)
    if dtype == "int8":
        return torch.randint(-128, 128, shape, dtype=torch.int8)
    if dtype == "uint8":  # codes of 4 bits, or exponents
        return torch.randint(*((0, 256) if name == "codes" else (110, 130)), shape, dtype=torch.uint8)
    return (torch.rand(shape) + 0.1).to(getattr(torch, dtype))


def measure_formats(rounds: int, advance: Advance) -> Tables:
    """Microseconds an expert, whose rows are in one slot: packed slots over bfloat16 ones."""
    torch.manual_seed(0)
    dense = (
        (torch.randn(SLOTS, 2 * WIDTH, HIDDEN) * 0.02).bfloat16(),
        (torch.randn(SLOTS, HIDDEN, WIDTH) * 0.02).bfloat16(),
    )
    unpacked = ready_product(dense[0], None, "silu"), ready_product(dense[1])
    ends = [(torch.arange(SLOTS) >= slot).int() for slot in range(SLOTS)]  # where a single row is in each slot
    table, errors = [], []
    for name, fields in FORMATS.items():
        halves, own = PackedForm(rows=WIDTH, columns=HIDDEN, **fields), PackedForm(rows=HIDDEN, columns=WIDTH, **fields)
        first = PackedProduct(random_packed([halves] * 2, SLOTS, torch.bfloat16), None, "silu")
        down = PackedProduct(random_packed([own], SLOTS, torch.bfloat16))
        for count in ROWS:
            rows, turns = torch.randn(count, HIDDEN).bfloat16() / 100, {side: itertools.cycle(ends) for side in SIDES}

            def by_dense(rows: torch.Tensor = rows, turn: Iterator[torch.Tensor] = turns["bf16"], count: int = count) -> None:
                at = next(turn) * count
                unpacked[1](unpacked[0](rows, at), at)

            def by_codes(
                rows: torch.Tensor = rows,
                turn: Iterator[torch.Tensor] = turns["packed"],
                count: int = count,
                both: tuple[PackedProduct, PackedProduct] = (first, down),
            ) -> None:
                at = next(turn) * count
                both[1](both[0](rows, at), at)

            candidates = {"bf16": by_dense, "packed": by_codes}
            table.append({"slots": name, "rows": count} | compare(candidates, "packed", "bf16", 4 * rounds, US))
        advance(1)
        errors.append({"slots": name, "largest error, of the results' scale": _error(halves)})
    return {
        f"us an expert of 3 x {HIDDEN} x {WIDTH}, packed slots over bf16 slots": table,
        "products from packed slots in fp32, against the weights that they stand for in fp64": errors,
    }


def _error(form: PackedForm) -> float:
    """Of a row in each slot."""
    weight = random_packed([form], SLOTS, torch.float32)
    rows = torch.randn(SLOTS, form.columns)
    found = PackedProduct(weight)(rows, torch.arange(1, SLOTS + 1, dtype=torch.int32))
    exact = torch.stack([row.double() @ weight.unpack(slot).double() for slot, row in enumerate(rows)])
    return float((found - exact).abs().max() / exact.abs().max())
