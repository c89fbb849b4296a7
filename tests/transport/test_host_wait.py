"""Waiting for a device on the host: awake at first, bounded, and nowhere else."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import epslots
from epslots.transport.host_wait import wait_until

# Where a wait may block in the driver: after the last copy, in a thread of its own, before the first step, in benchmarks.
MAY_BLOCK = {
    "cache/pinning.py",
    "cache/staging.py",
    "generation/piece_copies.py",
    "group/cost_probe.py",
    "bench/gpu_costs.py",
    "bench/report.py",
}


class Clock:
    """Goes on by a step with each look; a sleep takes what it is asked for."""

    def __init__(self, step: float) -> None:
        self.now, self.step, self.slept = 0.0, step, 0

    def __call__(self) -> float:
        self.now += self.step
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept += 1


def test_what_comes_soon_is_waited_for_awake():
    """A sleep of 20 us takes four times as long, once in every layer."""
    clock, looks = Clock(1e-6), iter([False] * 900 + [True])
    wait_until(lambda: next(looks), clock=clock, sleep=clock.sleep)
    assert clock.slept == 0


def test_a_long_wait_gives_the_core_away():
    clock, looks = Clock(1e-6), iter([False] * 1200 + [True])
    wait_until(lambda: next(looks), clock=clock, sleep=clock.sleep)
    assert 150 < clock.slept < 250


def test_a_check_ends_the_wait():
    def check(waited_s: float) -> None:
        if waited_s > 0.5:
            raise TimeoutError(f"{waited_s:.1f} s")

    clock = Clock(0.1)
    with pytest.raises(TimeoutError, match=r"0\.[56] s"):
        wait_until(lambda: False, check, clock=clock, sleep=clock.sleep)


def test_no_step_blocks_in_the_driver():
    """A peer that is lost stops the device, and a host that waits there knows no deadline and no abort."""
    package = Path(epslots.__file__).parent
    found = set()
    for path in package.rglob("*.py"):
        name = path.relative_to(package).as_posix()
        if not name.startswith("simulated_gpu/"):
            calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute))
            found |= {name for node in calls if node.attr == "synchronize"}
    assert found == MAY_BLOCK
