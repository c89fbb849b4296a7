"""Tables of counters, as people read them."""

from __future__ import annotations

from io import StringIO
from types import SimpleNamespace
from typing import Any

import msgspec
from rich.console import Console

from epslots.cli.tables import requests_table
from epslots.generation.engine_stats import sum_engines


def test_the_skew_of_steps_is_told():
    """Of ranks that wait for each other; a rank alone waits for none."""
    engines = [msgspec.structs.replace(sum_engines(()), step_tokens=tokens, longest_tokens=90) for tokens in (90, 30)]
    ranks: list[Any] = [SimpleNamespace(rank=number, engine=engine) for number, engine in enumerate(engines)]
    for shown, told in ((ranks, True), (ranks[:1], False)):
        text = StringIO()
        Console(file=text, width=160).print(requests_table(shown))
        assert ("over the mean of those that have some: 1.50" in text.getvalue()) == told


def test_a_rank_without_graphs_is_named():
    """With the reason, which may hold brackets; other ranks aren't."""
    engines = [
        msgspec.structs.replace(sum_engines(()), crowded_steps=1200),
        msgspec.structs.replace(sum_engines(()), capture_obstacle="no room [10 of 12]"),
        msgspec.structs.replace(sum_engines(()), whole_obstacle="the host plans"),
    ]
    ranks: list[Any] = [SimpleNamespace(rank=number, engine=engine) for number, engine in enumerate(engines)]
    text = StringIO()
    Console(file=text, width=160).print(requests_table(ranks))
    assert "rank 1 decodes without CUDA graphs: no room [10 of 12]" in text.getvalue()
    assert "rank 0 made 1,200 decoding steps without CUDA graphs: they could need more experts" in text.getvalue()
    assert "rank 2 decodes by CUDA graphs between MoE layers: the host plans" in text.getvalue()
    assert "rank 1 made" not in text.getvalue() and "longer than the others" not in text.getvalue()
    assert "rank 0 decodes" not in text.getvalue() and "replayed" in text.getvalue()
