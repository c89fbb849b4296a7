"""batch_invariant=True: a token's logits have the same bits in any batch, with any chunks, slots and ranks."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

import epslots
from epslots.errors import ConfigError, GroupError
from epslots.generation import paged_next_token, row_batcher
from epslots.generation.engine import Engine
from epslots.generation.engine_stats import EngineStats
from epslots.generation.next_token import Chosen
from epslots.generation.paged_batcher import PagedBatcher
from epslots.generation.requests import Request
from epslots.generation.row_batcher import RowBatcher
from epslots.generation.sampling import Sampling
from epslots.generation.tracked_request import TrackedRequest
from epslots.moe import row_blocks
from epslots.moe.batch_invariant import batch_invariant_functions, obstacles
from epslots.moe.pair_kernels import TorchPairKernels
from epslots.moe.row_blocks import MAX_ROWS, ROWS, product
from epslots.transport.local_transport import LocalHub, LocalTransport
from tests.support import zoo
from tests.support.batches import prompt_of
from tests.support.grouped_ranks import ALL_COSTS, GATHER, Grouped
from tests.support.rank_helpers import run_threads

DTYPES = [torch.float32, torch.bfloat16]
# Grouped heads, MLA, sinks and transposed weights with biases, windows and unequal layers, a shared expert, identity experts,
# complex angles.
PAGED = ["qwen3_moe", "deepseek_v3", "gpt_oss", "gemma4", "qwen2_moe", "longcat_flash", "deepseek_v2"]
KINDS = [*((name, torch.bfloat16) for name in PAGED), ("deepseek_v3", torch.float32), ("gemma4", torch.float32)]

Logits = dict[tuple[int, int], torch.Tensor]
"""The logits of each token, by the request's seed and the token's position."""


def equal_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


class Texts:
    """The logits and the tokens of some requests, from however many engines. Requests are told apart by their seeds."""

    def __init__(self) -> None:
        self.logits: Logits = {}
        self.tokens: dict[str, list[int]] = {}

    def differing(self, alone: Texts) -> int:
        """Tokens whose logits have other bits than when their request runs alone, or that aren't there."""
        assert alone.logits, "something was watched"
        return sum(key not in self.logits or not equal_bits(self.logits[key], row) for key, row in alone.logits.items())


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Texts]:
    """Makes ``Texts`` that gather the logits of all engines from now on."""
    choose, current = paged_next_token.choose, [Texts()]

    def watched(logits_NV: torch.Tensor, rows: Sequence[TrackedRequest | None]) -> Chosen:
        for logits_V, entry in zip(logits_NV, rows, strict=True):
            if entry is not None:
                current[0].logits[entry.request.sampling.seed, entry.length] = logits_V.clone()
        return choose(logits_NV, rows)

    monkeypatch.setattr(paged_next_token, "choose", watched)
    monkeypatch.setattr(row_batcher, "choose", watched)

    def start() -> Texts:
        current[0] = Texts()
        return current[0]

    return start


def requests_of(count: int, seed: int) -> list[Request]:
    """Requests of different lengths, some of which begin alike, greedy and drawn."""
    numbers = random.Random(seed)
    found = []
    for number in range(count):
        length = numbers.choice([1, 2, 7, 17, 33, 70, 100])
        sampling = Sampling(temperature=number % 2, seed=number)
        found.append(Request(str(number), prompt_of(length, seed=numbers.choice([-length, number])), 5, sampling=sampling))
    return found


def serve(
    model: PreTrainedModel,
    requests: Sequence[Request],
    into: Texts,
    *,
    seed: int = 0,
    kv_tokens: int = 512,
    chunk: int = 512,
    cache: str = "auto",
) -> EngineStats:
    """Run requests in an engine, in any order, each added before any step; returns its counters."""
    numbers = random.Random(seed)
    engine = Engine(model, kv_tokens=kv_tokens, max_batch_tokens=chunk, cache=cache)
    waiting = numbers.sample(list(requests), len(requests))
    while waiting or engine.batcher.has_work:
        while waiting and (not engine.batcher.has_work or numbers.random() < 0.4):
            engine.batcher.add(waiting.pop())
        engine.step()
        for output in engine.batcher.outputs():
            assert output.error is None
            into.tokens.setdefault(output.id, []).extend(output.tokens)
    stats = engine.batcher.stats()
    engine.batcher.close()
    return stats


