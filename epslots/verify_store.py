"""Verifying a host store: are its bytes those that were built, and do these equal the checkpoint?

Called by ``epslots verify``.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from epslots.cache.host_store import record_digest
from epslots.cache.store_build import pack_record
from epslots.loading import load
from epslots.models.checkpoint import open_checkpoint
from epslots.models.expert_reader import ExpertReader
from epslots.progress import ProgressDisplay
from epslots.runtime import Runtime, runtime_of, verify


def check_store(
    path_or_id: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    slot_format: str = "auto",
    cache_dir: str | os.PathLike[str] | None = None,
    against_checkpoint: bool = False,
    progress: bool | None = None,
) -> tuple[int, list[str]]:
    """Compare the records of a model's host store with their digests. Builds a missing store.

    Args:
        path_or_id: a checkpoint's folder, or its id on the Hugging Face hub.
        dtype: of the weights, by name; "auto" = the checkpoint's.
        slot_format: of the store: packed, unpacked, or auto, the one that a CPU uses.
        cache_dir: the folder of stores; the user's cache folder by default.
        against_checkpoint: also convert each expert from the checkpoint again, and compare; finds checkpoints that changed.
        progress: show progress bars; by default when standard error is a terminal.

    Returns:
        The number of experts, and one line for each that differs.

    Raises:
        EpslotsError: the model can't be loaded.
    """
    model = load(
        path_or_id,
        slots=1,
        device="cpu",
        dtype=dtype,
        host_store="file",
        cache_dir=cache_dir,
        progress=progress,
        slot_format=slot_format,
        prefetch="off",
    )
    runtime = runtime_of(model)
    problems = [str(error) for error in verify(model, progress)]
    if against_checkpoint:
        reader = ExpertReader(open_checkpoint(Path(model.name_or_path)), model, runtime.layers)
        problems += _compare(runtime, reader, ProgressDisplay(progress))
    return sum(layer.num_experts for layer in runtime.layers), problems


def _compare(runtime: Runtime, reader: ExpertReader, display: ProgressDisplay) -> list[str]:
    problems = []
    with display("comparing with the checkpoint", runtime.store.nbytes) as advance:
        for layer, expert in runtime.store.shape.experts():
            spec = runtime.layers[layer]
            record = torch.zeros(spec.layout.nbytes, dtype=torch.uint8)
            pack_record(record, spec.layout, reader.read_expert(layer, expert))
            if record_digest(record) != runtime.store.digest(layer, expert):
                problems.append(f"expert {expert} of {spec.name}: the checkpoint differs from the host store")
            advance(record.nbytes)
    return problems
