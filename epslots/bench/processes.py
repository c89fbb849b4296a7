"""Ranks for benchmarks: processes on this machine, joined by gloo, one thread each."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from epslots.transport.forming import form_group
from epslots.transport.torch_transport import TorchTransport

CPU = torch.device("cpu")


def run_ranks(work: Callable[..., Any], size: int, *args: Any) -> list[Any]:
    """Results of ``work(transport, *args)`` on each of ``size`` ranks, passed through JSON.

    Args:
        work: a function of a module, which a fresh process can import.
    """
    with tempfile.TemporaryDirectory(prefix="epslots-ranks-") as folder:
        multiprocessing.spawn(_main, (work, size, folder, args), nprocs=size)  # type: ignore[attr-defined]
        return [json.loads((Path(folder) / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(size)]


def _main(rank: int, work: Callable[..., Any], size: int, folder: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(  # type: ignore[attr-defined]
        str(Path(folder) / "store"), size
    )
    group = form_group(store, epoch=0, rank=rank, size=size, backend="gloo", deadline_s=120)
    transport = TorchTransport(group, device=CPU, deadline_s=120)
    result = work(transport, *args)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(result), encoding="utf-8")
    transport.close()
