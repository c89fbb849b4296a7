"""What slots buy: hit rate and tokens per second of the example model, from few slots to all."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

import epslots
from epslots.bench.report import BenchReport, median
from epslots.example import example_model
from epslots.planner.cache_policy import POLICIES

SHARES = ("12.5%", "25%", "50%", "75%", "100%")
PROMPTS = (
    "def read_json(path):\n",
    "import os\nimport sys\n\nclass Parser:\n    def __init__(self, ",
    '"""Utilities for dates and times."""\n\nfrom datetime import ',
    "    for name, value in self.items():\n        if value is None:\n",
)


def bench_sweep(report: BenchReport, cache_dir: Path, *, new_tokens: int = 64, rounds: int = 3) -> None:
    """Greedy text after four prompts, for each share of slots and each eviction policy, all in turn.

    Hit rates count the first round, which starts with empty slots; tokens per second are the median over all.
    """
    tokenizer = AutoTokenizer.from_pretrained(example_model())
    settings: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": None}
    models = {
        (policy, share): epslots.load(
            example_model(), slots=share, device="cpu", dtype="float32", policy=policy, cache_dir=cache_dir
        )
        for policy in POLICIES
        for share in SHARES
    }
    rates: dict[tuple[str, str], list[float]] = {key: [] for key in models}
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
    path = report.plot_path()
    if path is not None:
        plot(rows, path)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Hit rate and tokens per second over the share of slots, a line for each policy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for policy in POLICIES:
        mine = [row for row in rows if row["policy"] == policy]
        shares = [float(row["slots"].rstrip("%")) for row in mine]
        axes[0].plot(shares, [100 * row["hit rate"] for row in mine], marker="o", label=policy)
        axes[1].plot(shares, [row["tokens/s"] for row in mine], marker="o", label=policy)
    axes[0].set(xlabel="slots, % of each layer's experts", ylabel="hit rate, %", ylim=(0, 102))
    axes[1].set(xlabel="slots, % of each layer's experts", ylabel="tokens/s", ylim=(0, None))
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
