"""``epslots verify``: compare every expert of a model's host store with its digest."""

from __future__ import annotations

from typing import Annotated

import typer

from epslots.cli.options import CacheDirOption, DtypeOption, ModelOption, SlotFormatOption
from epslots.errors import StoreError


def verify(
    model: ModelOption = None,
    dtype: DtypeOption = "auto",
    slot_format: SlotFormatOption = "auto",
    cache_dir: CacheDirOption = None,
    checkpoint: Annotated[
        bool, typer.Option("--checkpoint", help="Also convert every expert again and compare it with the store.")
    ] = False,
) -> None:
    """Check every expert in the host store against its digest.

        epslots verify --model ./Qwen3-30B-A3B --checkpoint

    That finds experts that changed since the store was built.
    With --checkpoint, also those that the checkpoint no longer yields:
    a bit of a weight file that flipped since is found, and the expert named.
    One that flipped before can't be told: safetensors has no digests.
    The store is built if there is none yet. Exit code 2 if anything differs.
    """
    from epslots.example import example_model
    from epslots.verify_store import check_store

    count, problems = check_store(
        example_model() if model is None else model,
        dtype=dtype,
        slot_format=slot_format,
        cache_dir=cache_dir,
        against_checkpoint=checkpoint,
    )
    for problem in problems:
        typer.echo(problem, err=True)
    if problems:
        raise StoreError(f"{len(problems)} of {count} experts differ")
    typer.echo(f"{count} experts: all as they were built" + (" and as the checkpoint has them" if checkpoint else ""))
