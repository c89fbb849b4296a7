"""``bench groups``: routing at its own scales in small, and a decision's work, which hardly grows with the ranks."""

from __future__ import annotations

import pytest

from cluster.bench.group_routing import _Random, _Scale, _Scheduled, route
from cluster.driver.rank_loads import RankLoads, _RankLoad


def test_turns_find_their_cache_unless_they_are_routed_at_random():
    scale = _Scale(ranks=16, conversations=60, starts=8)
    found, by_chance = route(_Scheduled, scale), route(_Random, scale)
    assert found["reused of prompts' tokens"] > 0.7 > 0.4 > by_chance["reused of prompts' tokens"]
    assert scale.name == "300 requests on 16 ranks"


def test_turns_of_lost_ranks_are_routed_again():
    scale = _Scale(ranks=16, conversations=60, starts=8, replaced_every=3)
    found, still = route(_Scheduled, scale), route(_Scheduled, _Scale(ranks=16, conversations=60, starts=8))
    assert 0.4 < found["reused of prompts' tokens"] < still["reused of prompts' tokens"]
    assert scale.name.endswith("one of which is replaced every 3 ticks")


def test_a_decision_asks_few_ranks_however_many_there_are(monkeypatch: pytest.MonkeyPatch):
    """Ranks that are looked at, and nodes of the heaps that are passed by, for each decision."""
    seen = [0]

    def counted(load: _RankLoad) -> float:
        seen[0] += 1
        return load.due_tokens / load.capacity.speed

    fits = RankLoads.fits

    def fits_counted(loads: RankLoads, *asked: object) -> bool:
        seen[0] += 1
        return fits(loads, *asked)  # type: ignore[arg-type]

    monkeypatch.setattr(_RankLoad, "cost", property(counted))
    monkeypatch.setattr(RankLoads, "fits", fits_counted)
    looks = list[float]()
    for ranks in (8, 64):
        seen[0] = -ranks  # each is entered once
        route(_Scheduled, _Scale(ranks=ranks, conversations=6 * ranks, starts=ranks // 2))
        looks.append(seen[0] / (6 * ranks * 5))
    assert max(looks) < 40
    assert looks[1] < 1.5 * looks[0], looks
