"""Grouped products by compiled loops are torch's products, and a row's bits depend on nothing but the row."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations.moe import _default_apply_gate

from epslots.moe import resident_loops, vector_gemm
from epslots.moe.grouped_gemm import BatchInvariantGemm, GroupedGemm
from epslots.moe.pair_kernels import Keys
from epslots.moe.pair_loops import CompiledPairKernels, scatter_rows
from epslots.moe.thread_memory import ThreadMemory
from epslots.moe.vector_gemm import fits, product

# Rows of each slot: none, and whole and broken blocks.
COUNTS = [1, 0, 4, 7, 2, 3, 0, 13]
# One rounding of float32 sums, and of bfloat16 results.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8}


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ends_of(counts: list[int]) -> torch.Tensor:
    return torch.tensor(counts).cumsum(0).int()


def exact(rows: torch.Tensor, weight: torch.Tensor, counts: list[int], bias: torch.Tensor | None) -> torch.Tensor:
    """The products in float64."""
    slots = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    results = torch.einsum("nk,nmk->nm", rows[: len(slots)].double(), weight[slots].double())
    return results if bias is None else results + bias[slots].double()


def differs(result: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((result.double() - wanted).abs().max() / wanted.abs().max())


def equal_share(result: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((result == wanted).float().mean())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("outer", "inner"), [(32, 32), (40, 40), (96, 66), (160, 97), (34, 1024)])
@pytest.mark.parametrize("biased", [False, True])
def test_products_are_exact_but_for_rounding(dtype: torch.dtype, outer: int, inner: int, biased: bool):
    """Also where a row isn't a whole number of vectors, and chunks aren't either; with rows that belong to no slot."""
    weight, rows = numbers(len(COUNTS), outer, inner, dtype=dtype), numbers(sum(COUNTS) + 2, inner, dtype=dtype, seed=1)
    bias = numbers(len(COUNTS), outer, dtype=dtype, seed=2) if biased else None
    result, wanted = product(rows, weight, ends_of(COUNTS), bias), exact(rows, weight, COUNTS, bias)
    assert result.dtype is dtype and result.shape == (len(rows), outer)
    assert differs(result[:-2], wanted) <= TOLERANCE[dtype]
    assert dtype is torch.float32 or equal_share(result[:-2], wanted.to(dtype)) > 0.99, "sums are rounded once"
    part = product(rows[:3], weight, ends_of(COUNTS), bias)  # the ends lie beyond these rows
    assert torch.equal(part, result[:3])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("biased", [False, True])
def test_gates_are_activated_as_torch_would(dtype: torch.dtype, activation: str, biased: bool):
    """With results from nothing to where the activation is flat, and rounded at the same places."""
    weight, rows = numbers(len(COUNTS), 72, 64, dtype=dtype), numbers(sum(COUNTS), 64, dtype=dtype, seed=1)
    bias = 40 * numbers(len(COUNTS), 72, dtype=dtype, seed=2) if biased else None
    gate, up = exact(rows, weight, COUNTS, bias).to(dtype).chunk(2, -1)
    wanted = (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up
    result = product(rows, weight, ends_of(COUNTS), bias, activation)
    assert differs(result, wanted.double()) <= 2 * TOLERANCE[dtype]
    if dtype is torch.bfloat16 and activation == "silu" and not biased:  # torch loses small results of its formula of GELU
        assert equal_share(result, wanted) > 0.98, "rounded where torch rounds"


def test_an_infinite_gate_or_nan_spoils_its_row_alone():
    weight, rows = numbers(1, 64, 64), numbers(3, 64)
    rows[1, 5], rows[2, 7] = float("nan"), float("inf")
    result = product(rows, weight, None, activation="silu")
    assert torch.isfinite(result[0]).all() and result[1].isnan().all() and not torch.isfinite(result[2]).any()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_row_has_the_same_bits_in_any_batch(dtype: torch.dtype):
    """For any rows beside it, slots with rows, and number of threads."""
    weight, rows = numbers(4, 192, 330, dtype=dtype), numbers(24, 330, dtype=dtype, seed=1)
    alone = torch.cat([product(row[None], weight[2:3], None, activation="silu") for row in rows])
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for count in (24, 7, 3):
                together = product(rows[:count], weight, ends_of([0, 0, count, 0]), activation="silu")
                assert torch.equal(together, alone[:count])
    finally:
        torch.set_num_threads(1)


def test_slots_are_read_where_they_lie():
    """A slot holds other tensors beside the matrix, and begins at any byte."""
    slots = torch.zeros(3, 2 * 32 * 48 + 14, dtype=torch.uint8)
    weight = torch.stack([slot[6 : 6 + 2 * 32 * 48].view(torch.bfloat16).view(32, 48) for slot in slots]).clone()
    weight = slots[:, 6 : 6 + 2 * 32 * 48].view(torch.bfloat16).view(3, 32, 48)
    weight.copy_(numbers(3, 32, 48))
    rows = numbers(5, 48, dtype=torch.bfloat16)
    assert fits(weight) and weight.data_ptr() % 4
    assert differs(product(rows, weight, ends_of([2, 0, 3])), exact(rows, weight, [2, 0, 3], None)) <= 2**-8
    bias = numbers(3, 50, dtype=torch.bfloat16)[:, :32]
    assert differs(product(rows, weight, ends_of([2, 0, 3]), bias), exact(rows, weight, [2, 0, 3], bias)) <= 2**-8
    apart = numbers(5, 96, dtype=torch.bfloat16)[:, ::2]
    assert differs(product(apart, weight, ends_of([2, 0, 3])), exact(apart, weight, [2, 0, 3], None)) <= 2**-8


def test_a_threads_memory_grows():
    here = ThreadMemory()
    assert here.job % 64 == 0
    for nbytes in (64, 999, 100):
        address, memory = here.reserve(nbytes), here._scratch
        assert address % 64 == 0 and memory.data_ptr() <= address and address + nbytes <= memory.data_ptr() + len(memory)


def test_threads_that_share_slots_have_jobs_of_their_own():
    weight, found = numbers(2, 64, 64), {}

    def run(number: int) -> None:
        rows = numbers(6, 64, seed=number)
        results = [product(rows, weight, ends_of([number, 6 - number])) for _ in range(50)]
        found[number] = max(differs(result, exact(rows, weight, [number, 6 - number], None)) for result in results)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # between any two lines
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert len(found) == 4 and max(found.values()) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    "weight",
    [
        numbers(2, 64, 32).transpose(1, 2),
        numbers(2, 64, 64).half(),
        numbers(2, 64, 64).double(),
        numbers(2, 63, 64),
        numbers(2, 30, 64),
        numbers(2, 64, 8),
        numbers(2, 64, 65)[:, :, :64],
    ],
    ids=["transposed", "half", "double", "odd", "narrow", "short", "padded"],
)
def test_weights_that_do_not_fit_are_torchs(weight: torch.Tensor):
    assert not fits(weight)


def experts(*, transposed: bool = False, biased: bool = False, gate: str = "silu", dtype: torch.dtype = torch.float32) -> Any:
    """A stand-in for an experts module, and weights of 4 slots."""
    module = SimpleNamespace(
        has_gate=gate != "none", has_bias=biased, is_transposed=transposed, has_post_expert_norm=False, act_fn=nn.SiLU()
    )
    if gate == "silu":
        module._apply_gate = MethodType(_default_apply_gate, module)
    elif gate == "interleaved":
        module._apply_gate = lambda both: F.silu(both[..., ::2]) * (both[..., 1::2] + 1)
    first = "gate_up_proj" if module.has_gate else "up_proj"
    shapes = {first: (64, 48), "down_proj": (48, 32 if module.has_gate else 64)}
    weights = {name: numbers(4, *shape, dtype=dtype) for name, shape in shapes.items()}
    if transposed:
        weights = {name: weight.transpose(1, 2).contiguous() for name, weight in weights.items()}
    if biased:
        weights |= {f"{name}_bias": numbers(4, shape[0], dtype=dtype, seed=3) for name, shape in shapes.items()}
    return module, weights


@pytest.mark.parametrize("kernel", [GroupedGemm, BatchInvariantGemm])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layout", [{}, {"biased": True}, {"gate": "interleaved"}, {"gate": "none"}, {"transposed": True}])
def test_experts_are_torchs_twin(kernel: type[GroupedGemm], dtype: torch.dtype, layout: dict[str, Any], monkeypatch: Any):
    module, weights = experts(**layout, dtype=dtype)
    counts = [3, 0, 1, 6]
    rows, key = numbers(10, 48, dtype=dtype), torch.arange(4).repeat_interleave(torch.tensor(counts))
    called, compute = [], vector_gemm.ReadyProduct.__call__
    monkeypatch.setattr(vector_gemm.ReadyProduct, "__call__", lambda *args: called.append(1) or compute(*args))
    result = kernel(module, weights)(rows, ends_of(counts), key)
    assert len(called) == (0 if layout.get("transposed") else 2)
    monkeypatch.setattr(vector_gemm, "fits", lambda weight: False)
    twin = kernel(module, weights)(rows, ends_of(counts), key)
    assert len(called) == (0 if layout.get("transposed") else 2)
    assert differs(result, twin.double()) <= 3 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_few_pairs_are_one_call(dtype: torch.dtype, biased: bool):
    """Sorted, multiplied and put back in order: the bits of the same loops one by one."""
    module, weights = experts(dtype=dtype, biased=biased)
    gemm, pairs, hidden = GroupedGemm(module, weights), CompiledPairKernels(5), numbers(3, 48, dtype=dtype, seed=4)
    keys, key_E = Keys.between(7, 11, torch.device("cpu")), torch.tensor([9, 7, -1, 10, 8])
    ids = torch.tensor([3, 0, 4, 3, 1, 0])
    found = pairs.sort(ids, key_E, keys, 2, absent=False)
    wanted = scatter_rows(gemm(hidden.index_select(0, found.token_N), found.ends_Q, found.key_N, 7), found.pair_N)
    products = gemm.ready_products(6)
    assert products is not None and resident_loops.fits(hidden, ids, key_E, dtype)
    assert torch.equal(resident_loops.execute(hidden, ids, key_E, keys, *products), wanted)
    for strange in (2, 5, -1):
        with pytest.raises(IndexError, match="no slot holds"):
            resident_loops.execute(hidden, torch.tensor([3, 0, strange, 3, 1, 0]), key_E, keys, *products)


def test_what_one_call_does_not_take():
    hidden, ids, keys = numbers(2, 48), torch.tensor([0, 1]), torch.tensor([0, 1])
    assert resident_loops.fits(hidden, ids, keys, torch.float32)
    many = torch.zeros(resident_loops.MOST_PAIRS + 1, dtype=torch.int64)
    for given in (
        (hidden, ids, keys, torch.bfloat16),
        (hidden, many, keys, torch.float32),
        (hidden, ids.int(), keys, torch.float32),
    ):
        assert not resident_loops.fits(*given)
    assert not resident_loops.fits(hidden.requires_grad_(), ids, keys, torch.float32)
    for layout in ({"gate": "interleaved"}, {"gate": "none"}, {"transposed": True}):
        assert GroupedGemm(*experts(**layout)).ready_products(6) is None


def test_gradients_are_torchs():
    module, weights = experts()
    rows = numbers(4, 48).requires_grad_()
    GroupedGemm(module, weights)(rows, ends_of([1, 1, 1, 1]), torch.arange(4)).square().sum().backward()
    assert rows.grad is not None and rows.grad.abs().sum() > 0


_ELSEWHERE = """
import torch
from epslots.compiled import prepare
from epslots.moe.grouped_rows import ROW_BLOCK
from epslots.moe.vector_gemm import product
from epslots.moe.weight_forms import FORMS
prepare()
torch.set_num_threads(1)
print(ROW_BLOCK, type(FORMS[0]).__name__)
for dtype, bound in ((torch.float32, 2e-6), (torch.bfloat16, 2**-8)):
    weight, rows = torch.randn(2, 64, 70).to(dtype), torch.randn(9, 70).to(dtype)
    wanted = torch.cat([rows[:4].double() @ weight[0].double().T, rows[4:].double() @ weight[1].double().T])
    result = product(rows, weight, torch.tensor([4, 9], dtype=torch.int32))
    assert (result.double() - wanted).abs().max() <= bound * wanted.abs().max()
"""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="names a processor of x86")
def test_a_processor_with_avx2_alone_has_the_same_results():
    environment = {**os.environ, "NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma,+f16c,+bmi,+bmi2"}
    done = subprocess.run([sys.executable, "-c", _ELSEWHERE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2", "BFloat16Form"]
