"""Experts that don't fit into RAM. Measured: decoding with RAM for half of them, over decoding with all in RAM.

Both sides have slots for a quarter of the experts, and get the same tokens in turn. The disk by itself is measured
beside them: a plain read of as many bytes, in records all over the file, with as many threads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from epslots.bench.models import load_fp32, random_checkpoint, random_config, use_sums
from epslots.bench.overlap import Variant
from epslots.bench.report import MS, BenchReport, median, ratio_columns, ratio_of_rounds
from epslots.cache.disk_store import DiskStore
from epslots.cache.record_reader import measure_read_speed
from epslots.example import example_model
from epslots.runtime import runtime_of

SLOTS = "25%"
IN_RAM, HALF, UNPREDICTED = "all in RAM", "half in RAM", "half in RAM, nothing predicted"


@torch.no_grad()
def bench_disk(report: BenchReport, cache_dir: Path, *, rounds: int = 12, tokens: int = 32) -> None:
    """The trained example model, and a larger random one, both in float32."""
    tokenizer = AutoTokenizer.from_pretrained(example_model())
    text = tokenizer(Path(torch.__file__).with_name("functional.py").read_text(encoding="utf-8"), return_tensors="pt")
    ids = text["input_ids"][:, 200:1000]
    _bench(report, "trained example model", example_model(), ids, cache_dir, (rounds, tokens))
    config = random_config(layers=6, hidden=1024, experts=32, top_k=4, width=512)
    with random_checkpoint(config, torch.float32, embedding=1.0) as folder:
        often = 1 / torch.arange(1.0, config.vocab_size + 1)  # Zipf, as words are
        ids = torch.multinomial(often, 800, replacement=True, generator=torch.Generator().manual_seed(5))[None]
        _bench(report, "larger random model", folder, ids, cache_dir, (rounds, tokens))


def _bench(
    report: BenchReport,
    name: str,
    folder: Path,
    ids: torch.Tensor,
    cache_dir: Path,
    size: tuple[int, int],
) -> None:
    """One table: the variants in turn.

    Args:
        size: rounds, and tokens of each.
    """
    rounds, tokens = size
    in_ram = load_fp32(folder, cache_dir, slots=SLOTS, host_store="memory")
    store_bytes = runtime_of(in_ram).store.nbytes
    half = f"{store_bytes // 2}B"
    variants = {
        IN_RAM: Variant(in_ram),
        HALF: Variant(load_fp32(folder, cache_dir, slots=SLOTS, host_memory=half)),
        UNPREDICTED: Variant(load_fp32(folder, cache_dir, slots=SLOTS, host_memory=half, prefetch="off")),
    }
    for variant in variants.values():
        variant.decode(ids, 8 * tokens)
    seconds: dict[str, list[float]] = {one: [] for one in variants}
    plain_s: dict[str, list[float]] = {one: [] for one in variants}
    before = {one: use_sums(variant.model) for one, variant in variants.items()}
    for _ in range(rounds):
        for one, variant in variants.items():
            start = use_sums(variant.model)
            seconds[one].append(variant.decode(ids, tokens) / tokens)
            read = use_sums(variant.model, since=start)["disk_bytes"]
            plain_s[one].append(_plain_read_s(variant, read) / tokens)
    rows = []
    for one, variant in variants.items():
        used = use_sums(variant.model, since=before[one])
        row = {"variant": one, "ms a token": median(seconds[one]) * MS}
        row |= ratio_columns(seconds[one], seconds[IN_RAM], "over all in RAM")
        row |= _reads(used, rounds * tokens, seconds, plain_s, one)
        rows.append(row | {"hit rate": used["hits"] / max(1, used["uses"])})
    title = f"{name}: {store_bytes / 2**20:.0f} MiB of experts, slots for 25 %, RAM for 50 % of them"
    report.table(title, rows)


def _reads(
    used: dict[str, float], tokens: int, seconds: dict[str, list[float]], plain_s: dict[str, list[float]], one: str
) -> dict[str, Any]:
    """Columns about the disk; empty for a variant that reads nothing."""
    if not used["disk_bytes"]:
        return {"read of fetched": 0.0, "MB read a token": 0.0, "plain read, ms": 0.0, "added over plain read": None}
    added = [mine - base for mine, base in zip(seconds[one], seconds[IN_RAM], strict=True)]
    return {
        "read of fetched": used["disk_bytes"] / used["host_bytes"],
        "MB read a token": used["disk_bytes"] / tokens / 1e6,
        "plain read, ms": median(plain_s[one]) * MS,
        "added over plain read": ratio_of_rounds(added, plain_s[one])["median"],
    }


def _plain_read_s(variant: Variant, nbytes: float) -> float:
    """Seconds of a plain read of so many bytes of the variant's store; 0 where it isn't on disk."""
    store = runtime_of(variant.model).store
    if not isinstance(store, DiskStore) or not nbytes:
        return 0.0
    piece = store.manifest.layers[0].layout.stride
    speed = measure_read_speed(Path(store.where), max(int(nbytes), piece), piece)
    assert speed is not None
    return nbytes / speed
