"""Commands whose options stand in groups have the same command line as without."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Optional

import typer
from typer.testing import CliRunner

from epslots.cli.option_groups import takes_groups


@dataclass(frozen=True)
class Shape:
    PANEL: ClassVar[str] = "The shape"

    ranks: Annotated[int, typer.Option("--ranks", "-r", min=1, help="Ranks.")]
    flat: Annotated[bool, typer.Option("--flat")] = False
    file: Annotated[Optional[Path], typer.Option()] = None


app = typer.Typer()


@app.command()
@takes_groups
def show(name: Annotated[str, typer.Argument()], shape: Shape, more: Annotated[int, typer.Option()] = 3) -> None:
    """Show a shape."""
    typer.echo(f"{name} {shape} {more}")


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "120"})
    return result.exit_code, result.output


def test_a_group_is_made_from_its_options():
    assert invoke("x", "-r", "2", "--file", "f") == (0, f"x {Shape(2, False, Path('f'))} 3\n")
    assert invoke("x", "--flat", "--more", "4", "--ranks", "1") == (0, f"x {Shape(1, True)} 4\n")


def test_options_keep_their_bounds_and_are_required():
    assert invoke("x", "-r", "0")[0] == 2
    code, text = invoke("x")
    assert code == 2 and "--ranks" in text


def test_the_help_has_groups_under_their_headings():
    code, text = invoke("--help")
    assert code == 0 and "Show a shape." in text
    assert text.index("--more") < text.index("The shape") < text.index("--ranks")
