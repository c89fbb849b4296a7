"""The parts that all benches share: candidates in turn, and rows of medians and ratios."""

from __future__ import annotations

import pytest

from epslots.bench import report
from epslots.bench.report import MS, alternate, compare, contenders


class Timeline:
    """A clock that each candidate moves by its own time, and the order of runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 0.0
        self.runs = ""
        monkeypatch.setattr(report.time, "perf_counter", lambda: self.now_s)

    def takes(self, name: str, *seconds: float) -> None:
        self.now_s += seconds[self.runs.count(name) % len(seconds)]
        self.runs += name


def test_candidates_take_turns_after_a_warm_up(monkeypatch: pytest.MonkeyPatch):
    line = Timeline(monkeypatch)
    seconds = alternate({"a": lambda: line.takes("a", 9, 1, 2), "b": lambda: line.takes("b", 9, 4, 4)}, 2, warm_up=1)
    assert line.runs == "ababab"
    assert seconds == {"a": [1, 2], "b": [4, 4]}


def test_a_row_has_medians_and_the_ratio_of_rounds(monkeypatch: pytest.MonkeyPatch):
    line = Timeline(monkeypatch)
    candidates = {"ours": lambda: line.takes("o", 1, 2, 6), "theirs": lambda: line.takes("t", 2, 2, 2)}
    row = compare(candidates, "ours", "theirs", 3, MS, "of theirs", warm_up=0)
    assert row == {"ours": 2000, "theirs": 2000, "of theirs": 1.0, "p25": 0.75, "p75": 2.0}


def test_slow_candidates_leave_the_race(monkeypatch: pytest.MonkeyPatch):
    line = Timeline(monkeypatch)
    candidates = {name: lambda name=name, s=s: line.takes(name, s) for name, s in (("x", 50), ("f", 2), ("s", 4), ("z", 6))}
    assert set(contenders(candidates, "x")) == {"x", "f", "s"}
