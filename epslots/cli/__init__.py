"""The command line: epslots generate, serve, plan, verify, trace, predict, placement, simulate, bench.

Each command is a module; torch and transformers are imported when a command runs, so that ``--help`` answers at once. serve
is another package's command, found by its entry point (``extensions.py``).
"""

from __future__ import annotations

import contextlib
import gc
import sys
from typing import Annotated, NoReturn

import typer

import epslots
from epslots.cli.bench import HELP as BENCH_HELP
from epslots.cli.bench import bench
from epslots.cli.extensions import add_commands
from epslots.cli.generate import generate
from epslots.cli.placement import placement_app
from epslots.cli.plan import plan
from epslots.cli.predict import predict_app
from epslots.cli.simulate import simulate_command
from epslots.cli.trace import trace_app
from epslots.cli.verify import verify
from epslots.errors import EpslotsError
from epslots.streams import say, usable_streams

app = typer.Typer(
    name="epslots",
    help="Run Mixture-of-Experts models from a bounded pool of expert slots: outputs are the model's own, memory is yours.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def print_version(wanted: bool) -> None:
    """Print the version and exit; the callback of ``--version``, here and in other commands."""
    if wanted:
        typer.echo(f"epslots {epslots.__version__}")
        raise typer.Exit


VersionOption = Annotated[
    bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit.")
]


@app.callback()
def options(version: VersionOption = False) -> None: ...


app.command()(generate)
app.command()(plan)
app.command()(verify)
app.command(help=BENCH_HELP)(bench)
app.command(name="simulate")(simulate_command)
app.add_typer(trace_app, name="trace")
app.add_typer(predict_app, name="predict")
app.add_typer(placement_app, name="placement")

# New objects between garbage collections. torch and transformers bring half a million that stay: by Python's 700, a quarter of
# their import's time is spent looking through them.
_COLLECT_EVERY = 50_000

EXIT_USER_ERROR = 2
EXIT_NO_READER = 1


def main() -> NoReturn:
    """Entry point."""
    add_commands(app)
    run(app)


def run(command: typer.Typer) -> NoReturn:
    """Run a command as the work of a process. Errors that a user can mend are one line; tracebacks are only for bugs.

    Ctrl-C ends with code 130. A closed pipe at standard output ends with code 1, without a message.
    """
    gc.set_threshold(_COLLECT_EVERY)
    code: str | int | None = 0
    with usable_streams() as output:
        try:
            command()
        except SystemExit as end:
            code = end.code
        except EpslotsError as error:
            say(f"error: {error}")
            code = EXIT_USER_ERROR
        except OSError:
            if output.failure is None:  # it isn't about printing
                raise
        with contextlib.suppress(OSError):
            output.flush()
        if isinstance(output.failure, BrokenPipeError):
            code = EXIT_NO_READER
        elif output.failure is not None:
            say(f"error: standard output can't be written: {output.failure.strerror}")
            code = EXIT_USER_ERROR
    sys.exit(code)
