"""Options that several commands share, declared once; and groups of them, for commands with ``option_groups.takes_groups``.

``LoadConfigOptions`` are the settings of ``LoadConfig``. Those of ``GenerationSettings`` are in ``text_options.py``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Optional

import typer

from epslots.config import LoadConfig, load_config
from epslots.planner.cache_policy import POLICIES
from epslots.units import parse_kv_tokens

POLICY_HELP = f"Which resident expert is evicted for a missing one: {', '.join(POLICIES)}."
_DEFAULTS = LoadConfig()

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
KvTokensOption = Annotated[
    str,
    typer.Option(
        "--kv-tokens",
        help="Tokens that a rank's KV cache keeps of all requests together, prompts and new text: a number, or auto (as many "
        "as requests need, in slots that experts cede meanwhile).",
    ),
]
DeviceOption = Annotated[
    Optional[str], typer.Option("--device", help="cpu, cuda or cuda:N. Default: the GPU if there is one.")
]
AttentionOption = Annotated[
    Optional[str],
    typer.Option(
        "--attn-implementation",
        help="transformers' attention: sdpa, eager, or flash_attention_2 where that package is installed. Default: the "
        "model's own choice.",
    ),
]
DtypeOption = Annotated[
    str, typer.Option("--dtype", help="auto (the checkpoint's own), float32, bfloat16, float16 or float64.")
]
CacheDirOption = Annotated[
    Optional[Path], typer.Option("--cache-dir", help="Folder of the host store. Default: the user's cache folder.")
]
HostMemoryOption = Annotated[
    Optional[str],
    typer.Option(
        "--host-memory",
        help="RAM of each node for the experts, such as 64GiB: those that are fetched most stay in it, the others are read "
        "from the disk ahead of their use. Default: as much as the operating system gives.",
    ),
]
SlotFormatOption = Annotated[
    str,
    typer.Option(
        "--slot-format",
        help="How slots hold a quantised checkpoint's experts: packed (as stored), unpacked (in --dtype), or auto: packed "
        "where a kernel of the device computes with them.",
    ),
]
ExpertFormatOption = Annotated[
    Optional[str],
    typer.Option(
        "--expert-format",
        help="APPROXIMATE: quantise the experts of a checkpoint that isn't quantised, to int8 or int4. The text is no longer "
        "the model's own.",
    ),
]
PlacementOption = Annotated[
    Optional[Path],
    typer.Option(
        "--placement", help="File of `epslots placement plan`: where experts live at first. For as many ranks and slots."
    ),
]
GroupsOption = Annotated[
    int,
    typer.Option(
        "--groups",
        min=1,
        help="Groups into which the ranks are divided: each is a whole model, and goes on when another one breaks.",
    ),
]
PrefillRanksOption = Annotated[
    int,
    typer.Option(
        "--prefill-ranks",
        min=0,
        help="Ranks that compute prompts for the others, which decode: a long prompt holds up no stream. 0 = each does both.",
    ),
]
DecodeRanksOption = Annotated[
    int,
    typer.Option("--decode-ranks", min=0, help="Ranks that go on after --prefill-ranks; 0 = all others of --ranks."),
]
StrategyOption = Annotated[
    str,
    typer.Option(
        "--strategy",
        help="Where ranks are placed: PACK (on few nodes), SPREAD (over many), STRICT_PACK (one node) or STRICT_SPREAD (a "
        "node each).",
    ),
]


@dataclass(frozen=True)
class LoadConfigOptions:
    """The settings of ``LoadConfig``, but for ``kv_tokens``: its default is each command's own."""

    PANEL: ClassVar[str] = "The model"

    slots: SlotsOption = str(_DEFAULTS.slots)
    policy: Annotated[str, typer.Option("--policy", help=POLICY_HELP)] = _DEFAULTS.policy
    device: DeviceOption = _DEFAULTS.device
    dtype: DtypeOption = _DEFAULTS.dtype
    host_store: Annotated[
        Optional[str],
        typer.Option(
            "--host-store",
            help="Where the node keeps all experts: file (mapped, kept for the next start) or memory (shared memory, freed "
            "with its last user). Default: memory with a GPU, where it fits; else file.",
        ),
    ] = _DEFAULTS.host_store
    host_memory: HostMemoryOption = _DEFAULTS.host_memory
    slot_format: SlotFormatOption = _DEFAULTS.slot_format
    expert_format: ExpertFormatOption = _DEFAULTS.expert_format
    cache_dir: CacheDirOption = None
    link: Annotated[
        Optional[str],
        typer.Option(
            "--link",
            help="Emulate a link between host and device on a CPU: bytes a second and the latency of each fetch, such as "
            "8GB/s,20us. Fetches then take their time in the background, as on a GPU.",
        ),
    ] = _DEFAULTS.link
    prefetch: Annotated[
        str,
        typer.Option(
            "--prefetch",
            help='Fetch the experts that the next layer is expected to need: "auto" (where a link carries them meanwhile), '
            '"off", or the bytes that a rank may fetch in a step before prefetching pauses: 64MiB.',
        ),
    ] = str(_DEFAULTS.prefetch)
    predictor: Annotated[
        Optional[Path],
        typer.Option(
            "--predictor",
            help="File of `epslots predict fit`. Default: the one beside the checkpoint; without one, the next layer's "
            "router.",
        ),
    ] = None
    execute_predicted: Annotated[
        bool,
        typer.Option(
            "--execute-predicted",
            help="APPROXIMATE: execute the predicted experts instead of those that the model chooses. The text is no longer "
            "the model's own.",
        ),
    ] = _DEFAULTS.execute_predicted
    host_compute: Annotated[
        str,
        typer.Option(
            "--host-compute",
            help="Let the host's CPU compute a missing expert where that costs less than fetching it: auto (with a GPU), on, "
            "off.",
        ),
    ] = _DEFAULTS.host_compute
    attn_implementation: AttentionOption = _DEFAULTS.attn_implementation
    batch_invariant: Annotated[
        bool,
        typer.Option(
            "--batch-invariant",
            help="Compute each text in the same bits beside any other prompts, and with any --slots and --ranks. Slower.",
        ),
    ] = _DEFAULTS.batch_invariant

    max_requests: Annotated[
        int,
        typer.Option("--max-requests", min=1, help="Requests that a rank runs at a time; the others wait."),
    ] = _DEFAULTS.max_requests
    max_batch_tokens: Annotated[
        int,
        typer.Option("--max-batch-tokens", min=1, help="Tokens of one step of a rank; longer prompts take several steps."),
    ] = _DEFAULTS.max_batch_tokens
    cache: Annotated[
        str,
        typer.Option(
            "--cache",
            help="How a rank keeps its requests: pages (keys and values of plain attention), rows (all that the model's "
            "layers keep), or auto, the faster one that the model allows.",
        ),
    ] = _DEFAULTS.cache
    prefix_cache: Annotated[
        bool,
        typer.Option(
            "--prefix-cache/--no-prefix-cache", help="Prompts that begin alike share what was computed for their beginning."
        ),
    ] = _DEFAULTS.prefix_cache
    step_target_ms: Annotated[
        Optional[float],
        typer.Option(
            "--step-target-ms",
            help="Milliseconds that a step may take, about: long prompts are cut so that texts under way don't wait longer. "
            "Default: only --max-batch-tokens cuts them.",
        ),
    ] = _DEFAULTS.step_target_ms
    capture: Annotated[
        bool,
        typer.Option("--capture/--no-capture", help="On a GPU, decode by CUDA graphs, where the model allows it."),
    ] = _DEFAULTS.capture

    def config(self, kv_tokens: int | str = _DEFAULTS.kv_tokens) -> LoadConfig:
        """The options as the configuration that is handed down; ``kv_tokens`` may be the text of its option.

        Raises:
            ConfigError: an option's value is not one of those allowed.
        """
        parsed = parse_kv_tokens(kv_tokens) if isinstance(kv_tokens, str) else kv_tokens
        return load_config(**asdict(self), kv_tokens=parsed)


def ray_address(given: str | None) -> str | None:
    """The address of a Ray cluster; None for ``"local"``, a Ray that is started on this machine."""
    return None if given == "local" else given
