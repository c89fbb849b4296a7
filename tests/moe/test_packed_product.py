"""Products with packed matrices have the bits of products with what they stand for."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import msgspec
import pytest
import torch

from epslots.bench.packed_formats import random_packed
from epslots.cache.unpacking import PackedWeight
from epslots.layout import PackedForm, PackedMatrix
from epslots.moe import packed_product
from epslots.moe.kernel_gemm import TorchProducts
from epslots.moe.packed_gemm import has_packed_kernel
from epslots.moe.packed_product import PackedProduct, suits
from epslots.moe.vector_code import host_has
from epslots.moe.vector_gemm import product

# Rows of each slot: none, a few, and many, for which whole chunks are unpacked.
COUNTS = [2, 0, 8, 9]
SLOTS, ENDS = len(COUNTS), torch.tensor(COUNTS).cumsum(0).int()
# Whether codes become numbers in registers.
TILES = host_has("avx512bf16") and host_has("avx512vbmi")
SCALES = (None, "float32", "bfloat16", "float16", "float8_e4m3fn", "uint8")
# Blocks of formats: NVFP4's, MXFP4's, GPTQ's, DeepSeek's FP8 (cut short), and a row.
BLOCKS = ((1, 16), (1, 32), (1, 128), (128, 128), (1, 10**6))


def unpacked(weight: PackedWeight) -> torch.Tensor:
    """The weights [Q, M, K] of all slots."""
    return torch.stack([weight.unpack(slot).t().clone() for slot in range(SLOTS)])


def assert_equal_products(*forms: PackedForm, dtype: torch.dtype = torch.float32, activation: str | None = None) -> None:
    torch.manual_seed(0)
    weight = random_packed(forms, SLOTS, dtype)
    assert suits(forms, dtype)
    dense, rows = unpacked(weight), torch.randn(sum(COUNTS), forms[0].columns).to(dtype) / 50
    bias = torch.randn(SLOTS, dense.shape[1]).to(dtype)
    result = PackedProduct(weight, bias, activation, exact=True)(rows, ENDS)
    assert result.dtype is dtype and torch.isfinite(result).all() and result.any()
    wanted = product(rows, dense, ENDS, bias, activation)
    if activation is None and dtype is torch.bfloat16 and forms[0].columns % 32 == 0 and TILES:
        assert_few_rows(weight, bias, rows, result)
    if forms[0].perm:  # a row's products are summed in another order
        torch.testing.assert_close(result, wanted, rtol=2**-7 if dtype is torch.bfloat16 else 1e-6, atol=1e-3)
    else:
        assert torch.equal(result, wanted)


def assert_few_rows(weight: PackedWeight, bias: torch.Tensor, rows: torch.Tensor, exact: torch.Tensor) -> None:
    """Up to eight rows of codes of 8 bits, and two of others, are multiplied with weights that aren't rounded."""
    found = PackedProduct(weight, bias)(rows, ENDS)
    unrounded = 8 if weight.matrix.forms[0].kind in ("e4m3", "int8") else 2
    dense = unpacked(replace(weight, dtype=torch.float32)).double()
    for slot, (count, end) in enumerate(zip(COUNTS, ENDS.tolist(), strict=True)):
        own = slice(end - count, end)
        if count > unrounded:
            assert torch.equal(found[own], exact[own]), "more rows have the bits of unpacked slots"
        elif count:
            sums = rows[own].double() @ dense[slot].T + bias[slot]
            assert (found[own] - sums).abs().max() <= 2**-8 * sums.abs().max()
            assert (found[own] == sums.bfloat16()).float().mean() > 0.95


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["e4m3", "int8", "int4", "e2m1"])
def test_packed_slots_have_the_bits_of_unpacked_ones(kind: str, dtype: torch.dtype):
    """In every form of scales and blocks; one matrix, or a gate and its up whose codes lie apart. A row or two are exact."""
    for scales, block, row in itertools.product(SCALES, BLOCKS, (False, True)):
        zero = kind == "int4" and scales is not None and row
        block = (1, 1) if scales is None else block
        form = PackedForm(kind, 48, 288, scales, block, zero=zero, row=row)  # 288: the last block of 128 is cut short
        assert_equal_products(*[form] * (1 + row), dtype=dtype, activation="silu" if row else None)


@pytest.mark.parametrize("kind", ["e4m3", "int8"])
def test_each_code_of_8_bits_is_its_number(kind: str):
    """For one row and for eight: an input that is one in a column yields the column."""
    form = PackedForm(kind, 64, 256)
    codes = (torch.arange(64)[:, None] + torch.arange(256)).to(torch.uint8)
    stored = codes.view(torch.int8)
    if kind == "e4m3":
        stored = torch.where(codes & 127 == 127, 0, codes).view(torch.float8_e4m3fn)  # which are NaN
    multiply = PackedProduct(PackedWeight(PackedMatrix("w", (form,)), ({"codes": stored[None]},), torch.bfloat16))
    columns = torch.eye(256, dtype=torch.bfloat16)
    for rows in (1, 8):
        found = torch.cat([multiply(block) for block in columns.split(rows)])
        assert torch.equal(found.t().float(), stored.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_columns_may_be_padded_and_permuted(dtype: torch.dtype):
    """A gate and its up may be permuted differently: they are multiplied one after the other then."""
    permuted = PackedForm("int4", 64, 40, "float32", (1, 32), zero=True, perm=True)
    assert_equal_products(permuted, dtype=dtype)
    assert_equal_products(permuted, permuted, dtype=dtype)
    assert_equal_products(permuted, permuted, dtype=dtype, activation="silu")
    assert_equal_products(permuted, permuted, dtype=dtype, activation="gelu_tanh")
    padded = PackedForm("e2m1", 64, 40, "uint8", (1, 32))
    assert_equal_products(padded, dtype=dtype)
    weight, rows = random_packed([padded], SLOTS, dtype), torch.randn(sum(COUNTS), 40).to(dtype)
    few, exact = (PackedProduct(weight, exact=exact)(rows, ENDS) for exact in (False, True))
    assert torch.equal(few, exact), "codes aren't multiplied as they are: inputs have no padding"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["e4m3", "int8"])
