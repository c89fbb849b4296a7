"""Options that several commands share, described once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

ModelOption = Annotated[
    Optional[str],
    typer.Option(
        "--model", "-m", help="Checkpoint folder with safetensors, or a hub id. Default: the small model shipped here."
    ),
]
SlotsOption = Annotated[
    str,
    typer.Option(
        "--slots",
        "-s",
        help='Expert slots: an int (per MoE layer), "25%" (of each layer\'s experts), "12GiB" (the whole pool) or "auto".',
    ),
]
DeviceOption = Annotated[
    Optional[str], typer.Option("--device", help="cpu, cuda or cuda:N. Default: the GPU if there is one.")
]
DtypeOption = Annotated[
    str, typer.Option("--dtype", help="auto (the checkpoint's own), float32, bfloat16, float16 or float64.")
]
PolicyOption = Annotated[str, typer.Option("--policy", help="Eviction policy: lru, lfu or lrfu.")]
HostStoreOption = Annotated[
    Optional[str],
    typer.Option(
        "--host-store",
        help="Where the node keeps all experts: file (mapped, kept for the next start) or memory (shared memory, gone with "
        "its last user).",
    ),
]
CacheDirOption = Annotated[
    Optional[Path], typer.Option("--cache-dir", help="Folder of the host store. Default: the user's cache folder.")
]
