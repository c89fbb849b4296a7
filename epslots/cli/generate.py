"""``epslots generate``: prompts in, text out, streamed as it comes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from epslots.cli.options import (
    BatchInvariantOption,
    CacheDirOption,
    ChatOption,
    DeviceOption,
    DtypeOption,
    ExecutePredictedOption,
    HostComputeOption,
    HostStoreOption,
    LinkOption,
    MaxNewTokensOption,
    ModelOption,
    PlacementOption,
    PolicyOption,
    PredictorOption,
    PrefetchOption,
    SeedOption,
    SlotsOption,
    StopOption,
    StrategyOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    ray_address,
)
from epslots.errors import ConfigError
from epslots.step.eviction import DEFAULT_POLICY

if TYPE_CHECKING:
    from epslots.cli.launchers import Launched

DEFAULT_KV_TOKENS = 4096


def generate(
    prompts: Annotated[
        Optional[list[str]], typer.Argument(help="Prompts. Without any, --file or standard input is read.")
    ] = None,
    model: ModelOption = None,
    slots: SlotsOption = "auto",
    ranks: Annotated[
        int,
        typer.Option("--ranks", min=1, help="Ranks; their slots are one cache of the experts. Several run under Ray."),
    ] = 1,
    address: Annotated[
        Optional[str],
        typer.Option(
            "--address",
            help='Ray cluster to run in: "auto" (the running one), "host:port", or "local" (start Ray on this '
            "machine, as several ranks do by default).",
        ),
    ] = None,
    strategy: StrategyOption = "PACK",
    placement: PlacementOption = None,
    file: Annotated[
        Optional[Path],
        typer.Option("--file", "-f", help='One prompt (a text file), or many (.jsonl: an object with "prompt" a line).'),
    ] = None,
    max_new_tokens: MaxNewTokensOption = 128,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    top_k: TopKOption = 0,
    seed: SeedOption = 0,
    stop: StopOption = None,
    chat: ChatOption = None,
    echo: Annotated[bool, typer.Option("--echo", help="Print each prompt before its continuation.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Print hits, misses, bytes and stalls of each layer.")] = False,
    kv_tokens: Annotated[
        Optional[int],
        typer.Option(
            "--kv-tokens",
            min=1,
            help=f"Tokens that each rank's KV cache keeps. Default: enough for all prompts at once, but not over "
            f"{DEFAULT_KV_TOKENS:,} unless one needs more.",
        ),
    ] = None,
    policy: PolicyOption = DEFAULT_POLICY,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    host_store: HostStoreOption = None,
    cache_dir: CacheDirOption = None,
    link: LinkOption = None,
    prefetch: PrefetchOption = "auto",
    predictor: PredictorOption = None,
    execute_predicted: ExecutePredictedOption = False,
    host_compute: HostComputeOption = "auto",
    batch_invariant: BatchInvariantOption = False,
) -> None:
    """Continue prompts with a model larger than the device.

    Text goes to standard output as it is made; progress, statistics and errors go to standard error. Several prompts run
    together, and their texts are printed one after the other.

        epslots generate --model ./Qwen3-30B-A3B --slots 25% "The capital of France is"
        epslots generate --model ./Qwen3-30B-A3B --ranks 4 --slots 12GiB --file prompts.jsonl --stats
        echo "import os" | epslots generate --temperature 0.7
    """
    texts = read_prompts(prompts or [], file)
    sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    settings = {"max_new_tokens": max_new_tokens, "stop": tuple(stop or ()), **sampling}
    many = ranks > 1 or address is not None

    from epslots.cli.launchers import find_launcher

    launch = find_launcher() if many else None  # before anything is read

    from epslots.cli.one_rank import OneRank
    from epslots.example import example_model
    from epslots.generation.sampling import Sampling
    from epslots.generation.text import encode_prompt, load_tokenizer, stop_strings
    from epslots.models.checkpoint import find_checkpoint

    Sampling(**sampling)
    stop_strings(settings["stop"])
    source = model or str(example_model())
    folder = find_checkpoint(source)
    tokenizer = load_tokenizer(folder)
    encoded = [encode_prompt(tokenizer, text, chat=chat) for text in texts]
    room = room_for(encoded, max_new_tokens, context=context_of(folder), kv_tokens=kv_tokens)
    common: dict[str, Any] = {
        "slots": slots,
        "device": device,
        "dtype": dtype,
        "policy": policy,
        "host_store": host_store,
        "cache_dir": cache_dir,
        "kv_tokens": room,
        "placement": placement,
        "link": link,
        "prefetch": prefetch,
        "predictor": predictor,
        "execute_predicted": execute_predicted,
        "host_compute": host_compute,
        "batch_invariant": batch_invariant,
    }
    launched: Launched
    if launch is None:
        launched = OneRank(source, tokenizer, **common)
    else:
        # The other ranks' processes have another working folder.
        path = str(folder.resolve()) if Path(source).is_dir() else source
        launched = launch(path, ranks=ranks, address=ray_address(address), strategy=strategy, max_queue=len(texts), **common)
    with launched:
        try:
            print_texts(launched, texts, encoded, settings, echo=echo)
        except KeyboardInterrupt:
            if stats:
                show_stats(launched, link)
            raise
        if stats:
            show_stats(launched, link)


def context_of(folder: Path) -> int | None:
    """Tokens of the model's context, if it states that."""
    from epslots.models.pretrained import read_config

    return getattr(read_config(folder).get_text_config(), "max_position_embeddings", None)


