"""``epslots predict fit | show``: estimators of the next layer's experts, fitted to a model on text; and their recall."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Optional

import msgspec
import typer

from epslots.cli.column_table import Columns, column_table
from epslots.cli.option_groups import LoadOptions, takes_groups
from epslots.errors import ConfigError
from epslots.generation.text import load_tokenizer
from epslots.json_lines import decode_text
from epslots.progress import counting
from epslots.streams import table_console

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from epslots.prefetch.fit import FitSettings
    from epslots.prefetch.predictor_file import PredictorMetadata

predict_app = typer.Typer(help="Fit the predictor of a model's next experts, and show it.", no_args_is_help=True)

# Bytes of text that are read for each token of the fit.
_BYTES_PER_TOKEN = 8


@dataclass(frozen=True)
class FitOptions:
    """The training of the estimators."""

    PANEL: ClassVar[str] = "The fit"

    pattern: Annotated[str, typer.Option(help="Which files of a folder, at any depth.")] = "*.txt"
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens of text to use.")] = 800_000
    window: Annotated[int, typer.Option(min=2, help="Tokens that the model sees in one piece.")] = 256
    hidden: Annotated[int, typer.Option(min=0, help="Hidden units of each estimator; 0 = a linear one.")] = 384
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the recorded states.")] = 6
    memory: Annotated[str, typer.Option(help="Memory for recorded hidden states; less takes more passes.")] = "4GiB"
    seed: Annotated[int, typer.Option(min=0, help="Seed of the fit.")] = 0

    def settings(self) -> FitSettings:
        """The options as settings of the fit. ConfigError: the memory is no number of bytes."""
        from epslots.prefetch.fit import FitSettings
        from epslots.units import parse_bytes

        given = asdict(self) | {"memory": parse_bytes(self.memory)}
        del given["pattern"]
        return FitSettings(**given)


@predict_app.command()
@takes_groups
def fit(
    load: LoadOptions,
    options: FitOptions,
    texts: Annotated[
        Optional[list[Path]],
        typer.Argument(help="Text files, or folders of them. Default for the example model: its training text."),
    ] = None,
    output: Annotated[
        Optional[Path],
        typer.Option("--output", "-o", help="File to write. Default: epslots.predictor beside the weights."),
    ] = None,
) -> None:
    """Fit a predictor to a model, by running text through it.

        epslots predict fit --model ./Qwen3-30B-A3B texts/

    Takes minutes on a CPU. `epslots generate` and all else find the file beside the weights.
    """
    if texts is None and load.model is not None:
        raise ConfigError("no text: give files or folders of text of the kind that the model will be used for")
    if output is not None and (output.is_dir() or not output.absolute().parent.is_dir()):
        raise ConfigError(f"{output}: give a file in a folder that exists")
    settings = options.settings()
    given = None if texts is None else read_texts(texts, options.pattern, options.tokens * _BYTES_PER_TOKEN)

    from epslots.example_text import library_texts
    from epslots.models.checkpoint import find_checkpoint
    from epslots.prefetch.fit import fit as fit_model
    from epslots.prefetch.predictor_file import PREDICTOR_FILE_NAME, PredictorMetadata, write_predictor
    from epslots.runtime import runtime_of

    tokenizer = load_tokenizer(find_checkpoint(load.source))  # fails sooner than the model
    model = load.load()
    windows_SW = _windows(tokenizer, library_texts(held_out=False) if given is None else given, settings)
    fits, quality = fit_model(model, windows_SW, settings, counting)
    if not any(fits):
        raise ConfigError(f"{model.name_or_path}: no layer's choice can be told from another's; there must be two MoE layers")
    runtime = runtime_of(model)
    about = PredictorMetadata(
        checkpoint=runtime.checkpoint,
        model=Path(model.name_or_path).name,
        experts=[layer.num_experts for layer in runtime.layers],
        tokens=windows_SW.numel(),
        settings=settings,
        quality=quality,
    )
    path = Path(model.name_or_path) / PREDICTOR_FILE_NAME if output is None else output
    write_predictor(path, fits, about)
    _print(about)
    typer.echo(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


@predict_app.command()
def show(
    file: Annotated[Path, typer.Argument(help="A predictor, from `epslots predict fit`.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Show a predictor's model, and its recall on held-out text.

    epslots predict show ./Qwen3-30B-A3B/epslots.predictor
    """
    from epslots.prefetch.predictor_file import read_predictor

    _, about = read_predictor(file)
    if as_json:
        typer.echo(json.dumps(msgspec.to_builtins(about), indent=1))
    else:
        _print(about)


def _windows(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], settings: FitSettings) -> torch.Tensor:
    """The texts' tokens in windows, int64 [windows, tokens]."""
    from epslots.prefetch.recording import cut_windows

    ids: list[list[int]] = []
    with counting("reading", len(texts)) as advance:
        for text in texts:
            # Without a warning of texts over the model's context: they are cut into windows.
            ids.append(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
            advance(1)
    return cut_windows(ids, settings.window, settings.tokens, tokenizer.eos_token_id, settings.seed)


def read_texts(paths: Sequence[Path], pattern: str, most_bytes: int) -> list[str]:
    """The text of files, and of those in folders whose names match, in order and up to about ``most_bytes``.

    Raises:
        ConfigError: a path doesn't exist, can't be read, or isn't UTF-8 text; or there is no text.
    """
    files = [file for path in paths for file in (sorted(path.rglob(pattern)) if path.is_dir() else [path])]
    found, read = [], 0
    for file in files:
        if file.is_dir():
            continue
        try:
            text = decode_text(file.read_bytes())
        except ConfigError as error:
            raise ConfigError(f"{file} is {error}") from error
        except OSError as error:
            raise ConfigError(f"{file}: {error.strerror}") from error
        found.append(text)
        read += len(text)
        if read >= most_bytes:
            break
    if not read:
        raise ConfigError(f"no text in {', '.join(map(str, paths))} (files of a folder: --pattern {pattern})")
    return found


def _print(about: PredictorMetadata) -> None:
    fitted = [(layer, quality) for layer, quality in enumerate(about.quality) if quality is not None]
    rows = []
    for layer, quality in fitted:
        rates: list[float | None] = [*(quality.naive or (None, None)), *quality.fitted]
        following = (layer + about.settings.distance) % len(about.quality)
        name = str(following) if following > layer else f"{following}, next token"
        rows.append([name, *map(_percent, rates), "token before" if quality.history else ""])
    mean = [sum(quality.fitted[i] for _, quality in fitted) / max(1, len(fitted)) for i in (0, 1)]
    rows.append(["mean", "", "", *map(_percent, mean), ""])
    headings = ("layer", "naive at k", "at 2k", "fitted at k", "at 2k", "sees")
    columns: Columns[list[str]] = [(heading, itemgetter(number)) for number, heading in enumerate(headings)]
    title = f"{about.model}, fitted on {about.tokens:,} tokens: recall {about.settings.distance} layer ahead"
    caption = "naive: the layer's own router, given the hidden states of the layer before"
    table_console(120).print(column_table(title, columns, rows, caption))
    typer.echo(f"fitted to checkpoint content {about.checkpoint}")


def _percent(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:.1%}"
