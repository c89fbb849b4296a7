"""The live page's numbers: windows of counters, quantiles, frames, words; all without a page, a browser or a cluster."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.serve.latencies import RECENT_S, RecentLatencies
from cluster.serve.live_frame import Known, frame_of, layer_of
from cluster.serve.live_window import SPAN_S, LiveSample, LiveWindow
from cluster.serve.placement_words import placement_words
from cluster.serve.request_summary import RequestSummary
from tests.support.busy_cluster import BusyCluster, judgement

COUNTS = {"new_tokens": 0, "hits": 0}


def sample(at_s: float, loads: dict[str, int], layers: tuple[int, ...] = (0,)) -> LiveSample:
    """A sample whose counters are these, by process."""
    counts = {process: {"new_tokens": count, "hits": 2 * count} for process, count in loads.items()}
    return LiveSample(at_s, tuple(loads), counts, {layer: {p: (n, 3 * n) for p, n in loads.items()} for layer in layers})


def window_of(*samples: LiveSample) -> LiveWindow:
    window = LiveWindow()
    for one in samples:
        window.add(one)
    return window


@pytest.fixture(scope="module")
def busy() -> Any:
    with BusyCluster((2, 2, 8)) as cluster:
        yield cluster


def known_of(stats: Any, **changes: Any) -> Known:
    state = changes.pop("state", None)
    return Known("ready", "m", True, state, stats, 0.0, 0, (), (0.1, 0.2), None)


def test_a_window_has_its_seconds():
    """Older samples go, but for two, however far apart; and the same one counts once."""
    window = window_of(*(sample(second, {"a": second}) for second in range(20)), sample(19, {"a": 99}))
    assert window.seconds == SPAN_S
    assert window.changes() == [{"new_tokens": SPAN_S, "hits": 2 * SPAN_S}]
    window.add(sample(100, {"a": 50}))
    assert (window.seconds, window.changes()) == (81, [{"new_tokens": 31, "hits": 62}])


def test_one_sample_has_no_changes():
    assert LiveWindow().changes() is None
    assert window_of(sample(1, {"a": 5})).changes() is None
    assert window_of(sample(1, {"a": 5})).loads(0) is None


def test_a_replaced_rank_begins_anew():
    """Its counters are another process's: what it has counted before its first sample isn't this service's traffic."""
    window = window_of(sample(0, {"a": 10, "b": 20}), sample(1, {"a": 12, "c": 1_000}))
    assert window.changes() == [{"new_tokens": 2, "hits": 4}, {"new_tokens": 0, "hits": 0}]
    window.add(sample(2, {"a": 12, "c": 1_003}))
    assert window.changes() == [{"new_tokens": 2, "hits": 4}, {"new_tokens": 3, "hits": 6}]
    loads = window.loads(0)
    assert loads is not None
    assert loads.pairs == ((2, 6), (3, 9))


def test_a_layers_loads_are_of_its_own_samples():
    """A layer that is looked at later has a shorter past."""
    window = window_of(sample(0, {"a": 0}), sample(1, {"a": 4}, (0, 1)), sample(3, {"a": 9}, (0, 1)))
    first, second = window.loads(0), window.loads(1)
    assert first is not None
    assert second is not None
    assert (first.seconds, first.pairs) == (3, ((9, 27),))
    assert (second.seconds, second.pairs) == (2, ((5, 15),))
    assert window.loads(2) is None


def test_counts_that_fall_are_no_change():
    assert window_of(sample(0, {"a": 5}), sample(1, {"a": 3})).changes() == [{"new_tokens": 0, "hits": 0}]


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=300))
def test_quantiles_are_those_of_the_requests(times: list[float]):
    """At least half, and 99 of 100, don't exceed them; one less would be too few."""
    latencies = RecentLatencies(clock=lambda: 1e6)
    for number, seconds in enumerate(times):
        summary = RequestSummary(id=str(number), method="POST", path="/", client="", began_s=0.0)
        summary.first_token_s, summary.ended_s = seconds, 1e6
        latencies.note(summary)
    found, per_token = latencies.quantiles()
    assert per_token is None
    assert found is not None
    for share, value in zip((0.5, 0.99), found, strict=True):
        assert value in times
        assert sum(seconds <= value for seconds in times) >= share * len(times)
        assert sum(seconds < value for seconds in times) < share * len(times)


def test_old_requests_count_no_more():
    """Nor do requests that had no token."""
    now = [0.0]
    latencies = RecentLatencies(clock=lambda: now[0])
    summary = RequestSummary(id="a", method="POST", path="/", client="", began_s=0.0)
    latencies.note(summary)
    assert latencies.quantiles() == (None, None)
    summary.first_token_s, summary.last_token_s, summary.new_tokens, summary.ended_s = 0.5, 2.5, 5, 0.0
    latencies.note(summary)
    assert latencies.quantiles() == ((0.5, 0.5), (0.5, 0.5))
    now[0] = RECENT_S + 0.1
    assert latencies.quantiles() == (None, None)


