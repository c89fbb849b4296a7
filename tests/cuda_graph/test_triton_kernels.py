"""The Triton kernels: held to the torch operations by Triton's interpreter, and compiled for GPUs that aren't here.

``support/interpreter.py`` says how; this module's process also runs the other kernels' tests.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from epslots.cuda_graph.device_slots import DeviceSlots, Kernels, Missing
from epslots.cuda_graph.torch_kernels import TorchKernels
from tests.support.device_slot_helpers import (
    LAYOUT,
    STORE_LAYERS,
    assert_as_the_host_decides,
    make_loader,
    predictions,
    problems,
    put_in_state,
    run_predictions,
    states,
    store,
)
from tests.support.interpreter import assembled, compiled, interpreted, needs_triton, outside, pass_under_the_interpreter

pytestmark = needs_triton


@outside
def test_under_the_interpreter():
    in_moe = [f"moe/test_{name}" for name in ("grouped_kernel", "packed_kernel", "pair_kernels")]
    modules = "cuda_graph/test_triton_kernels", *in_moe, "prefetch/test_usage"
    pass_under_the_interpreter(*(f"tests/{module}.py" for module in modules), tests=6 + 6 + 9 + 22 + 6)


def kernels(loader: Any) -> Kernels:
    from epslots.cuda_graph import triton_kernels

    triton_kernels.GATHER_PROGRAMS = 3  # each takes the interpreter milliseconds
    return triton_kernels.TritonKernels(loader)


@interpreted
@settings(deadline=None, max_examples=6)
@given(problem=problems())
def test_triton_decides_as_the_host_does(problem: dict[str, Any]):
    """Steps in a row: the decision, the tables, the histories and every byte of every slot."""
    loader = make_loader(problem["quotas"])
    assert_as_the_host_decides(problem, loader, kernels(loader))


@interpreted
@settings(deadline=None, max_examples=30)
@given(state=states())
def test_triton_equals_torch_in_any_state(state: dict[str, Any]):
    found = []
    for make in (TorchKernels, kernels):
        loader, slots, _ = put_in_state(state, make)
        view, quota = slots.layers[state["layer"]], state["quota"]
        missing = Missing(*(torch.zeros(n, dtype=torch.int64) for n in (quota, quota, 1)))
        make(loader).decide(view, torch.tensor(state["ids"]), missing)
        count = int(missing.count)
        tensors = [view.slot_of_E, view.expert_of_Q, view.last_use_E, view.decayed_DE, view.step, view.tally_3, view.left]
        found.append([*(t.tolist() for t in tensors), missing.expert_M[:count].tolist(), missing.slot_M[:count].tolist()])
        loader.pool.check_integrity()
    assert found[0] == found[1]


@interpreted
@settings(deadline=None, max_examples=20)
@given(state=states(), predictions=predictions())
def test_triton_prefetches_as_torch_does(state: dict[str, Any], predictions: dict[str, Any]):
    """Two predictions with a step in between, which finds some of the prefetches on their way."""
    found = []
    for make in (TorchKernels, kernels):
        loader, slots, _ = put_in_state(state, make)
        made = make(loader)
        found.append(list(run_predictions(loader, slots, made, state, predictions)))
    assert found[0] == found[1]


@interpreted
@pytest.mark.parametrize("count", [0, 1, 3])
def test_what_is_copied_and_what_is_not(count: int, monkeypatch: pytest.MonkeyPatch):
    """Entries past the count are left alone, by any number of programs; so are slots that nothing goes to."""
    import epslots.cuda_graph.triton_kernels as module

    for programs in (1, 5, 64):
        loader = make_loader((2, 6, 2))
        made = kernels(loader)
        monkeypatch.setattr(module, "GATHER_PROGRAMS", programs)
        loader.pool.memory.fill_(77)
        missing = Missing(torch.tensor([8, 0, 5, 4]), torch.tensor([7, 2, 4, 3]), torch.tensor([count]))
        made.copy(DeviceSlots(loader, made, 2).layers[1], missing)
        expected = torch.full_like(loader.pool.memory, 77)
        for expert, slot in [(8, 7), (0, 2), (5, 4)][:count]:
            expected[slot] = store().record(STORE_LAYERS[1], expert)
        assert torch.equal(loader.pool.memory, expected)


def compiled_kernel(name: str, constants: dict[str, int], capability: int, warps: int) -> Any:
    from epslots.cuda_graph import triton_decisions, triton_kernels

    kernel = getattr(triton_decisions, name, None) or getattr(triton_kernels, name)
    unaligned = ("pairs", "experts", "slots", "start", "row", "page", "chunks", "nbytes", "most")
    aligned = ("page_words", "stride", "record_words")
    types = (
        dict.fromkeys(kernel.arg_names, "*i64:16")
        | {"usage": "*i32:16"}
        | dict.fromkeys(unaligned, "i32")
        | dict.fromkeys(aligned, "i32:16")
    )
    types = {name: kind for name, kind in types.items() if name not in constants}
    return compiled(kernel, types, constants, capability, num_warps=warps)


@outside
@pytest.mark.parametrize(("capability", "ahead"), [(80, False), (90, False), (90, True)])
def test_copies_are_of_16_bytes(capability: int, ahead: bool):
    """On a link each request costs the same, for any number of bytes."""
    assert LAYOUT.nbytes % 16 == 0
    from epslots.cuda_graph.triton_kernels import GATHER_WARPS, GATHER_WORDS

    code = compiled_kernel("_gather", {"BLOCK": GATHER_WORDS, "AHEAD": ahead}, capability, GATHER_WARPS).asm["ptx"]
    assert set(re.findall(r"st\.global[.\w]*", code)) == {"st.global.v2.b64"}
    assert len(re.findall(r"ld\.global[.\w]*v2\.b64", code)) == GATHER_WORDS // (32 * GATHER_WARPS) // 2


@outside
@pytest.mark.parametrize("name", ["decide", "choose"])
@pytest.mark.parametrize(("experts", "warps"), [(8, 1), (128, 1), (512, 4)])
def test_decisions_stay_in_registers(name: str, experts: int, warps: int, tmp_path: Path):
    """As the assembler reports it."""
    binary = compiled_kernel(name, {"BLOCK_E": experts, "BLOCK_Q": experts // 2}, 90, warps)
    told = assembled(binary, 90, tmp_path)
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in told, told
