"""Counting, sorting and summing pairs: torch's operations and compiled loops against plain Python, and Triton's kernels.

The latter by Triton's interpreter, in the process of ``tests/cuda_graph/test_triton_kernels.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epslots.moe.pair_kernels import Keys, PairKernels, TorchPairKernels
from epslots.moe.pair_loops import CompiledPairKernels, scatter_rows
from tests.support.interpreter import INTERPRETER, assembled, compiled, interpreted, needs_triton, outside

CPU = torch.device("cpu")
KINDS = ["Triton's"] if INTERPRETER else ["torch's", "compiled"]


def kernels(experts: int, kind: str = "") -> PairKernels:
    if kind == "compiled":
        return CompiledPairKernels(experts)
    if not INTERPRETER:
        return TorchPairKernels(experts, CPU)
    from epslots.moe.pair_triton import TritonPairKernels

    return TritonPairKernels(experts, CPU)


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """Pairs of a layer, and the slot of each expert in a window; some experts are absent, and some ids stand for none."""
    experts, top_k = draw(st.integers(1, 40)), draw(st.integers(1, 3))
    absent = draw(st.booleans())
    tokens = draw(st.integers(1, 60))
    ids = draw(st.lists(st.integers(0, experts - 1 + absent), min_size=tokens * top_k, max_size=tokens * top_k))
    first, slots = draw(st.integers(0, 9)), experts + draw(st.integers(0, 3))
    key_of = draw(st.permutations(range(first, first + slots)))[:experts]
    if absent:
        key_of = [-1 if draw(st.booleans()) else key for key in key_of]
    some = draw(st.integers(0, 200))
    return {
        "some": some,
        "experts": experts,
        "top_k": top_k,
        "ids": ids,
        "keys": range(first, first + slots),
        "key_of": key_of,
    }


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=12 if INTERPRETER else 40)
@given(problem=problems())
def test_pairs_are_counted_and_sorted(kind: str, problem: dict[str, Any]):
    """Stably, by key; pairs without a slot go last."""
    experts, ids, keys = problem["experts"], problem["ids"], problem["keys"]
    ours, tensor = kernels(experts, kind), torch.tensor(problem["ids"])
    counts = [ids.count(expert) for expert in range(experts + 1)]
    assert ours.count(tensor).tolist() == counts

    tokens, uses = torch.full((experts + 1,), 5), torch.tensor(7)
    ours.add_counts(tensor, tokens, uses)
    assert tokens.tolist() == [5 + count for count in counts]
    assert uses.tolist() == 7 + sum(count > 0 for count in counts[:-1])

    some = problem["some"] % (len(ids) + 1)
    tokens, uses = torch.zeros(experts + 1, dtype=torch.int64), torch.tensor(0)
    ours.add_counts(tensor, tokens, uses, torch.tensor([some]))
    assert tokens.tolist() == [ids[:some].count(expert) for expert in range(experts + 1)]
    assert uses.tolist() == len({*ids[:some]} - {experts})

    absent = experts in ids or -1 in problem["key_of"]
    given_keys = Keys.between(keys.start, keys.stop, CPU)
    found = ours.sort(tensor, torch.tensor(problem["key_of"]), given_keys, problem["top_k"], absent=absent)
    key_of = [keys.stop if key < 0 else key for key in [*problem["key_of"], -1]]
    order = sorted(range(len(ids)), key=lambda pair: key_of[ids[pair]])
    assert found.pair_N.tolist() == order
    assert found.token_N.tolist() == [pair // problem["top_k"] for pair in order]
    assert found.key_N.tolist() == [key_of[ids[pair]] for pair in order]
    assert found.ends_Q.tolist() == [sum(key_of[i] <= key for i in ids) for key in keys]
    assert found.ends_Q.dtype == torch.int32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("tokens", "top_k", "columns"), [(1, 1, 1), (3, 2, 40), (2, 8, 1300), (3, 4, 48)])
@pytest.mark.parametrize("kind", KINDS)
def test_results_are_weighted_and_summed(kind: str, dtype: torch.dtype, tokens: int, top_k: int, columns: int):
    """At least in fp32, for any strides of the weights; the sum is rounded once."""
    random = torch.Generator().manual_seed(tokens)
    results = torch.randn(tokens * top_k, columns, generator=random).to(dtype)
    weights = torch.rand(top_k, tokens, generator=random).t()
    found = kernels(4, kind).weighted_sum(results, weights, dtype)
    exact = (results.double().view(tokens, top_k, columns) * weights.double()[:, :, None]).sum(1)
    assert found.dtype == dtype and found.shape == (tokens, columns)
    assert (found.double() - exact).abs().max() <= max(torch.finfo(dtype).eps, 1e-6) * max(1.0, float(exact.abs().max()))


@pytest.mark.parametrize(("dtype", "columns"), [(torch.float32, 6), (torch.bfloat16, 64), (torch.bfloat16, 7)])
def test_rows_are_put_in_their_places(dtype: torch.dtype, columns: int):
    rows, places = torch.randn(9, columns).to(dtype), torch.randperm(9, generator=torch.Generator().manual_seed(1))
    assert torch.equal(scatter_rows(rows, places)[places], rows)
    assert torch.equal(scatter_rows(rows[:, : columns // 2], places)[places], rows[:, : columns // 2])


@outside
def test_compiled_loops_read_no_strange_expert():
    """They read memory by the router's numbers."""
    ours, keys = CompiledPairKernels(3), Keys.between(4, 7, CPU)
    for ids in ([0, 4], [-1, 0]):
        with pytest.raises(IndexError, match="isn't one of 0 to 3"):
            ours.add_counts(torch.tensor(ids), torch.zeros(4, dtype=torch.int64), torch.zeros((), dtype=torch.int64))
        with pytest.raises(IndexError, match="no slot holds"):
            ours.sort(torch.tensor(ids), torch.tensor([4, 6, 5]), keys, 2, absent=False)
    for strange in (-1, 3, 8):
        with pytest.raises(IndexError, match="no slot holds"):
            ours.sort(torch.tensor([0, 1]), torch.tensor([4, strange, 5]), keys, 2, absent=False)


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_behind_the_last_key_are_sorted_too(kind: str):
    """A plan gives it to experts that the CPU computes."""
    found = kernels(3, kind).sort(torch.tensor([2, 1, 0]), torch.tensor([4, 7, 5]), Keys.between(4, 7, CPU), 3, absent=False)
    assert found.pair_N.tolist() == [2, 0, 1] and found.key_N.tolist() == [4, 5, 7] and found.ends_Q.tolist() == [1, 2, 2]


