"""``TextOptions``: an option for each of ``GenerationSettings``, made of its field and of its line in the docstring there."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, TypeVar

import msgspec
import typer

from epslots.errors import ConfigError, shown
from epslots.generation.settings import GenerationSettings, read_settings
from epslots.given_files import read_given

_PANELS = {
    "max_new_tokens": "The text",
    "temperature": "The sampling",
    "json_schema": "The grammar of the text",
    "logprobs": "Log-probabilities",
}
"""Headings in the help, each from this field on."""
_KINDS: dict[str, Any] = {
    "stop": list[str] | None,
    "stop_tokens": list[int] | None,
    "logit_bias": list[str] | None,
    "json_schema": str | None,
}
"""Types of options that differ from their fields'."""
_SPELLED = {"chat": "--chat/--no-chat"}
_REPEATED = " May be given several times."
_HINTS = {
    "stop": _REPEATED,
    "stop_tokens": _REPEATED,
    "logit_bias": " As TOKEN=NUMBER, such as 198=-100." + _REPEATED,
    "json_schema": " @FILE reads it from a file.",
    "grammar": " @FILE reads it from a file.",
}
_MOST_FILE_BYTES = 1024**2

Options = TypeVar("Options")


def _with_options(group: type[Options]) -> type[Options]:
    """Give a group of options one for each setting."""
    explained, panel = _explained(GenerationSettings), ""
    for field in msgspec.structs.fields(GenerationSettings):
        name, panel = field.name, _PANELS.get(field.name, panel)
        text = explained.get(name, "") + _HINTS.get(name, "")
        option = typer.Option(_SPELLED.get(name, _spelled(name)), help=text, rich_help_panel=panel)
        group.__annotations__[name] = Annotated[_KINDS.get(name, field.type), option]
        setattr(group, name, None if name in _KINDS or name == "chat" else field.default)
    return dataclass(frozen=True)(group)


def _spelled(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _explained(config: type[msgspec.Struct]) -> dict[str, str]:
    """The explanations of a configuration's fields, from the ``Attributes:`` of its docstring; fields by their options."""
    attributes = (inspect.getdoc(config) or "").partition("Attributes:\n")[2]
    fields = config.__struct_fields__
    attributes = re.sub("``(.*?)``", lambda code: _spelled(code[1]) if code[1] in fields else code[1], attributes)
    found = re.findall(r"^    (\w+): (.*(?:\n     .*)*)", attributes, re.MULTILINE)
    return {name: text[:1].upper() + " ".join(text.split())[1:] for name, text in found}


@_with_options
class TextOptions:
    """How prompts are continued."""

    PANEL: ClassVar[str] = "The text"

    def settings(self) -> GenerationSettings:
        """The options as settings.

        Raises:
            ConfigError: an option's value is not one of those allowed, or its file can't be read.
        """
        given = {name: value for name, value in vars(self).items() if (value is not None and value != []) or name == "chat"}
        if "logit_bias" in given:
            given["logit_bias"] = dict(_biases(given["logit_bias"]))
        for name in ("json_schema", "grammar"):
            if str(given.get(name)).startswith("@"):  # which begins neither JSON nor a grammar
                given[name] = _read(name, given[name][1:])
        return read_settings(given)


def _biases(given: Sequence[str]) -> Iterator[tuple[int, float]]:
    """Tokens and the numbers added to their logits, from ``TOKEN=NUMBER``."""
    seen: set[int] = set()
    for text in given:
        name, _, number = text.partition("=")
        try:
            token, bias = int(name), float(number)
        except ValueError as error:
            raise ConfigError(f"--logit-bias {shown(text)}; allowed: TOKEN=NUMBER, such as 198=-100") from error
        if token in seen:
            raise ConfigError(f"--logit-bias {shown(text)}; allowed: each token once")
        seen.add(token)
        yield token, bias


def _read(name: str, path: str) -> str:
    try:
        return read_given(path, _MOST_FILE_BYTES).decode()
    except (OSError, UnicodeDecodeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{_spelled(name)} @{path}: {reason}") from error
