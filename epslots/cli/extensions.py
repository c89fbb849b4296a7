"""Commands of other packages, and other parts that they provide, by entry points:

[project.entry-points."epslots.commands"]
serve = "cluster.serve.command:serve"
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

import typer

from epslots.errors import ConfigError

GROUP = "epslots.commands"


def add_commands(app: typer.Typer) -> None:
    """Add the installed packages' commands, once. One that can't be imported says so when it is called."""
    there = {command.name for command in app.registered_commands}
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        if entry.name in there:
            continue
        try:
            command = entry.load()
        except ImportError as error:
            command = _broken(entry.name, str(error))
        app.command(name=entry.name)(command)


def load_extension(group: str, name: str, options: str, does: str) -> Any:
    """Another package's function for some options, by its entry point.

    Args:
        options: as the user names them: "--ranks, --address".
        does: completes "nothing here ...".

    Raises:
        ConfigError: there is none, or it can't be imported; the message says how to install it.
    """
    advice = f"install epslots again, with Ray (pip install epslots), or leave {options.replace(', ', ' and ')} off"
    found = entry_points(group=group, name=name)
    if not found:
        raise ConfigError(f"{options}: nothing here {does}; {advice}")
    try:
        return next(iter(found)).load()
    except ImportError as error:
        raise ConfigError(f"{options}: the package that {does} can't be imported ({error}); {advice}") from error


def _broken(name: str, reason: str) -> Callable[[], None]:
    def command() -> None:
        raise ConfigError(f"{name} can't be imported ({reason}): install epslots again")

    command.__doc__ = f"Can't be imported: {reason}"
    return command
