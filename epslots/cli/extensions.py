"""Commands of other packages, by entry points:

[project.entry-points."epslots.commands"]
serve = "cluster.serve.command:serve"
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points

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


def _broken(name: str, reason: str) -> Callable[[], None]:
    def command() -> None:
        raise ConfigError(f"{name} can't be imported ({reason}): install epslots again")

    command.__doc__ = f"Can't be imported: {reason}"
    return command
