"""The command line: ``epslots generate | plan | verify | trace | predict | placement | simulate | bench``.

Each command is a module; torch and transformers are imported when a command runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import sys

import typer

from epslots.cli.bench import bench
from epslots.cli.generate import generate
from epslots.cli.placement import placement_app
from epslots.cli.plan import plan
from epslots.cli.predict import predict_app
from epslots.cli.simulate import simulate_command
from epslots.cli.trace import trace_app
from epslots.cli.verify import verify
from epslots.errors import EpslotsError

app = typer.Typer(
    name="epslots",
    help="Run Mixture-of-Experts models from a bounded pool of expert slots: outputs are the model's own, memory is yours.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(generate)
app.command()(plan)
app.command()(verify)
app.command()(bench)
app.command(name="simulate")(simulate_command)
app.add_typer(trace_app, name="trace")
app.add_typer(predict_app, name="predict")
app.add_typer(placement_app, name="placement")

EXIT_USER_ERROR = 2


def main() -> None:
    """Entry point: one-line errors for what a user can mend, tracebacks for bugs alone. Ctrl-C ends with code 130."""
    try:
        app()
    except EpslotsError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except BrokenPipeError:  # whoever read our output has seen enough
        sys.stderr.close()
        sys.exit(0)
