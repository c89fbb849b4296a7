"""The folder of the small example model: inside a wheel, or in ``examples/`` beside the package in a source checkout."""

from __future__ import annotations

from pathlib import Path

from epslots.errors import CheckpointError

_PACKAGE = Path(__file__).resolve().parent
PLACES = (_PACKAGE / "example_model", _PACKAGE.parent / "examples" / "python_moe" / "model")


def example_model() -> Path:
    """The folder of the example checkpoint (a Qwen3-MoE that writes Python; see ``examples/python_moe/train.py``).

    It has 3.5 million weights, and rambles. Its experts are so small that fetching one costs less than sending a token.

    Raises:
        CheckpointError: this installation came without it.
    """
    for place in PLACES:
        if (place / "config.json").is_file():
            return place
    raise CheckpointError("this installation has no example model: give --model")
