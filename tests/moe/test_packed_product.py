"""Products with codes are products with what they stand for."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from epslots.moe.packed_product import Codes, fits, product_of_codes, unpacked

SLOTS, COUNTS = 3, [2, 0, 5]
SCALES = (None, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.uint8)
# Blocks of formats: NVFP4's, MXFP4's, GPTQ's, DeepSeek's FP8 (cut short), and a row.
BLOCKS = ((1, 16), (1, 32), (1, 128), (128, 128), (1, 10**6))


def matrix(kind: str, rows: int, columns: int, scales: torch.dtype | None, block: tuple[int, int], **parts: Any) -> Codes:
    """Random codes, with ``zero``, ``row`` or ``perm`` where that is asked for."""
    if kind in ("int4", "e2m1"):
        codes = torch.randint(0, 256, (SLOTS, rows, -(-columns // 32) * 16), dtype=torch.uint8)
    elif kind == "int8":
        codes = torch.randint(-128, 128, (SLOTS, rows, columns), dtype=torch.int8)
    else:
        codes = (torch.randn(SLOTS, rows, columns) * 20).to(torch.float8_e4m3fn)
    grid = (SLOTS, -(-rows // block[0]), -(-columns // block[1]))
    group = None
    if scales is torch.uint8:
        group = torch.randint(110, 130, grid, dtype=torch.uint8)
    elif scales is not None:
        group = (torch.rand(grid) + 0.1).to(scales)
    zero = torch.randint(0, 16, grid, dtype=torch.uint8) if parts.get("zero") else None
    row = torch.rand(SLOTS, rows) if parts.get("row") else None
    perm = torch.stack([torch.randperm(columns) for _ in range(SLOTS)]).int() if parts.get("perm") else None
    return Codes(kind, codes, columns, group, block, zero, row, perm)


def assert_equal_products(matrices: list[Codes], dtype: torch.dtype = torch.float32) -> None:
    assert fits(matrices)
    weight = torch.cat([unpacked(one) for one in matrices], 1).double()
    rows = torch.randn(sum(COUNTS), matrices[0].columns).to(dtype)
    slot = torch.arange(SLOTS).repeat_interleave(torch.tensor(COUNTS))
    wanted = torch.einsum("nk,nmk->nm", rows.double(), weight[slot])
    result = product_of_codes(rows, matrices, torch.tensor(COUNTS).cumsum(0).int())
    bound = 1e-6 if dtype is torch.float32 else 2**-8
    assert result.dtype is dtype and (result - wanted).abs().max() <= bound * wanted.abs().max()
    alone = product_of_codes(rows[3:4], [_slot(one, 2) for one in matrices], None)
    assert torch.equal(alone[0], result[3]), "a row has the same bits in any batch"


def _slot(matrix: Codes, slot: int) -> Codes:
    parts = {name: part[slot : slot + 1] for name, part in matrix._asdict().items() if isinstance(part, torch.Tensor)}
    return matrix._replace(**parts)


@pytest.mark.parametrize("kind", ["e4m3", "int8", "int4", "e2m1"])
def test_codes_are_multiplied_as_what_they_stand_for(kind: str):
    """In every form of scales and blocks; one matrix, or a gate and its up whose codes lie apart."""
    torch.manual_seed(0)
    for scales, block, row in itertools.product(SCALES, BLOCKS, (False, True)):
        zero = kind == "int4" and scales is not None and row
        matrices = [matrix(kind, 48, 288, scales, block, row=row, zero=zero) for _ in range(2)]
        if block[1] == 128 and scales is not None:  # 288 columns: the last block is cut short, of 32
            assert fits(matrices)
        assert_equal_products(matrices[: 1 + row])


def test_columns_may_be_padded_and_permuted():
    torch.manual_seed(0)
    assert_equal_products([matrix("int4", 64, 40, torch.float32, (1, 32), perm=True)], torch.bfloat16)
    assert_equal_products([matrix("e2m1", 64, 40, torch.uint8, (1, 32))])


def test_gates_are_activated():
    torch.manual_seed(0)
    matrices = [matrix("int8", 32, 64, None, (1, 1), row=True) for _ in range(2)]
    rows = torch.randn(1, 64) / 100
    gate, up = (rows @ unpacked(_slot(one, 1))[0].T for one in matrices)
    result = product_of_codes(rows, [_slot(one, 1) for one in matrices], None, activation="silu")
    torch.testing.assert_close(result, torch.nn.functional.silu(gate) * up)


def test_what_no_loop_knows_does_not_fit():
    plain = matrix("e4m3", 64, 64, torch.float32, (128, 128))
    assert fits([plain]) and fits([plain, plain])
    assert not fits([plain, plain._replace(kind="int8")])
    assert not fits([matrix("e4m3", 64, 40, torch.float32, (1, 40))]), "rows aren't whole vectors"
    assert not fits([matrix("int8", 64, 64, torch.float32, (1, 24))]), "blocks aren't whole vectors"
    assert not fits([matrix("int8", 63, 64, None, (1, 1))]), "no two halves"
    assert not fits([plain._replace(codes=plain.codes.transpose(1, 2))])
