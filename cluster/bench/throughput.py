"""Throughput of ``Cluster.generate`` against the bare loop: the same ranks and requests without Ray, stepped by hand."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from cluster.bench.common import RANKS, SETTINGS, open_cluster, prompts
from epslots.bench.models import load_fp32
from epslots.bench.processes import run_ranks
from epslots.bench.report import BenchReport, ratio_of_rounds, spread
from epslots.example import example_model
from epslots.generation.engine import Engine
from epslots.generation.requests import Request
from epslots.generation.text import load_tokenizer
from epslots.transport.torch_transport import TorchTransport

_PROMPTS = 64
_NEW_TOKENS = 64
_WARM_UP = 1
_STORE_TIMEOUT = timedelta(hours=2)


def bench_throughput(report: BenchReport, cache_dir: Path, *, rounds: int = 7) -> None:
    """Throughput with 64 prompts on two ranks, in turn on a cluster and in a bare loop.

    Raises:
        AssertionError: the tokens differ.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=_STORE_TIMEOUT)
    bare = threading.Thread(target=run_ranks, args=(_bare, RANKS, store.port, rounds + _WARM_UP, str(cache_dir)), daemon=True)
    bare.start()
    seconds: dict[str, list[float]] = {"Cluster.generate": [], "bare loop": []}
    with open_cluster(cache_dir) as cluster, _ended(store, rounds + _WARM_UP):
        for number in range(rounds + _WARM_UP):
            began = time.perf_counter()
            results = list(cluster.generate(prompts(_PROMPTS), max_new_tokens=_NEW_TOKENS, stop_tokens=()))
            taken = time.perf_counter() - began
            store.set(f"go/{number}", "go")
            ranks = [json.loads(store.get(f"done/{number}/{rank}")) for rank in range(RANKS)]
            expected = {int(id): tuple(tokens) for rank in ranks for id, tokens in rank["tokens"].items()}
            differing = [r.index for r in results if r.tokens != expected[r.index]]
            if differing:
                raise AssertionError(f"the cluster's tokens differ from the bare loop's for prompts {differing}")
            if number >= _WARM_UP:
                seconds["Cluster.generate"].append(taken)
                seconds["bare loop"].append(max(rank["seconds"] for rank in ranks))
    bare.join()
    count = _PROMPTS * _NEW_TOKENS
    report.table(
        f"{_PROMPTS} prompts, {_NEW_TOKENS} tokens each, {RANKS} ranks; tokens per second",
        [{"what": name, **spread([count / s for s in times])} for name, times in seconds.items()],
    )
    lost = ratio_of_rounds(seconds["bare loop"], seconds["Cluster.generate"])
    report.table("throughput of the cluster over the bare loop's, round by round", [lost])


@contextmanager
def _ended(store: TCPStore, rounds: int) -> Iterator[None]:
    """At the end of the block, release bare ranks that still wait for a round."""
    try:
        yield
    finally:
        for number in range(rounds):
            store.compare_set(f"go/{number}", "", "end")


def _bare(transport: TorchTransport, port: int, rounds: int, cache_dir: str) -> None:
    """One rank of the bare loop: in each round that the store announces, its half of the prompts."""
    store = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=_STORE_TIMEOUT)
    model = load_fp32(example_model(), cache_dir, slots=SETTINGS["slots"], costs=SETTINGS["costs"], group=transport)
    tokenizer = load_tokenizer(example_model())
    engine = Engine(model, kv_tokens=SETTINGS["kv_tokens"])
    for number in range(rounds):
        if store.get(f"go/{number}") == b"end":  # waits for it
            break
        began = time.perf_counter()
        for index, text in enumerate(prompts(_PROMPTS)):
            if index % transport.size == transport.rank:
                engine.batcher.add(Request(str(index), tuple(tokenizer(text).input_ids), _NEW_TOKENS))
        tokens: dict[str, list[int]] = {}
        for output in engine.run():
            tokens.setdefault(output.id, []).extend(output.tokens)
        seconds = time.perf_counter() - began
        store.set(f"done/{number}/{transport.rank}", json.dumps({"seconds": seconds, "tokens": tokens}))
    engine.batcher.close()