@pytest.mark.skipif(INTERPRETER, reason="compiled loops")
def test_compiled_loops_read_long_integers_alone():
    """Others are sorted by torch; and the loops' results are on the CPU, under any default device."""
    ids, key_E, keys = torch.tensor([2, 0, 1, 2]), torch.arange(3), Keys.between(0, 3, CPU)
    compiled = kernels(3, "compiled")
    wanted = compiled.sort(ids, key_E, keys, 2, absent=False)
    found = compiled.sort(ids.int(), key_E, keys, 2, absent=False)
    assert all(map(torch.equal, found, wanted))
    with torch.device("meta"):
        found = kernels(3, "compiled").sort(ids, key_E, keys, 2, absent=False)
    assert all(map(torch.equal, found, wanted))


@needs_triton
@interpreted
def test_many_pairs_take_torchs_operations(monkeypatch: pytest.MonkeyPatch):
    """The kernels' work grows with the square of the pairs."""
    from epslots.moe import pair_triton

    ours, ids = kernels(3), torch.tensor([2, 0, 1, 2])
    monkeypatch.setattr(pair_triton, "_count_pairs", None)
    monkeypatch.setattr(pair_triton, "_sort_pairs", None)
    monkeypatch.setattr(pair_triton, "MOST_PAIRS", 3)
    assert ours.count(ids).tolist() == [1, 1, 2, 0]
    totals = torch.zeros(4, dtype=torch.int64), torch.zeros((), dtype=torch.int64)
    ours.add_counts(ids, *totals)
    assert totals[0].tolist() == [1, 1, 2, 0] and totals[1].tolist() == 3
    found = ours.sort(ids, torch.tensor([4, 6, 5]), Keys.between(4, 7, CPU), 2, absent=False)
    assert found.pair_N.tolist() == [1, 0, 3, 2] and found.ends_Q.tolist() == [1, 3, 4]


@needs_triton
@outside
def test_sorting_stays_in_registers(tmp_path: Path):
    """As the assembler reports it."""
    from epslots.moe import pair_triton

    numbers = dict.fromkeys(("pairs", "experts", "first_key", "stop", "programs"), "i32")
    tensors = dict.fromkeys(("ids", "key_of", "sorted_pairs", "sorted_tokens", "sorted_keys"), "*i64:16") | {"ends": "*i32:16"}
    sizes = {"TOP_K": 8, "BLOCK_B": pair_triton._OWN, "BLOCK_C": pair_triton._READ}
    told = assembled(compiled(pair_triton._sort_pairs, tensors | numbers, sizes, 80), 80, tmp_path)
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in told, told
