"""What overlap and prefetching hide of the fetches: time per token over an emulated link, against waiting for every miss.

The link is as fast as makes on-demand misses cost what the model computes (a quarter of the experts in slots, LRU). Every
variant is given the same tokens, one at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, DynamicCache, PreTrainedModel

import epslots
from epslots.bench.models import random_checkpoint, random_config
from epslots.bench.report import BenchReport, median, ratio_of_rounds
from epslots.cache.copy_engine import CopyEngine, SlotWriter, SynchronousEngine
from epslots.example import example_model
from epslots.models.experts import RUNNER, experts_modules
from epslots.planner.cache_policy import DEFAULT_POLICY
from epslots.runtime import runtime_of
from epslots.telemetry import Stats
from epslots.units import parse_link

SLOTS = "25%"
LATENCY_S = 20e-6
PROMPT = 256
# Fetches take next to no time over this, which only counts them.
FAST = "1000GB/s"
RESIDENT, ON_DEMAND, WAITING, OVERLAP, PREFETCH = (
    "resident",
    "on demand, LRU",
    "on demand, our eviction",
    "hits run meanwhile",
    "and prefetch",
)


class Waiting(SynchronousEngine):
    """A link whose every fetch is waited for."""

    def __init__(self, link: CopyEngine) -> None:
        self._link = link

    def start(
        self, slots: Sequence[torch.Tensor], records: Sequence[torch.Tensor], write: SlotWriter, *, urgent: bool
    ) -> list[Any]:
        for transfer in self._link.start(slots, records, write, urgent=True):
            self._link.wait(transfer)
        return []


@dataclass
class Variant:
    """One way to run the model, and where it is in the text."""

    model: PreTrainedModel
    cache: DynamicCache
    at: int = 0

    def read(self, ids: torch.Tensor, tokens: int) -> float:
        """Feed it so many tokens at once; seconds."""
        began = time.perf_counter()
        self.model(ids[:, :tokens], use_cache=False)
        return time.perf_counter() - began

    def decode(self, ids: torch.Tensor, tokens: int) -> float:
        """Feed it the next tokens, one by one; seconds."""
        began = time.perf_counter()
        for _ in range(tokens):
            if self.at == ids.shape[1]:
                self.cache, self.at = DynamicCache(), 0
            self.model(ids[:, self.at : self.at + 1], past_key_values=self.cache, use_cache=True)
            self.at += 1
        return time.perf_counter() - began


@torch.no_grad()
def bench_overlap(report: BenchReport, cache_dir: Path, *, rounds: int = 12, tokens: int = 32) -> None:
    """The trained example model in float32, and a larger random one; then both with random routing."""
    tokenizer = AutoTokenizer.from_pretrained(example_model())
    text = tokenizer(Path(torch.__file__).with_name("functional.py").read_text(encoding="utf-8"), return_tensors="pt")
    ids = text["input_ids"][:, 200:1000]
    _bench(report, "trained example model", example_model(), ids, cache_dir, rounds, tokens)
    # About as much is dense as of experts that a token uses, and large enough for the host's plan to weigh little.
    config = random_config(layers=6, hidden=1024, experts=32, top_k=4, width=256)
    with random_checkpoint(config, torch.float32, embedding=1.0) as folder:
        generator = torch.Generator().manual_seed(5)
        often = 1 / torch.arange(1.0, config.vocab_size + 1)  # Zipf, as words are
        ids = torch.multinomial(often, 800, replacement=True, generator=generator)[None]
        _bench(report, "larger random model", folder, ids, cache_dir, rounds, tokens)


def _bench(report: BenchReport, name: str, folder: Path, ids: torch.Tensor, cache_dir: Path, rounds: int, tokens: int) -> None:
    settings: dict[str, Any] = {"device": "cpu", "dtype": "float32", "cache_dir": cache_dir, "progress": False}
    resident = Variant(epslots.load(folder, slots="100%", **settings), DynamicCache())
    counted = Variant(epslots.load(folder, slots=SLOTS, policy="lru", link=FAST, prefetch="off", **settings), DynamicCache())
    resident.decode(ids, 2 * tokens)
    compute_s = median([resident.decode(ids, tokens) for _ in range(5)]) / tokens
    counted.decode(ids, tokens)
    before = epslots.stats(counted.model)
    counted.decode(ids, 4 * tokens)
    after = epslots.stats(counted.model)
    fetches = (after.misses - before.misses) / (4 * tokens)
    size = (after.bytes_fetched - before.bytes_fetched) / (4 * tokens)
    link = f"{int(size / max(compute_s - fetches * LATENCY_S, compute_s / 10) / 1e3)}KB/s,{LATENCY_S * 1e6:g}us"

    def load(policy: str, *, waiting: bool, prefetch: str) -> Variant:
        model = epslots.load(folder, slots=SLOTS, link=link, prefetch=prefetch, policy=policy, **settings)
        if waiting:
            for loader in runtime_of(model).movers:
                loader.link = Waiting(loader.link)
        return Variant(model, DynamicCache())

    variants = {
        RESIDENT: resident,
        ON_DEMAND: load("lru", waiting=True, prefetch="off"),
        WAITING: load(DEFAULT_POLICY, waiting=True, prefetch="off"),
        OVERLAP: load(DEFAULT_POLICY, waiting=False, prefetch="off"),
        PREFETCH: load(DEFAULT_POLICY, waiting=False, prefetch="auto"),
    }
    heading = f"{name}, emulated link {link}"
    for variant in variants.values():
        variant.decode(ids, 2 * tokens)
    report.table(f"{heading}: decoding", _rows(variants, Variant.decode, ids, rounds, tokens, link))
    with _random_routing(variants.values()):
        some = {n: variants[n] for n in (RESIDENT, OVERLAP, PREFETCH)}
        rows = _rows(some, Variant.decode, ids, rounds, tokens, link)
    report.table(f"{heading}: decoding with random routing, nothing to predict", rows)
    rows = _rows(variants, Variant.read, ids, max(2, rounds // 4), PROMPT, link)
    report.table(f"{heading}: a prompt of {PROMPT} tokens", rows)


def _rows(
    variants: dict[str, Variant],
    run: Callable[[Variant, torch.Tensor, int], float],
    ids: torch.Tensor,
    rounds: int,
    tokens: int,
    link: str,
) -> list[dict[str, Any]]:
    """Time the variants in turn. Times are of a token."""
    for variant in variants.values():
        run(variant, ids, tokens)
    before = {name: epslots.stats(variant.model) for name, variant in variants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, variant in variants.items():
            seconds[name].append(run(variant, ids, tokens) / tokens)
    speed = parse_link(link)
    rows = []
    reference = next(name for name in (ON_DEMAND, OVERLAP) if name in variants)
    for name, variant in variants.items():
        used = _difference(before[name], epslots.stats(variant.model))
        done = rounds * tokens
        crossing_s = (used["fetches"] * speed.latency_s + used["bytes"] / speed.bytes_per_s) / done
        bound = [max(compute_s, crossing_s) for compute_s in seconds[RESIDENT]]
        rows.append(
            {
                "variant": name,
                "ms a token": median(seconds[name]) * 1e3,
                "link, ms a token": crossing_s * 1e3,
                "over max(compute, link)": ratio_of_rounds(seconds[name], bound)["median"],
                f"over {reference}": ratio_of_rounds(seconds[name], seconds[reference])["median"],
                "demand fetches of uses": used["misses"] / max(1, used["uses"]),
                "late of uses": used["late"] / max(1, used["uses"]),
                "prefetches a token": used["prefetches"] / done,
                "waited, ms a token": used["stall_s"] / done * 1e3,
            }
        )
    return rows


def _difference(before: Stats, after: Stats) -> dict[str, float]:
    def total(stats: Stats, name: str) -> float:
        return sum(getattr(layer, name) for layer in stats.layers)

    names = ("hits", "misses", "late", "prefetches", "stall_s", "host_bytes")
    found = {name: total(after, name) - total(before, name) for name in names}
    found["uses"] = found["hits"] + found["misses"]
    found["bytes"] = found["host_bytes"]
    found["fetches"] = found["misses"] + found["prefetches"]
    return found


@contextmanager
def _random_routing(variants: Sequence[Variant] | Any) -> Iterator[None]:
    """Every router's choice is replaced by a random one, the same for all variants."""
    undo = []
    for variant in variants:
        for number, module in enumerate(experts_modules(variant.model).values()):
            runner = getattr(module, RUNNER)
            undo.append((module, runner))
            generator = torch.Generator().manual_seed(number)

            def route(
                hidden: torch.Tensor,
                index: torch.Tensor,
                weights: torch.Tensor,
                runner: Any = runner,
                generator: torch.Generator = generator,
            ) -> torch.Tensor:
                drawn = torch.rand(index.shape[0], runner.cache.num_experts, generator=generator)
                return runner(hidden, drawn.topk(index.shape[1]).indices, weights)

            setattr(module, RUNNER, route)
    try:
        yield
    finally:
        for module, runner in undo:
            setattr(module, RUNNER, runner)