def test_any_width_is_read(kind: str, dtype: torch.dtype):
    """The last codes of a row are no whole vector; behind them lie the next row's, or another tensor."""
    for columns, block in itertools.product((33, 40, 63, 95), (10**6, 32)):
        form = PackedForm(kind, 48, columns, "float32", (1, block), row=True)
        assert_equal_products(form, dtype=dtype)
        assert_equal_products(form, form, dtype=dtype, activation="silu")
    if dtype is torch.float32:
        assert_equal_products(PackedForm(kind, 48, 17, row=True))


def test_zeros_need_no_scales():
    assert_equal_products(PackedForm("int4", 48, 64, None, (1, 32), zero=True, row=True))


def test_forms_may_differ():
    int8, int4 = PackedForm("int8", 32, 64, row=True), PackedForm("int4", 64, 64, "bfloat16", (1, 32))
    assert_equal_products(int8, int4, int8)


def test_many_rows_and_large_matrices():
    """Several chunks of rows that don't fit a core's cache, and pairs that are no whole number of the smallest chunk."""
    assert_equal_products(PackedForm("int4", 2 * 95, 4096, "bfloat16", (1, 128), zero=True), dtype=torch.bfloat16)


def test_nan_stays_nan_in_its_output():
    weight = random_packed([PackedForm("e4m3", 64, 64, "float32", (1, 32))], SLOTS, torch.float32)
    weight.parts[0]["codes"].view(torch.uint8)[0, 5, 7] = 0xFF
    weight.parts[0]["group"][0, 9, 0] = torch.nan
    for dtype in (torch.float32, torch.bfloat16):
        result = PackedProduct(replace(weight, dtype=dtype))(
            torch.ones(1, 64, dtype=dtype), torch.ones(SLOTS, dtype=torch.int32)
        )
        assert torch.isnan(result[0]).nonzero().flatten().tolist() == [5, 9]


@pytest.mark.parametrize(
    "form",
    [
        PackedForm("e4m3", 64, 80, "float32", (1, 40)),
        PackedForm("int8", 64, 64, "float32", (1, 24)),
        PackedForm("int4", 64, 40, "float32", (1, 16)),
        PackedForm("int8", 63, 64, row=True),
        PackedForm("int8", 30, 64, row=True),
        PackedForm("int4", 64, 16, "float32", (1, 16)),
    ],
    ids=["cut", "blocks", "padding", "odd", "narrow", "short"],
)
def test_forms_that_no_loop_knows(form: PackedForm):
    """Blocks that aren't whole vectors, padding that no block covers, matrices that don't halve or are too small."""
    assert not suits([form], torch.bfloat16)
    good = PackedForm("int8", 64, 64, row=True)
    assert suits([good], torch.bfloat16) and not suits([good, form], torch.bfloat16) and not suits([good], torch.float16)


def test_permuted_columns_are_unpacked_on_a_cpu():
    """The loops take them, but in longer than unpacked slots take."""
    plain = PackedForm("int4", 64, 64, "float16", (1, 32))
    permuted = msgspec.structs.replace(plain, perm=True)
    assert has_packed_kernel(PackedMatrix("w", (plain,)), torch.bfloat16, "cpu") == host_has("avx512bf16")
    assert not has_packed_kernel(PackedMatrix("w", (permuted,)), torch.bfloat16, "cpu")
    assert suits([permuted], torch.bfloat16)


@contextmanager
def other_defaults() -> Iterator[None]:
    """A user's default dtype and device, of which nothing may depend whose address is read."""
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def test_defaults_at_import_and_in_calls_are_not_read():
    """Loops read float32 on the CPU, though the module is first imported under a model's defaults."""
    spec = importlib.util.find_spec(packed_product.__name__)
    assert spec is not None and spec.loader is not None
    again = importlib.util.module_from_spec(spec)
    with other_defaults():
        spec.loader.exec_module(again)
    rows = torch.randn(sum(COUNTS), 64)
    for form in (PackedForm("int4", 64, 64, "float32", (1, 32)), PackedForm("int8", 64, 64, perm=True)):
        weight = random_packed([form], SLOTS, torch.float32)
        wanted = PackedProduct(weight)(rows, ENDS), PackedProduct(weight)(rows, None), weight.unpack(1).clone()
        with other_defaults():
            found = again.PackedProduct(weight)(rows, ENDS), again.PackedProduct(weight)(rows, None), weight.unpack(1)
        assert all(map(torch.equal, found, wanted))


def test_tiles_are_where_their_rows_are():
    products = TorchProducts()
    wanted = products.list_tiles(ENDS, sum(COUNTS))
    with other_defaults():
        found = products.list_tiles(ENDS, sum(COUNTS))
    count = int(wanted.count)
    assert count and torch.equal(found.slot_T[:count], wanted.slot_T[:count])