def test_a_frame_has_the_speeds_of_its_window(busy: BusyCluster):
    first, second = busy.stats((1,)), busy.stats((1,))
    window = window_of(LiveSample.of(first, 10.0, [1]), LiveSample.of(second, 12.0, [1]))
    frame = frame_of(known_of(second), window, at=7.0)
    assert frame.rates is not None
    assert frame.rates.seconds == 2
    assert frame.rates.new_tokens == (second.engine.new_tokens - first.engine.new_tokens) / 2
    assert frame.rates.prompt_tokens == 2 * 700 / 2
    assert frame.rates.hit_rate == 900 / 960
    assert frame.rates.zero_miss == 29 / 40
    assert (frame.rates.host_bytes, frame.rates.peer_bytes) == (2 * 2 * 40e6 / 2, 2 * 2 * 90e6 / 2)
    assert [rank.rank for rank in frame.ranks] == [0, 1]
    own = [sum(map(sum, busy._tokens[rank])) for rank in range(2)]
    assert all(rank.computed is not None and rank.computed > 0 for rank in frame.ranks)
    assert sum(own) > 0
    layer = layer_of(known_of(second), window, 1)
    assert layer is not None
    assert layer.pairs is not None
    before = [rank.stats.layers[1].tokens_per_expert for rank in first.ranks]
    now = [rank.stats.layers[1].tokens_per_expert for rank in second.ranks]
    assert layer.pairs == tuple(
        tuple(b - a for a, b in zip(old, new, strict=True)) for old, new in zip(before, now, strict=True)
    )
    assert layer.holders == tuple(busy.holders[1])
    assert layer_of(known_of(second), window, 2) is None
    assert layer_of(known_of(None), window, 0) is None


def test_ranks_without_uses_have_no_hit_rate(busy: BusyCluster):
    stats = busy.stats()
    frame = frame_of(known_of(stats), window_of(LiveSample.of(stats, 1.0, []), LiveSample.of(stats, 2.0, [])), at=0.0)
    assert frame.rates is not None
    assert (frame.rates.hit_rate, frame.rates.zero_miss, frame.rates.new_tokens) == (None, None, 0)


def test_a_frame_without_ranks(busy: BusyCluster):
    """Before the first answer, and after the last rank."""
    frame = frame_of(known_of(None), LiveWindow(), at=0.0)
    assert (frame.rates, frame.totals, frame.ranks, frame.layers, frame.epoch) == (None, None, (), 0, -1)
    none = replace(busy.stats(), ranks=())
    frame = frame_of(known_of(none), window_of(LiveSample.of(none, 1.0, [0]), LiveSample.of(none, 2.0, [0])), at=0.0)
    assert frame.ranks == ()
    assert frame.rates is not None
    assert frame.rates.new_tokens == 0


@pytest.mark.parametrize(
    ("version", "left", "words"),
    [
        (0, 0, "The ranks follow the default placement, and have reached it."),
        (7, 0, "The ranks follow placement 7, and have reached it."),
        (7, 1, "The ranks follow placement 7; 1 copy or slot still to move."),
        (7, 12, "The ranks follow placement 7; 12 copies and slots still to move."),
    ],
)
def test_the_placement_in_words(busy: BusyCluster, version: int, left: int, words: str):
    stats = busy.stats()
    ranks = tuple(replace(rank, placement=version, pending_migrations=left) for rank in stats.ranks)
    assert placement_words(replace(stats, ranks=ranks), ()) == (words, "The controller watches the load.")


def test_decisions_in_words(busy: BusyCluster):
    stats, explanation = busy.stats(), busy.explain()
    text = " ".join(placement_words(stats, [explanation]))
    assert "Placement 7 was published because it pays: balance 0.71 to 0.94, for 38 copies" in text
    assert "save 182.0 ms and to cost 41.0 ms" in text
    assert "Last decision: keep the placement. Balance is 0.93" in text
    from msgspec.structs import replace as changed

    made = judgement(asked=True, copies=1, gain_s=2.0, migration_s=5e-6)
    asked = changed(explanation, published=made, latest=None, windows=1)
    text = " ".join(placement_words(stats, [asked]))
    assert "on request" in text
    assert "for 1 copy; expected to save 2.0 s and to cost 5 us" in text
    assert "No decision yet, after 1 window of load." in text
    assert placement_words(replace(stats, controllers=()), ())[-1].startswith("There is no controller")


def test_each_group_has_a_paragraph():
    """With its role, the placement of its own ranks, and its own controller's words; also where one has told nothing."""
    with BusyCluster((4, 1, 8), roles=("prefill", "decode")) as cluster:
        stats = cluster.stats()
        late = tuple(replace(rank, placement=6, pending_migrations=3) if rank.rank == 3 else rank for rank in stats.ranks)
        prefill, decode = placement_words(replace(stats, ranks=late), [None, cluster.explain(1)])
    assert prefill == "Group 0, prefill: The ranks follow placement 7, and have reached it. The controller watches the load."
    assert decode.startswith(
        "Group 1, decode: The ranks follow placement 6; 3 copies and slots still to move. Placement 8 was"
    )
    assert decode.endswith("The controller watches the load.")
    with BusyCluster((2, 1, 8), roles=("mixed", "mixed")) as cluster:
        words = placement_words(replace(cluster.stats(), controllers=()), ())
    assert [text.partition(":")[0] for text in words] == ["Group 0", "Group 1"]
    assert all(text.endswith("the placement stays as it is.") for text in words)