def room_for(encoded: list[list[int]], max_new_tokens: int, *, context: int | None, kv_tokens: int | None) -> int:
    """Tokens of KV cache for some prompts.

    Raises:
        ConfigError: a prompt and its new tokens exceed the model's context, or the cache that was asked for.
    """
    longest = max(map(len, encoded))
    if context is not None and longest + max_new_tokens > context:
        raise ConfigError(
            f"the prompt has {longest} tokens and --max-new-tokens is {max_new_tokens}, but the model's context "
            f"holds {context}"
        )
    needed = longest + max_new_tokens - 1  # the last one is handed out and never computed with
    if kv_tokens is None:
        return max(needed, min(DEFAULT_KV_TOKENS, sum(map(len, encoded)) + len(encoded) * max_new_tokens))
    if kv_tokens < needed:
        raise ConfigError(
            f"the prompt has {longest} tokens and --max-new-tokens is {max_new_tokens}, which need {needed} tokens of KV "
            f"cache, but --kv-tokens is {kv_tokens}"
        )
    return kv_tokens


def read_prompts(arguments: list[str], file: Path | None) -> list[str]:
    """Prompts from the arguments, else a file, else standard input.

    Raises:
        ConfigError: none at all, an empty one, or a file that can't be read as UTF-8 text or JSON lines.
    """
    if arguments and file is not None:
        raise ConfigError("give prompts as arguments or as --file, not both")
    try:
        if arguments:
            found = arguments
        elif file is not None and file.suffix == ".jsonl":
            found = [_prompt_of(line, n, file) for n, line in enumerate(_lines(file), start=1) if line.strip()]
        elif file is not None:
            found = [file.read_text(encoding="utf-8")]
        elif not sys.stdin.isatty():
            found = [sys.stdin.buffer.read().decode("utf-8")]
        else:
            raise ConfigError("no prompt: give one as an argument, with --file, or on standard input")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file or 'standard input'} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from error
    if not found or not all(text.strip("\r\n") for text in found):
        raise ConfigError("an empty prompt: give text as an argument, with --file, or on standard input")
    return found


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines()


def _prompt_of(line: str, number: int, file: Path) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f'{file}, line {number}: not an object with "prompt"') from error
    if not isinstance(prompt, str):
        raise ConfigError(f'{file}, line {number}: "prompt" must be text')
    return prompt


def print_texts(
    launched: Launched, texts: list[str], encoded: list[list[int]], settings: dict[str, Any], *, echo: bool
) -> None:
    """Continue all prompts at once; print their texts one after the other, the first as it comes."""
    running: list[Iterable[str]] = [launched.submit(tokens, **settings) for tokens in encoded]
    for number, (text, pieces) in enumerate(zip(texts, running, strict=True)):
        if len(texts) > 1:
            print(f"--- {number + 1} of {len(texts)}", file=sys.stderr)
        if echo:
            print(text, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print(flush=True)


def show_stats(launched: Launched, link: str | None) -> None:
    """Print the counters."""
    from epslots.cli.tables import print_stats

    print_stats(launched.stats(), link=link)
