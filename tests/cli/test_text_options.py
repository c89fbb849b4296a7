"""Options of the command line for a prompt's settings: one for each, and each with an effect."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from cluster.job.command import app as job_app
from epslots.cli import app
from epslots.cli.text_options import TextOptions
from epslots.errors import ConfigError
from epslots.generation.settings import GenerationSettings

SETTINGS = GenerationSettings.__struct_fields__


def settings(**given: Any) -> GenerationSettings:
    return TextOptions(**given).settings()


def test_every_setting_is_an_option_that_is_explained():
    assert tuple(field.name for field in fields(TextOptions)) == SETTINGS  # type: ignore[arg-type]
    for command in (get_command(app).commands["generate"], get_command(job_app)):  # type: ignore[attr-defined]
        found = {option: parameter for parameter in command.params for option in parameter.opts}
        for name in SETTINGS:
            option = found[f"--{name.replace('_', '-')}"]
            assert not option.help[0].islower() and len(option.help) > 20, name
            assert "``" not in option.help
            assert "  " not in option.help
            assert option.rich_help_panel
        assert found["--temperature"].help.startswith("0 takes the likeliest token; ")
        assert "--stop, --stop-tokens and --max-new-tokens" in found["--ignore-eos"].help


def test_without_options_the_defaults_are_pythons():
    """But for the chat template, which the command line uses where there is one."""
    assert settings() == GenerationSettings(chat=None)


def test_options_become_settings(tmp_path: Path):
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"}')
    assert settings(
        max_new_tokens=3, n=2, stop=["a", "b"], stop_tokens=[5], ignore_eos=True, chat=False, temperature=0.5, logprobs=0,
        logit_bias=["5=-100", "7=0.5"],
    ) == GenerationSettings(
        max_new_tokens=3, n=2, stop=("a", "b"), stop_tokens=(5,), ignore_eos=True, chat=False, temperature=0.5, logprobs=0,
        logit_bias={5: -100.0, 7: 0.5},
    )  # fmt: skip
    for given in ('{"type": "object"}', f"@{schema}"):
        assert settings(json_schema=given).json_schema == '{"type": "object"}'
    assert settings(json_schema="true").text_grammar == settings(json_schema="true").text_grammar is not None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"logit_bias": ["5"]}, "--logit-bias '5'; allowed: TOKEN=NUMBER"),
        ({"logit_bias": ["5=1", "05=2"]}, "--logit-bias '05=2'; allowed: each token once"),
        ({"logit_bias": ["a=5"]}, "--logit-bias 'a=5'; allowed: TOKEN=NUMBER"),
        ({"logit_bias": ["5=nan"]}, "logit_bias=.*; allowed"),
        ({"max_new_tokens": 0}, "max_new_tokens=0; allowed: at least 1"),
        ({"grammar": "@/dev/zero"}, "--grammar @/dev/zero: /dev/zero is no regular file"),
        ({"json_schema": "@/nowhere"}, "--json-schema @/nowhere: No such file or directory"),
    ],
)
def test_wrong_options_are_refused(given: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        settings(**given)


def test_a_file_that_is_no_text_or_too_large_is_refused(tmp_path: Path):
    file = tmp_path / "grammar"
    for data, message in ((b"\xff", "codec can't decode"), (b"x" * (2**20 + 1), "too large; allowed: 1 MiB")):
        file.write_bytes(data)
        with pytest.raises(ConfigError, match=message):
            settings(grammar=f"@{file}")