def load(folder: Path, cache_dir: Path, slots: int | str = "100%", **settings: Any) -> PreTrainedModel:
    settings = {"device": "cpu", "progress": False, "batch_invariant": True} | settings
    return epslots.load(folder, slots=slots, cache_dir=cache_dir, **settings)


def alone(model: PreTrainedModel, requests: Sequence[Request], texts: Callable[[], Texts]) -> Texts:
    expected = texts()
    for request in requests:
        serve(model, [request], expected)
    return expected


@pytest.mark.parametrize(("name", "dtype"), KINDS)
def test_any_batch_chunks_and_slots(
    name: str, dtype: torch.dtype, checkpoint: Callable[[str], Path], cache_dir: Path, texts: Callable[[], Texts]
):
    whole, scarce = (load(checkpoint(name), cache_dir, slots, dtype=dtype) for slots in ("100%", 1))
    requests = requests_of(6, seed=1)
    expected = alone(whole, requests, texts)
    for seed, (model, chunk) in enumerate([(whole, 512), (scarce, 40)]):
        together = texts()
        serve(model, requests, together, seed=seed, chunk=chunk)
        assert together.differing(expected) == 0
        assert together.tokens == expected.tokens


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_it_the_batch_shows(
    dtype: torch.dtype, checkpoint: Callable[[str], Path], cache_dir: Path, texts: Callable[[], Texts]
):
    """Else the tests here would hold nothing."""
    model = load(checkpoint("qwen3_moe"), cache_dir, dtype=dtype, batch_invariant=False)
    requests = requests_of(16, seed=2)
    expected = alone(model, requests, texts)
    together = texts()
    serve(model, requests, together, cache="pages")
    assert together.differing(expected) > 0


@pytest.mark.parametrize(("name", "count", "new"), [("qwen3_moe", 3, 24), ("gpt_oss", 4, 60)])
def test_pages_given_up_and_shared(
    name: str, count: int, new: int, checkpoint: Callable[[str], Path], cache_dir: Path, texts: Callable[[], Texts]
):
    """A small cache: prompts are computed again with the tokens so far, or not at all, where pages of another hold them."""
    model = load(checkpoint(name), cache_dir, dtype="bfloat16")
    prompt = prompt_of(70, seed=5)
    requests = [Request(str(n), prompt[: 70 - n % 3], new, sampling=Sampling(temperature=1, seed=n)) for n in range(count)]
    expected = alone(model, requests, texts)
    together = texts()
    stats = serve(model, requests, together, kv_tokens=160, chunk=100)
    assert together.differing(expected) == 0
    assert (stats.preempted > 0) == (name == "gpt_oss"), "requests that share pages wait for their turn to read them"
    assert (stats.reused_tokens > 0) == (name == "qwen3_moe"), "windows aren't shared"


@pytest.mark.parametrize(
    ("name", "dtype", "slots", "costs"),
    [
        ("qwen3_moe", torch.float32, [3, "25%"], "tokens travel"),
        ("deepseek_v3", torch.bfloat16, ["25%", 1, "100%"], "work spreads"),
        ("gpt_oss", torch.bfloat16, [1, 2, 3], "gather"),
    ],
)
def test_any_ranks(
    name: str,
    dtype: torch.dtype,
    slots: list[int | str],
    costs: str,
    checkpoint: Callable[[str], Path],
    cache_dir: Path,
    texts: Callable[[], Texts],
):
    """Also where the other ranks have fewer requests, and compute without any."""
    requests = requests_of(6, seed=2)
    expected = alone(load(checkpoint(name), cache_dir, dtype=dtype), requests, texts)
    grouped = Grouped(checkpoint(name), cache_dir, slots, ALL_COSTS[costs], dtype=dtype, batch_invariant=True)
    together = texts()
    shares = [requests[:1], requests[1:], []]
    grouped.run(lambda rank, model: serve(model, shares[rank], together, seed=rank, chunk=50))
    assert together.differing(expected) == 0
    assert together.tokens == expected.tokens
    grouped.check()


