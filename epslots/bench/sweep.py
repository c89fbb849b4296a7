"""Hit rate and tokens per second of the example model over slots, from few to all."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

import epslots
from epslots.bench.models import PROMPTS, load_fp32
from epslots.bench.report import BenchReport, axes_of_plot, median
from epslots.example import example_model
from epslots.planner.cache_policy import POLICIES

SHARES = ("12.5%", "25%", "50%", "75%", "100%")


def bench_sweep(report: BenchReport, cache_dir: Path, *, new_tokens: int = 64, rounds: int = 3) -> None:
    """Greedy text after four prompts, for each share of slots and each eviction policy, all in turn.

    Hit rates count the first round, which starts with empty slots; tokens per second are the median over all rounds.

    Raises:
        AssertionError: the text depends on the slots.
    """
    tokenizer = AutoTokenizer.from_pretrained(example_model())
    settings: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": None}
    keys = [(policy, share) for policy in POLICIES for share in SHARES]
    models = {key: load_fp32(example_model(), cache_dir, slots=key[1], policy=key[0]) for key in keys}
    rates: dict[tuple[str, str], list[float]] = {key: [] for key in keys}
    first = {}
    for number in range(rounds):
        for prompt in PROMPTS:
            inputs = tokenizer(prompt, return_tensors="pt")
            texts = set()
            for key, model in models.items():
                began = time.perf_counter()
                tokens = model.generate(**inputs, **settings)
                rates[key].append(new_tokens / (time.perf_counter() - began))
                texts.add(tokenizer.decode(tokens[0]))
            if len(texts) != 1:
                raise AssertionError(f"the text depends on the slots: {texts}")
        if number == 0:
            first = {key: epslots.stats(model) for key, model in models.items()}
    rows: list[dict[str, Any]] = [
        {
            "policy": policy,
            "slots": share,
            "hit rate": stats.hit_rate,
            "tokens/s": median(rates[policy, share]),
            "MiB fetched per token": stats.bytes_fetched / 2**20 / (len(PROMPTS) * new_tokens),
        }
        for (policy, share), stats in first.items()
    ]
    report.table("slots against speed", rows)
    report.plot(partial(plot, rows))


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Hit rate and tokens per second over the share of slots, a line for each policy."""
    with axes_of_plot(path, 1, 2, (9, 3.6)) as ((left, right),):
        for policy in POLICIES:
            mine = [row for row in rows if row["policy"] == policy]
            shares = [float(row["slots"].rstrip("%")) for row in mine]
            left.plot(shares, [100 * row["hit rate"] for row in mine], marker="o", label=policy)
            right.plot(shares, [row["tokens/s"] for row in mine], marker="o", label=policy)
        left.set(xlabel="slots, % of each layer's experts", ylabel="hit rate, %", ylim=(0, 102))
        right.set(xlabel="slots, % of each layer's experts", ylabel="tokens/s", ylim=(0, None))
