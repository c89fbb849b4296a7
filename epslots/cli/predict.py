"""``epslots predict fit | show``: an estimator of the next layer's experts, fitted to a model on text; and how good it is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import msgspec
import typer

from epslots.cli.options import CacheDirOption, DeviceOption, DtypeOption, ModelOption, SeedOption, SlotsOption
from epslots.engine.text import load_tokenizer
from epslots.errors import ConfigError
from epslots.json_lines import decode_text
from epslots.progress import counting
from epslots.streams import table_console

if TYPE_CHECKING:
    from epslots.prefetch.predictor_file import PredictorMetadata

predict_app = typer.Typer(help="Estimators of the experts that the next layer will use.", no_args_is_help=True)

# Text is read up to this many bytes for each token that is asked for.
_BYTES_PER_TOKEN = 8


@predict_app.command()
def fit(
    texts: Annotated[
        Optional[list[Path]],
        typer.Argument(help="Text files, or folders of them. Default for the example model: what it was trained on."),
    ] = None,
    model: ModelOption = None,
    output: Annotated[
        Optional[Path],
        typer.Option("--output", "-o", help="File to write. Default: epslots.predictor beside the weights."),
    ] = None,
    pattern: Annotated[str, typer.Option(help="Which files of a folder, at any depth.")] = "*.txt",
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens of text to use.")] = 800_000,
    window: Annotated[int, typer.Option(min=2, help="Tokens that the model sees in one piece.")] = 256,
    hidden: Annotated[int, typer.Option(min=0, help="Hidden units of each estimator; 0 = a linear one.")] = 384,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over what was recorded.")] = 6,
    memory: Annotated[str, typer.Option(help="Memory for recorded hidden states; less takes more passes.")] = "4GiB",
    seed: SeedOption = 0,
    slots: SlotsOption = "auto",
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    cache_dir: CacheDirOption = None,
) -> None:
    """Fit a predictor to a model: run text through it, and learn from each layer what the next one will choose.

    Takes minutes on a CPU. `epslots generate` and all else load the file that is written beside the weights.
    """
    if texts is None and model is not None:
        raise ConfigError("no text: give files or folders of text of the kind that the model will be used for")
    if output is not None and (output.is_dir() or not output.absolute().parent.is_dir()):
        raise ConfigError(f"{output}: give a file in a folder that exists")
    from epslots.units import parse_bytes

    memory_bytes = parse_bytes(memory)
    found = None if texts is None else read_texts(texts, pattern, tokens * _BYTES_PER_TOKEN)

    import epslots
    from epslots.example import example_model
    from epslots.example_text import library_texts
    from epslots.models.checkpoint import find_checkpoint
    from epslots.prefetch.fit import FitSettings
    from epslots.prefetch.fit import fit as fit_model
    from epslots.prefetch.predictor_file import PREDICTOR_FILE_NAME, PredictorMetadata, write_predictor
    from epslots.prefetch.recording import cut_windows
    from epslots.runtime import runtime_of

    settings = FitSettings(tokens=tokens, window=window, hidden=hidden, epochs=epochs, memory=memory_bytes, seed=seed)
    source = example_model() if model is None else model
    tokenizer = load_tokenizer(find_checkpoint(source))  # the cheaper of the two to fail
    loaded = epslots.load(source, slots=slots, device=device, dtype=dtype, cache_dir=cache_dir)
    found = library_texts(held_out=False) if found is None else found
    ids: list[list[int]] = []
    with counting("reading", len(found)) as advance:
        for text in found:
            # Texts longer than the model's context are no news: they are cut into windows.
            ids.append(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
            advance(1)
    windows_SW = cut_windows(ids, window, tokens, tokenizer.eos_token_id, seed)
    fits, quality = fit_model(loaded, windows_SW, settings, counting)
    if not any(fits):
        raise ConfigError(f"{loaded.name_or_path}: no layer's choice can be told from another's; there must be two MoE layers")
    runtime = runtime_of(loaded)
    about = PredictorMetadata(
        checkpoint=runtime.checkpoint,
        model=Path(loaded.name_or_path).name,
        experts=[layer.num_experts for layer in runtime.layers],
        tokens=windows_SW.numel(),
        settings=settings,
        quality=quality,
    )
    path = Path(loaded.name_or_path) / PREDICTOR_FILE_NAME if output is None else output
    write_predictor(path, fits, about)
    _print(about)
    typer.echo(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


@predict_app.command()
def show(
    file: Annotated[Path, typer.Argument(help="A predictor, as `predict fit` writes it.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """What a predictor was fitted to, and its recall on text that took no part, beside the next layer's router as it is."""
    from epslots.prefetch.predictor_file import read_predictor

    _, about = read_predictor(file)
    if as_json:
        typer.echo(json.dumps(msgspec.to_builtins(about), indent=1))
    else:
        _print(about)


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
    from rich.table import Table

    console = table_console(120)
    head = f"{about.model}, fitted on {about.tokens:,} tokens: recall {about.settings.distance} layer ahead"
    table = Table(title=head, title_justify="left", caption_justify="left")
    table.add_column("layer")
    for heading in ("naive at k", "at 2k", "fitted at k", "at 2k", "sees"):
        table.add_column(heading, justify="right")
    told = [(layer, quality) for layer, quality in enumerate(about.quality) if quality is not None]
    for layer, quality in told:
        rates: list[Any] = [*(quality.naive or (None, None)), *quality.fitted]
        cells = ["-" if rate is None else f"{rate:.1%}" for rate in rates]
        following = (layer + about.settings.distance) % len(about.quality)
        name = str(following) if following > layer else f"{following}, next token"
        table.add_row(name, *cells, "token before" if quality.history else "")
    mean = [sum(quality.fitted[i] for _, quality in told) / max(1, len(told)) for i in (0, 1)]
    table.add_row("mean", "", "", *(f"{rate:.1%}" for rate in mean), "")
    table.caption = "naive: the layer's own router, given the hidden states of the layer before"
    console.print(table)
    typer.echo(f"fitted to checkpoint content {about.checkpoint}")