def test_recurrent_models_on_any_ranks(checkpoint: Callable[[str], Path], cache_dir: Path, texts: Callable[[], Texts]):
    """Their requests run one at a time; what other ranks send doesn't show."""
    requests = requests_of(4, seed=3)
    expected = alone(load(checkpoint("qwen3_next"), cache_dir), requests, texts)
    grouped = Grouped(checkpoint("qwen3_next"), cache_dir, [1, "50%"], GATHER, dtype="auto", batch_invariant=True)
    together = texts()
    grouped.run(lambda rank, model: serve(model, requests[rank::2], together, seed=rank))
    assert together.differing(expected) == 0


def test_models_that_call_the_unknown_run_alone(
    checkpoint: Callable[[str], Path], cache_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    assert isinstance(Engine(load(checkpoint("qwen3_moe"), cache_dir), kv_tokens=64).batcher, PagedBatcher)
    norm = next(m for m in zoo.reference(checkpoint("qwen3_moe")).modules() if type(m).__name__.endswith("RMSNorm"))
    forward = type(norm).forward
    monkeypatch.setattr(type(norm), "forward", lambda self, x: forward(self, F.elu(x)))
    model = load(checkpoint("qwen3_moe"), cache_dir)
    assert isinstance(Engine(model, kv_tokens=64).batcher, RowBatcher)
    with pytest.raises(epslots.UnsupportedModelError, match=r"it calls torch.nn.functional.elu"):
        PagedBatcher(model, kv_tokens=64)


def test_generate_beside_an_open_engine_is_refused(checkpoint: Callable[[str], Path], cache_dir: Path):
    model = load(checkpoint("qwen3_moe"), cache_dir)
    ids = zoo.random_ids(1, 9)
    before = model(ids).logits
    engine = Engine(model, kv_tokens=64)
    with pytest.raises(ConfigError, match="close the engine's batcher"):
        model(ids)
    engine.batcher.close()
    assert equal_bits(model(ids).logits, before)


def test_settings_that_differ_or_exclude_it(checkpoint: Callable[[str], Path], cache_dir: Path):
    with pytest.raises(ConfigError, match="batch_invariant with execute_predicted"):
        load(checkpoint("qwen3_moe"), cache_dir, execute_predicted=True)

    def start(transport: LocalTransport) -> None:
        load(checkpoint("qwen3_moe"), cache_dir, 3, group=transport, batch_invariant=transport.rank == 0)

    with pytest.raises(GroupError, match="batch_invariant"):
        run_threads(start, 2, hub=LocalHub(2, deadline_s=60))


# The parts of it.


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize(("inner", "outer"), [(64, 48), (100, 36), (2048, 96), (33, 1)])
def test_products_by_row(inner: int, outer: int, dtype: torch.dtype):
    rows, weight, bias = (torch.randn(*s).to(dtype) for s in ((700, inner), (outer, inner), (outer,)))
    for given in (weight.t(), weight.t().contiguous()):
        for added in (None, bias):
            whole = product(rows, given, added)
            exact = rows.double() @ given.double() + (0 if added is None else added.double())
            torch.testing.assert_close(whole.double(), exact, rtol=0.02, atol=0.02 * float(exact.abs().max()))
            for count in (1, 2, 3, 5, 8, 13, 64, 255, 513):
                start = 7 * count % 150
                assert equal_bits(product(rows[start : start + count], given, added), whole[start : start + count])
    assert product(rows[:0], weight.t()).shape == (0, outer)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_blocks_with_other_bits_are_not_used(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """A library that adds up in another order from some number of rows on; in bf16, rounding hides that from most numbers."""
    asked: list[int] = []

    def fickle(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        asked.append(len(rows))
        return torch.mm(rows.flip(1), weight.flip(0)) if len(rows) > 4 * ROWS else torch.mm(rows, weight)

    monkeypatch.setattr(row_blocks, "_checked", {})
    rows, weight = torch.randn(MAX_ROWS, 64).to(dtype), torch.randn(64, 32).to(dtype)
    row_blocks._in_blocks(rows, weight, fickle)  # checks
    asked.clear()
    whole = row_blocks._in_blocks(rows, weight, fickle)
    assert set(asked) == {4 * ROWS}
    assert equal_bits(whole, torch.cat([torch.mm(block, weight) for block in rows.split(ROWS)]))


def complex_square(x: torch.Tensor) -> torch.Tensor:
    numbers = torch.view_as_complex(x.reshape(-1, 2))
    return torch.view_as_real(numbers * numbers * 1.5)


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "silu in place": lambda x: F.silu(x.clone(), inplace=True),
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "softplus": F.softplus,
    "rsqrt": lambda x: (x.abs() + 0.1).rsqrt(),
    "pow": lambda x: (x.abs() + 0.1).pow(-0.5),
    "complex product": lambda x: complex_square(x.float()),
    **{name: getattr(torch, name) for name in ("exp", "tanh", "erf", "sin", "cos")},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_activations_by_element(function: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype):
    """For any size and strides of the tensor, as torch's to rounding."""
    numbers = (torch.randn(1980) * 4).to(dtype)
    with batch_invariant_functions():
        whole = function(numbers)
        assert not obstacles(lambda: function(numbers))
        for size in (2, 6, 14, 18, 50, 198, 990):
            parts = torch.cat([function(part.clone()).flatten() for part in numbers.split(size)])
            assert equal_bits(parts, whole.flatten())
        strided = torch.zeros(99, 34, dtype=dtype)[:, :20].copy_(numbers.view(99, 20))
        assert equal_bits(function(strided).flatten(), whole.flatten())
    torch.testing.assert_close(whole, function(numbers))


def test_calls_of_another_form_are_torchs_own():
    """They raise nothing, and are named as unknown."""
    x, weight, result = torch.rand(3, 4), torch.rand(5, 4), torch.empty(3, 4)
    across = weight.t()
    calls: list[Callable[[], torch.Tensor]] = [
        lambda: torch.pow(x, x),
        lambda: torch.mul(x, x, out=result),
        lambda: torch.sigmoid(x, out=result),
        lambda: torch.mm(x, mat2=across),
        lambda: F.linear(input=x, weight=weight),
    ]
    for call in calls:
        with batch_invariant_functions():
            found = call().clone()
        torch.testing.assert_close(found, call())
        assert len(obstacles(call)) == 1


REDUCTIONS: dict[str, Callable[[torch.Tensor], Any]] = {
    "softmax": lambda x: F.softmax(x, dim=-1, dtype=torch.float32),
    "mean of squares": lambda x: x.float().pow(2).mean(-1, keepdim=True),
    "sum": lambda x: x.sum(-1, keepdim=True),
    "cumsum": lambda x: x.cumsum(-1),
    "norm": lambda x: torch.norm(x, dim=-1, keepdim=True),
    "layer norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "rms norm": lambda x: F.rms_norm(x, x.shape[-1:]),
    "topk": lambda x: x.topk(4, dim=-1).values,
    "topk's ids": lambda x: x.topk(4, dim=-1).indices,
    "combine": lambda x: TorchPairKernels(1, x.device).weighted_sum(x.repeat_interleave(4, 0), x[:, :4], x.dtype),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", REDUCTIONS.values(), ids=REDUCTIONS)
def test_reductions_by_row(function: Callable[[torch.Tensor], Any], dtype: torch.dtype):
    """torch's own, which models are left with."""
    for width in (8, 36, 100, 768, 5000):
        rows = torch.randn(64, width).to(dtype).round(decimals=1)  # with ties
        whole = function(rows)
        for count in (1, 2, 3, 7, 16, 33):
            assert equal_bits(function(rows[count : 2 * count]), whole[count : 2 * count])
