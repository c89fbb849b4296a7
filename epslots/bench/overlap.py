"""Fetches hidden by overlap and prefetching: time per token over an emulated link, against waiting for every miss.

The link's speed is set so that on-demand misses take as long as the model's computing (a quarter of the experts in slots,
LRU). Every variant gets the same tokens, one at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, DynamicCache, PreTrainedModel

from epslots.bench.models import load_fp32, random_checkpoint, random_config, use_sums
from epslots.bench.report import MS, BenchReport, median, ratio_of_rounds
from epslots.cache.copy_engine import CopyEngine, SynchronousEngine, WriteSlot
from epslots.example import example_model
from epslots.models.experts import experts_modules
from epslots.models.experts_interface import RUNNER
from epslots.planner.cache_policy import DEFAULT_POLICY
from epslots.runtime import runtime_of
from epslots.units import parse_link

SLOTS = "25%"
LATENCY_S = 20e-6
PROMPT = 256
FAST = "1000GB/s"  # a link over which fetches are counted, and take next to no time
RESIDENT, ON_DEMAND, WAITING, OVERLAP, PREFETCH = (
    "resident",
    "on demand, LRU",
    "on demand, our eviction",
    "hits run meanwhile",
    "and prefetch",
)


class Waiting(SynchronousEngine):
    """A link that waits for every fetch."""

    def __init__(self, link: CopyEngine) -> None:
        self._link = link

    def start(
        self, slots: Sequence[torch.Tensor], records: Sequence[torch.Tensor], write: WriteSlot, *, urgent: bool
    ) -> list[Any]:
        for transfer in self._link.start(slots, records, write, urgent=True):
            self._link.wait(transfer)
        return []


@dataclass
class Variant:
    """One way to run the model, and its place in the text."""

    model: PreTrainedModel
    cache: DynamicCache = field(default_factory=DynamicCache)
    at: int = 0

    def read(self, ids: torch.Tensor, tokens: int) -> float:
        """Compute a prompt of so many tokens; seconds."""
        began = time.perf_counter()
        self.model(ids[:, :tokens], use_cache=False)
        return time.perf_counter() - began

    def decode(self, ids: torch.Tensor, tokens: int) -> float:
        """Compute the next tokens, one by one; seconds."""
        began = time.perf_counter()
        for _ in range(tokens):
            if self.at == ids.shape[1]:
                self.cache, self.at = DynamicCache(), 0
            self.model(ids[:, self.at : self.at + 1], past_key_values=self.cache, use_cache=True)
            self.at += 1
        return time.perf_counter() - began


@dataclass(frozen=True)
class Setup:
    """A model's variants over one link, and the text that all get."""

    variants: dict[str, Variant]
    link: str
    ids: torch.Tensor

    def rows(self, run: Callable[[Variant, torch.Tensor, int], float], rounds: int, tokens: int) -> list[dict[str, Any]]:
        """Time the variants in turn; times are per token."""
        for variant in self.variants.values():
            run(variant, self.ids, tokens)
        before = {name: use_sums(variant.model) for name, variant in self.variants.items()}
        seconds: dict[str, list[float]] = {name: [] for name in self.variants}
        for _ in range(rounds):
            for name, variant in self.variants.items():
                seconds[name].append(run(variant, self.ids, tokens) / tokens)
        used = {name: use_sums(variant.model, since=before[name]) for name, variant in self.variants.items()}
        return [self._row(name, seconds, used[name], rounds * tokens) for name in self.variants]

    def _row(self, name: str, seconds: dict[str, list[float]], used: dict[str, float], tokens: int) -> dict[str, Any]:
        speed = parse_link(self.link)
        fetches = used["misses"] + used["prefetches"] - used["taken_back"]
        crossing_s = (fetches * speed.latency_s + used["host_bytes"] / speed.bytes_per_s) / tokens
        bound = [max(compute_s, crossing_s) for compute_s in seconds[RESIDENT]]
        reference = next(one for one in (ON_DEMAND, OVERLAP) if one in seconds)
        uses = max(1, used["uses"])
        return {
            "variant": name,
            "ms a token": median(seconds[name]) * MS,
            "link, ms a token": crossing_s * MS,
            "over max(compute, link)": ratio_of_rounds(seconds[name], bound)["median"],
            f"over {reference}": ratio_of_rounds(seconds[name], seconds[reference])["median"],
            "demand fetches of uses": used["misses"] / uses,
            "late of uses": used["late"] / uses,
            "prefetches a token": used["prefetches"] / tokens,
            "waited, ms a token": used["stall_s"] / tokens * MS,
        }


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
    resident = Variant(load_fp32(folder, cache_dir))
    link = _balanced_link(resident, folder, cache_dir, ids, tokens)

    def load(policy: str, *, waiting: bool = False, prefetch: str = "off") -> Variant:
        model = load_fp32(folder, cache_dir, slots=SLOTS, link=link, prefetch=prefetch, policy=policy)
        if waiting:
            for loader in runtime_of(model).loaders:
                loader.link = Waiting(loader.link)
        return Variant(model)

    variants = {
        RESIDENT: resident,
        ON_DEMAND: load("lru", waiting=True),
        WAITING: load(DEFAULT_POLICY, waiting=True),
        OVERLAP: load(DEFAULT_POLICY),
        PREFETCH: load(DEFAULT_POLICY, prefetch="auto"),
    }
    heading = f"{name}, emulated link {link}"
    for variant in variants.values():
        variant.decode(ids, 2 * tokens)
    setup = Setup(variants, link, ids)
    report.table(f"{heading}: decoding", setup.rows(Variant.decode, rounds, tokens))
    with _random_routing(variants.values()):
        some = Setup({n: variants[n] for n in (RESIDENT, OVERLAP, PREFETCH)}, link, ids)
        rows = some.rows(Variant.decode, rounds, tokens)
    report.table(f"{heading}: decoding with random routing, nothing to predict", rows)
    report.table(f"{heading}: a prompt of {PROMPT} tokens", setup.rows(Variant.read, max(2, rounds // 4), PROMPT))


def _balanced_link(resident: Variant, folder: Path, cache_dir: Path, ids: torch.Tensor, tokens: int) -> str:
    """The link over which the misses of LRU take as long as the resident model computes."""
    resident.decode(ids, 2 * tokens)
    compute_s = median([resident.decode(ids, tokens) for _ in range(5)]) / tokens
    counted = Variant(load_fp32(folder, cache_dir, slots=SLOTS, policy="lru", link=FAST, prefetch="off"))
    counted.decode(ids, tokens)
    before = use_sums(counted.model)
    counted.decode(ids, 4 * tokens)
    used = {key: value / (4 * tokens) for key, value in use_sums(counted.model, since=before).items()}
    seconds = max(compute_s - used["misses"] * LATENCY_S, compute_s / 10)
    return f"{int(used['bytes_fetched'] / seconds / 1e3)}KB/s,{LATENCY_S * 1e6:g}us"


@contextmanager
def _random_routing(variants: Iterable[Variant]) -> Iterator[None]:
    """Replace every router's choice by a random one, the same for all variants."""
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
