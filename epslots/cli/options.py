"""Options that several commands share, described once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from epslots.planner.cache_policy import POLICIES

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
PolicyOption = Annotated[str, typer.Option("--policy", help=f"Eviction policy: {', '.join(POLICIES)}.")]
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
MaxNewTokensOption = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Stop after this many tokens.")]
TemperatureOption = Annotated[
    float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token; above, samples.")
]
TopPOption = Annotated[float, typer.Option("--top-p", min=0.0, max=1.0, help="Sample from this much probability mass.")]
TopKOption = Annotated[int, typer.Option("--top-k", min=0, help="Sample from this many tokens; 0 = all.")]
SeedOption = Annotated[
    int,
    typer.Option(
        "--seed", min=0, help="Seed of the sampling. The same seed gives the same text, whatever the ranks and other prompts."
    ),
]
StopOption = Annotated[
    Optional[list[str]],
    typer.Option(
        "--stop", help="End a text before this string, as the model's end tokens do. May be given several times (up to 64)."
    ),
]
IgnoreTokenizerEosOption = Annotated[
    bool,
    typer.Option(
        "--ignore-tokenizer-eos",
        help="End texts at the end tokens of the generation configuration alone, as transformers' generate does, and not also "
        "at the tokenizer's.",
    ),
]
ChatOption = Annotated[
    Optional[bool],
    typer.Option("--chat/--no-chat", help="Wrap prompts in the chat template. Default: if the tokenizer has one."),
]
PlacementOption = Annotated[
    Optional[Path],
    typer.Option(
        "--placement", help="File of `epslots placement plan`: where experts live at first. For as many ranks and slots."
    ),
]
LinkOption = Annotated[
    Optional[str],
    typer.Option(
        "--link",
        help="Emulate a link between host and device on a CPU: bytes a second and the latency of each fetch, such as "
        "8GB/s,20us. Fetches then take their time in the background, as on a GPU.",
    ),
]
PrefetchOption = Annotated[
    str,
    typer.Option(
        "--prefetch",
        help='Fetch what the next layer is expected to need: "auto" (where a link carries it meanwhile), "off", or the bytes '
        "a rank may fetch in a step before nothing more is fetched ahead: 64MiB.",
    ),
]
PredictorOption = Annotated[
    Optional[Path],
    typer.Option(
        "--predictor",
        help="File of `epslots predict fit`. Default: the one beside the checkpoint; without one, the next layer's router.",
    ),
]
HostComputeOption = Annotated[
    str,
    typer.Option(
        "--host-compute",
        help="Let the host's CPU compute a missing expert where that costs less than fetching it: auto (on a GPU), on, off.",
    ),
]
ExecutePredictedOption = Annotated[
    bool,
    typer.Option(
        "--execute-predicted",
        help="APPROXIMATE: execute the experts that are predicted instead of those that the model chooses. The text is no "
        "longer the model's own.",
    ),
]
BatchInvariantOption = Annotated[
    bool,
    typer.Option(
        "--batch-invariant",
        help="Compute each text in the same bits whatever runs beside it, and whatever --slots and --ranks are. Slower.",
    ),
]
StrategyOption = Annotated[
    str,
    typer.Option(
        "--strategy",
        help="Where ranks are placed: PACK (on few nodes), SPREAD (over many), STRICT_PACK (one node) or STRICT_SPREAD (a "
        "node each).",
    ),
]


def ray_address(given: str | None) -> str | None:
    """The address of a Ray cluster as an option has it; None for one to be started on this machine."""
    return None if given == "local" else given
