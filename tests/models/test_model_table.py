"""The table of models with experts (``support/model_table.py``) is whole, and says of the suite's models what tests show."""

from __future__ import annotations

import os
import re

import pytest

from tests.support import model_table, zoo

ROW = re.compile(r"^\| (?P<folder>\w+) \| (?P<name>\w*) \| (?P<way>[^|]+) \| (?P<suite>\w*) ?\| (?P<outcome>[^|]+) \|$", re.M)


def written() -> dict[str, dict[str, str]]:
    return {row["folder"]: row.groupdict() for row in ROW.finditer(model_table.FILE.read_text(encoding="utf-8"))}


def test_every_model_with_experts_has_a_row():
    found = written()
    assert found.keys() == model_table.folders().keys()
    assert all(re.match("runs$|refused: .{20}|not tried: .{20}", row["outcome"]) for row in found.values())


def test_the_suites_models_run():
    outcomes = {row["name"]: row for row in written().values()}
    served = {tiny.architecture for tiny in zoo.ZOO.values() if tiny.served}
    # Two architectures of one folder: the table has the first.
    missing = served - outcomes.keys()
    assert missing <= {"Gemma4ForConditionalGeneration"}
    for name in served - missing:
        assert (outcomes[name]["outcome"], outcomes[name]["suite"]) == ("runs", "yes"), name
    assert {name for name, row in outcomes.items() if row["suite"]} == served - missing


@pytest.mark.parametrize("folder", ["qwen3_vl_moe", "mistral_large4", "diffusion_gemma"])
def test_rows_that_no_other_test_holds(folder: str):
    """Conversions that look at shapes; a layer counted from the end; a cache for another kind of generation."""
    row = written()[folder]
    assert model_table.outcome(model_table.folders()[folder]) == (row["name"], row["outcome"])


@pytest.mark.skipif(not os.environ.get("EPSLOTS_WHOLE_ZOO"), reason="runs every model: a minute")
def test_the_table_is_what_the_command_writes(capsys: pytest.CaptureFixture[str]):
    model_table.main()
    assert capsys.readouterr().out == model_table.FILE.read_text(encoding="utf-8")
