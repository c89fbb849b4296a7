"""``epslots trace record``: which experts each token of some prompts chooses, as a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from epslots.cli.generate import read_prompts
from epslots.cli.options import CacheDirOption, DeviceOption, DtypeOption, ModelOption, SlotsOption
from epslots.errors import ConfigError
from epslots.text import load_tokenizer

trace_app = typer.Typer(help="Routing traces: what policies and placements are judged on.", no_args_is_help=True)


@trace_app.callback()
def _trace() -> None:
    """Keep ``record`` a command of its own name while it is the only one."""


@trace_app.command()
def record(
    output: Annotated[Path, typer.Argument(help="The .npz to write.")],
    prompts: Annotated[Optional[list[str]], typer.Argument(help="Prompts; else --file or standard input.")] = None,
    file: Annotated[
        Optional[Path], typer.Option("--file", "-f", help='A text file, or .jsonl with "prompt" in each line.')
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate after each prompt.")] = 128,
    model: ModelOption = None,
    slots: SlotsOption = "auto",
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    cache_dir: CacheDirOption = None,
) -> None:
    """Record the experts that each token of the prompts, and of their continuations, chooses.

    The .npz holds expert_ids (int16, a row a token: layers x k), starts (each sequence's first row) and num_experts.
    """
    if not output.absolute().parent.is_dir() or output.is_dir():
        raise ConfigError(f"{output}: give a file in a folder that exists")
    texts = read_prompts(prompts or [], file)

    import epslots
    from epslots.example import example_model

    loaded = epslots.load(model or example_model(), slots=slots, device=device, dtype=dtype, cache_dir=cache_dir)
    tokenizer = load_tokenizer(loaded.name_or_path)
    with epslots.record_trace(loaded) as recorder:
        for text in texts:
            inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False).to(loaded.device)
            loaded.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    trace = recorder.trace()
    trace.save(output)
    typer.echo(f"{output}: {len(trace.starts)} sequences, {len(trace.expert_ids)} tokens, {len(trace.num_experts)} layers")
