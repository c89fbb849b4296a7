"""Steps on a machine whose cores are busy: how threads wait, and how many there are."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epslots import cpu_threads
from epslots.cpu_threads import SPIN_COUNT, WINDOW_S, CpuTimes, ThreadGovernor, limit_spinning, threads_for


class Machine:
    """Cores with a load of others, a clock, and torch's number of threads."""

    def __init__(self, threads: int, quota: int = 64) -> None:
        self.threads, self.now, self.times = threads, 100.0, CpuTimes(1000.0, 50.0)
        self.governor = ThreadGovernor(quota, lambda: self.threads, self.set, lambda: self.times, lambda: self.now)

    def set(self, threads: int) -> None:
        self.threads = threads

    def run(self, seconds: float, *, others: float, own: float = 1.0) -> int:
        """Steps for so long, with so many cores' worth of work by others and by this process; returns the threads of the next.

        Each takes an eighth of a second.
        """
        for _ in range(round(8 * seconds)):
            with self.governor.step():
                self.pass_time(0.125, others, own)
        with self.governor.step():
            return self.threads

    def pass_time(self, seconds: float, others: float, own: float = 0.0) -> None:
        self.now += seconds
        self.times = CpuTimes(self.times.all + seconds * (others + own), self.times.own + seconds * own)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(cpu_threads, "allowed_cores", lambda: [0, 1, 2, 3])
    return Machine(threads=4)


def test_busy_cores_take_threads_away(machine):
    assert machine.run(1.0, others=0.05) == 4
    assert machine.run(1.0, others=2.0) == 2
    assert machine.run(1.0, others=4.0) == 1  # more work than cores
    assert machine.run(1.0, others=0.0) == 4


def test_load_is_averaged_over_a_window(machine):
    assert machine.run(WINDOW_S, others=3.0) == 4  # too short to tell: the first step is the one before
    assert machine.run(WINDOW_S / 2, others=3.0) == 1


def test_load_between_steps_does_not_count(machine):
    """A peer or a client that works while this process waits would take the threads of the steps that follow."""
    for _ in range(20):
        machine.pass_time(1.0, others=4.0)
        assert machine.run(0.3, others=0.0) == 4


def test_short_runs_of_steps_count_together(machine):
    for _ in range(2):
        machine.pass_time(1.0, others=0.0)
        machine.run(0.5, others=4.0)
    assert machine.threads == 1


def test_own_work_is_not_others_load(machine):
    assert machine.run(1.0, others=0.0, own=4.0) == 4


def test_threads_set_by_others_stay(machine):
    machine.set(3)
    assert machine.run(1.0, others=4.0) == 3
    assert machine.run(1.0, others=0.0) == 3


def test_given_threads_are_never_exceeded(machine):
    few = Machine(threads=2)
    assert few.run(1.0, others=0.0) == 2
    alone = Machine(threads=1)
    assert alone.run(1.0, others=0.0) == 1


def test_a_quota_bounds_the_threads_at_once(machine):
    limited = Machine(threads=4, quota=3)
    assert limited.threads == 3
    assert limited.run(1.0, others=0.0) == 3


def test_unknown_load_changes_nothing(machine):
    machine.run(0.3, others=4.0)
    machine.times = None
    for _ in range(10):
        with machine.governor.step():
            machine.now += 0.1
    assert machine.threads == 4


@given(cores=st.integers(1, 256), others=st.floats(0, 1000), most=st.integers(1, 256))
def test_threads_fit_the_free_cores(cores, others, most):
    threads = threads_for(cores, others, most)
    assert 1 <= threads <= most
    assert threads == 1 or threads <= cores - others + 0.15
    assert threads == most or threads + 1 > cores - others


def test_real_times_only_grow():
    first, second = cpu_threads.read_cpu_times(), cpu_threads.read_cpu_times()
    assert second.all >= first.all > 0 and second.own >= first.own > 0


def test_settings_of_the_user_stay():
    for setting in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        environment = {setting: "mine"}
        limit_spinning(environment)
        assert environment == {setting: "mine"}


@pytest.mark.parametrize("package", ["epslots", "cluster"])
def test_spinning_is_limited_before_torch_loads(package):
    code = f"import os, sys, {package}; print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    environment = {"PATH": ""}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.split() == [SPIN_COUNT, "False"]
