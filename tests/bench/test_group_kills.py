"""``epslots bench groups --parts kills``: which moment a kill amid a hand-over is, on a machine of any speed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cluster.api import Cluster
from cluster.bench import group_kills
from cluster.bench.group_kills import Victim, stop_amid_hand_over


def test_a_rank_is_stopped_amid_a_hand_over(monkeypatch: pytest.MonkeyPatch):
    """One that has ended before its rank was stopped is none: the rank goes on, and the next one is waited for."""
    done: list[object] = []
    looks = iter([(0, 0), (0, 1), (0, 0), (0, 0), (0, 2), (0, 1)])
    found: Iterator[Any] = (
        SimpleNamespace(groups=[SimpleNamespace(handing_over=count) for count in counts]) for counts in looks
    )
    cluster = cast(Cluster, SimpleNamespace(state=lambda: next(found)))
    monkeypatch.setattr(os, "kill", lambda pid, number: done.append((pid, number)))
    monkeypatch.setattr(group_kills.time, "sleep", lambda _: None)
    choose = stop_amid_hand_over((1,))
    assert choose(cluster, [[7], [8]], lambda: done.append("asked")) == Victim(1, 8)
    stopped, goes_on = (8, signal.SIGSTOP), (8, signal.SIGCONT)
    assert done == ["asked", "asked", stopped, goes_on, "asked", "asked", stopped]


def test_hand_overs_that_never_come_are_not_waited_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(group_kills, "_PATIENCE_S", 0.0)
    with pytest.raises(TimeoutError, match="no hand-over was met within 0 s"):
        stop_amid_hand_over((0,))(cast(Cluster, None), [[7]], lambda: None)
