"""The plan of a node's RAM where it holds a part of the experts: what is in RAM, on disk, and read for a token."""

from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from epslots.cache.ram_cells import least_ram
from epslots.cli.plan import plan as plan_command
from epslots.errors import ConfigError
from epslots.models.host_memory import plan_host_memory
from epslots.models.known_shapes import known_model
from epslots.models.memory_plan import MemoryPlan
from epslots.units import SlotsSetting
from tests.support.memory_plans import plan_of

GIB = 1 << 30
RECORD = 3 * 6144 * 32768 * 2
USED = 64 * 2 * RECORD
"""Bytes of the experts of a token."""


@pytest.fixture(scope="module")
def quarter() -> MemoryPlan:
    """Grok-1 with a quarter of its slots."""
    return plan_of(known_model("grok-1")[0], SlotsSetting(share=0.25))


def test_all_experts_are_in_ram_or_on_disk(quarter: MemoryPlan):
    for ram in (10, 100, 570, 600):
        host = plan_host_memory(quarter, ram * GIB, 2)
        assert host.ram_bytes + host.disk_bytes == quarter.shape.expert_bytes == 512 * RECORD == 576 * GIB
        assert 2 * host.cell_bytes <= ram * GIB
        assert host.ram_bytes >= min(576, ram) * GIB - 4 * RECORD


def test_reads_follow_what_neither_slots_nor_ram_hold(quarter: MemoryPlan):
    """A quarter of the experts has slots; half of the others' fetches find RAM."""
    assert plan_host_memory(quarter, 288 * GIB, 1).read_bytes_per_token == USED * 0.75 * 0.5
    assert plan_host_memory(quarter, 576 * GIB, 1).read_bytes_per_token == 0
    two = plan_of(quarter.shape, SlotsSetting(share=0.5), ranks=2)
    assert plan_host_memory(two, 27 * GIB, 2).read_bytes_per_token == 0, "every expert has a slot somewhere"


def test_a_share_holds_the_experts_of_a_token(quarter: MemoryPlan):
    least = least_ram(quarter.shape.layers, 2)
    assert least == 2 * RECORD
    plan_host_memory(quarter, 3 * least, 3)
    with pytest.raises(
        ConfigError, match=f"allowed are {3 * least:,} bytes .* 3 ranks of a node read the 2 experts of a token"
    ):
        plan_host_memory(quarter, 3 * least - 1, 3)


app = typer.Typer()
app.command()(plan_command)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["--model", "grok-1", "--slots", "25%", "--memory", "400GiB", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_command_says_what_the_disk_costs(quarter: MemoryPlan):
    text = " ".join(run("--host-memory", "288GiB").split())
    assert "in RAM │ 288 GiB" in text and "on disk │ 288 GiB" in text and "54 GiB read for a token" in text
    given = json.loads(run("--host-memory", "288GiB", "--json"))
    assert given["ram_bytes"] + given["disk_bytes"] == given["host_store_bytes"]
    assert given["read_bytes_per_token"] == plan_host_memory(quarter, 288 * GIB, 1).read_bytes_per_token
    assert given["read_bytes_per_s"] is None, "no store, no disk that was measured"
    assert json.loads(run("--json"))["host_memory_bytes"] is None
