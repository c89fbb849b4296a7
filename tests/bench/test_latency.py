"""``epslots bench latency``: what its closed loop counts, and what its table says of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from epslots.bench.latency import Measured, check_texts, closed_loop, plot, requests_of, row, turn
from epslots.generation.requests import Output, Request


class Clock:
    """Seconds that pass only in steps: one and a half each."""

    def __init__(self) -> None:
        self.at_s = 0.0

    def __call__(self) -> float:
        return self.at_s


class FakeEngine:
    """Two steps of 1.5 s for a prompt, then a token a step for everybody."""

    def __init__(self, clock: Clock) -> None:
        self.batcher = self
        self.clock = clock
        self.running: dict[str, list[int]] = {}
        self.most = 0

    def add(self, request: Request) -> None:
        self.running[request.id] = [2, request.max_new_tokens]
        self.most = max(self.most, len(self.running))

    def cancel(self, id: str) -> None:
        del self.running[id]

    def step(self) -> None:
        self.clock.at_s += 1.5
        self.ready = []
        for id, state in list(self.running.items()):
            state[0] -= 1
            if state[0] <= 0:
                state[1] -= 1
                self.ready.append(Output(id, (int(id),), finished=not state[1], reason=None if state[1] else "length"))
            if not state[1]:
                del self.running[id]

    def outputs(self) -> list[Output]:
        ready, self.ready = self.ready, []
        return ready


def requests(*new_tokens: int) -> Iterator[Request]:
    return (Request(f"{number}", (1, 2), new) for number, new in enumerate(new_tokens))


def test_the_loop_keeps_requests_in_flight_and_times_tokens():
    clock = Clock()
    engine: Any = FakeEngine(clock)
    found = closed_loop(engine, requests(100, 3, 100, 100), 2, 6, clock)
    assert engine.most == 2
    # Both have their first token after step 2. Then request 0 gets one in each of 6 steps, request 1 its last two, and request
    # 2, which begins with step 5, its first in step 6 and two more.
    assert found.gaps_s == [1.5] * (6 + 2 + 2)
    assert found.firsts_s == [3.0], "who was there at the beginning is not counted"
    assert found.tokens == 11
    assert found.seconds == 9.0
    assert found.texts == {"1": (1, 1, 1)}
    assert not engine.running, "the rest is given up"


def test_an_error_is_not_timed():
    class Failing(FakeEngine):
        def outputs(self) -> list[Output]:
            return [Output("0", (), True, "error", "no room")]

    with pytest.raises(AssertionError, match="request 0 failed: no room"):
        closed_loop(Failing(Clock()), requests(9), 1, 1)  # type: ignore[arg-type]


def test_a_row_has_percentiles_in_milliseconds():
    found = Measured([number / 1000 for number in range(1, 101)], [0.5, 0.7], tokens=50, seconds=2.0)
    more = Measured([0.001], [0.9], tokens=10, seconds=1.0)
    found.add(more)
    got = row("25%", 4, found, 0.75)
    assert got["slots"] == "25%" and got["requests in progress"] == 4 and got["hit rate"] == 0.75
    assert (got["P50 ms/token"], got["P95 ms/token"], got["P99 ms/token"]) == pytest.approx((50, 95, 99))
    assert got["P50 ms to the first token"] == pytest.approx(700)
    assert got["tokens/s"] == 20
    assert got["tokens timed"] == 101
    assert row("25%", 1, Measured([1.0], [], 1, 1.0), 1.0)["P50 ms to the first token"] is None


@pytest.mark.parametrize(
    ("speeds", "where"),
    [
        ((10, 20, 40, 80), None),
        ((10, 20, 24, 26), 2),
        ((10, 10, 20, 21), 4),  # a dip is no turn if it goes on afterwards
        ((10, 9, 8, 7), 1),
        ((10,), None),
    ],
)
def test_where_the_curve_turns(speeds: tuple[float, ...], where: int | None):
    rows = [{"requests in progress": 2**number, "tokens/s": speed} for number, speed in enumerate(speeds)]
    assert turn(rows) == where


def test_a_gap_between_batches_counts_as_its_doublings():
    rows = [{"requests in progress": batch, "tokens/s": speed} for batch, speed in ((1, 10.0), (4, 14.0))]
    assert turn(rows) == 1, "1.4 times for two doublings"


def test_texts_that_differ_are_an_error():
    check_texts([{"0": (1, 2), "1": (3,)}, {"0": (1, 2)}])
    with pytest.raises(AssertionError, match="request 0 depends on the slots"):
        check_texts([{"0": (1, 2)}, {"0": (1, 3)}])


def test_requests_are_the_same_for_the_same_seed():
    ids = list(range(500))
    stream = requests_of(ids, 1)
    first = [next(stream) for _ in range(20)]
    again = requests_of(ids, 1)
    assert first == [next(again) for _ in range(20)]
    assert len({len(request.prompt) for request in first}) > 5
    assert next(requests_of(ids, 2)) != first[0]


def test_the_plot_is_drawn(tmp_path: Path):
    found = Measured([0.01, 0.02], [0.1], 2, 0.03)
    rows = [row(share, batch, found, 1.0) for share in ("25%", "100%") for batch in (1, 2)]
    plot([("a model", rows)], tmp_path / "latency.png")
    assert (tmp_path / "latency.png").stat().st_size > 10_000
