"""``epslots generate``: prompts in, text out, streamed as it comes."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Optional

import msgspec
import typer

from epslots.cli.option_groups import takes_groups
from epslots.cli.options import (
    LoadConfigOptions,
    ModelOption,
    PlacementOption,
    StrategyOption,
    TextOptions,
    ray_address,
)
from epslots.config import DEFAULT_KV_TOKENS, LoadConfig
from epslots.errors import ConfigError
from epslots.json_lines import MOST_LINE_BYTES, Line, decode_line, decode_text, read_lines
from epslots.streams import is_terminal, read_input, say
from epslots.units import format_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from epslots.cli.launchers import Launched, Launcher


@dataclass(frozen=True)
class RankOptions:
    """How many ranks run the model, and where."""

    PANEL: ClassVar[str] = "The ranks"

    ranks: Annotated[
        int,
        typer.Option("--ranks", min=1, help="Ranks; their slots are one cache of the experts. Several run under Ray."),
    ] = 1
    address: Annotated[
        Optional[str],
        typer.Option(
            "--address",
            help='Ray cluster to run in: "auto" (the running one), "host:port", or "local" (start Ray on this '
            "machine, as several ranks do by default).",
        ),
    ] = None
    strategy: StrategyOption = "PACK"
    placement: PlacementOption = None

    @property
    def many(self) -> bool:
        """Whether a launcher starts the ranks; else the one rank is this process."""
        return self.ranks > 1 or self.address is not None


@takes_groups
def generate(
    prompts: Annotated[
        Optional[list[str]], typer.Argument(help="Prompts. Without any, --file or standard input is read.")
    ] = None,
    model: ModelOption = None,
    *,
    load: LoadConfigOptions,
    where: RankOptions,
    file: Annotated[
        Optional[Path],
        typer.Option("--file", "-f", help='One prompt (a text file), or many (.jsonl: an object with "prompt" a line).'),
    ] = None,
    text: TextOptions,
    echo: Annotated[bool, typer.Option("--echo", help="Print each prompt before its continuation.")] = False,
    stats: Annotated[
        bool,
        typer.Option(
            "--stats", help="Print the counters of each rank's requests, and hits, misses, bytes and stalls of each layer."
        ),
    ] = False,
    kv_tokens: Annotated[
        Optional[int],
        typer.Option(
            "--kv-tokens",
            min=1,
            help=f"Tokens that each rank's KV cache keeps. Default: enough for all prompts at once, but not over "
            f"{DEFAULT_KV_TOKENS:,} unless one needs more.",
        ),
    ] = None,
) -> None:
    """Continue prompts with a model larger than the device.

    Text goes to standard output as it is made; progress, statistics and errors go to standard error. Several prompts run
    together, and their texts are printed one after the other.

        epslots generate --model ./Qwen3-30B-A3B --slots 25% "The capital of France is"
        epslots generate --model ./Qwen3-30B-A3B --ranks 4 --slots 12GiB --file prompts.jsonl --stats
        echo "import os" | epslots generate --temperature 0.7
    """
    texts, config = read_prompts(prompts or [], file), load.config()

    from epslots.cli.launchers import find_launcher

    launcher = find_launcher() if where.many else None  # before the model's files are read

    from epslots.cli.one_rank import OneRank
    from epslots.example import example_model
    from epslots.generation.sampling import Sampling
    from epslots.generation.text import load_tokenizer, stop_strings
    from epslots.models.checkpoint import find_checkpoint

    Sampling(temperature=text.temperature, top_k=text.top_k, top_p=text.top_p, seed=text.seed)  # refuses bad values
    stop_strings(tuple(text.stop or ()))
    source = str(example_model()) if model is None else model
    folder = find_checkpoint(source)
    context = context_of(folder)
    tokenizer = load_tokenizer(folder)
    encoded, kv_tokens = _encode(texts, tokenizer, text, context=context, kv_tokens=kv_tokens)
    config = msgspec.structs.replace(config, kv_tokens=kv_tokens)
    launched: Launched
    if launcher is None:
        launched = OneRank(source, tokenizer, config, where.placement)
    else:
        launched = _launch(launcher, source, where, config, max_queue=len(texts))
    with launched:
        try:
            print_texts(launched, texts, encoded, text, echo=echo)
        except KeyboardInterrupt:
            if stats:
                show_stats(launched, config.link)
            raise
        if stats:
            show_stats(launched, config.link)


def _encode(
    texts: list[str],
    tokenizer: PreTrainedTokenizerBase,
    text: TextOptions,
    *,
    context: int | None,
    kv_tokens: int | None,
) -> tuple[list[list[int]], int]:
    """The token ids of each prompt, and the tokens of KV cache for all."""
    from epslots.generation.text import encode_prompt

    limits = [limit for limit in (context, kv_tokens and kv_tokens + 1) if limit is not None]
    most_tokens = min(limits) - text.max_new_tokens if limits else None
    encoded = [encode_prompt(tokenizer, prompt, chat=text.chat, most_tokens=most_tokens) for prompt in texts]
    return encoded, room_for(encoded, text.max_new_tokens, context=context, kv_tokens=kv_tokens)


def _launch(launcher: Launcher, source: str, where: RankOptions, config: LoadConfig, max_queue: int) -> Launched:
    """Load the model on the launcher's ranks, which have another working folder."""
    path = str(Path(source).resolve()) if Path(source).is_dir() else source
    ranks = {**asdict(where), "address": ray_address(where.address)}
    return launcher(path, **ranks, max_queue=max_queue, **config.keywords())


def context_of(folder: Path) -> int | None:
    """Tokens of the model's context; None if it states none.

    Raises:
        UnsupportedModelError: the model predicts no tokens.
    """
    from epslots.models.pretrained import read_language_config

    return getattr(read_language_config(folder).get_text_config(), "max_position_embeddings", None)


def room_for(encoded: list[list[int]], max_new_tokens: int, *, context: int | None, kv_tokens: int | None) -> int:
    """Tokens of KV cache that these prompts are served with.

    Args:
        encoded: the token ids of each prompt.
        context: tokens of the model's context; None if it states none.
        kv_tokens: the value of --kv-tokens.

    Raises:
        ConfigError: a prompt and its new tokens exceed the model's context, or --kv-tokens.
    """
    longest = max(map(len, encoded))
    if context is not None and longest + max_new_tokens > context:
        raise ConfigError(
            f"the prompt has {longest} tokens and --max-new-tokens is {max_new_tokens}, but the model's context "
            f"holds {context}"
        )
    needed = longest + max_new_tokens - 1  # the last new token is never computed with, so it has no keys and values
    if kv_tokens is None:
        return max(needed, min(DEFAULT_KV_TOKENS, sum(map(len, encoded)) + len(encoded) * max_new_tokens))
    if kv_tokens < needed:
        raise ConfigError(
            f"the prompt has {longest} tokens and --max-new-tokens is {max_new_tokens}, which need {needed} tokens of KV "
            f"cache, but --kv-tokens is {kv_tokens}"
        )
    return kv_tokens


class _PromptLine(msgspec.Struct):
    """A line of a .jsonl file; its other fields are ignored."""

    prompt: Any


_decoder = msgspec.json.Decoder(_PromptLine)
_GIVE = "give text as an argument, with --file, or on standard input"


def read_prompts(arguments: list[str], file: Path | None) -> list[str]:
    """Prompts from the arguments, else a file, else standard input.

    Raises:
        ConfigError: there is no prompt, an empty one, or a file that can't be read as UTF-8 text or JSON lines.
    """
    if arguments and file is not None:
        raise ConfigError("give prompts as arguments or as --file, not both")
    if not arguments and file is None and is_terminal(sys.stdin):
        raise ConfigError(f"no prompt: {_GIVE}")
    name = str(file or "standard input")
    try:
        if arguments:
            found = arguments
        elif file is not None and file.suffix.lower() == ".jsonl":
            with file.open("rb") as lines:
                found = [_prompt_of(line, f"{name}, line {line.number}") for line in read_lines(lines)]
        elif file is not None:
            with file.open("rb") as whole:
                found = [_text_of(whole.read(MOST_LINE_BYTES + 1), name)]
        else:
            found = [_text_of(read_input(MOST_LINE_BYTES), name)]
    except OSError as error:
        raise ConfigError(f"{name}: {error.strerror or error}") from error
    if not found or not all(text.strip("\r\n") for text in found):
        raise ConfigError(f"an empty prompt: {_GIVE}")
    return found


def _text_of(data: bytes, name: str) -> str:
    if len(data) > MOST_LINE_BYTES:
        raise ConfigError(f"{name} is longer than {format_bytes(MOST_LINE_BYTES)}, the most that is read")
    try:
        return decode_text(data)
    except ConfigError as error:
        raise ConfigError(f"{name} is {error}") from error


def _prompt_of(line: Line, name: str) -> str:
    example = '{"prompt": "text"}'
    try:
        prompt = decode_line(line, _decoder, example=example, needed={}).prompt
    except ConfigError as error:
        raise ConfigError(f'{name}: not an object with "prompt": {error}') from error
    if not isinstance(prompt, str):
        raise ConfigError(f'{name}: "prompt" must be text, as in {example}')
    return prompt


def print_texts(launched: Launched, texts: list[str], encoded: list[list[int]], text: TextOptions, *, echo: bool) -> None:
    """Continue all prompts at once, and print their texts in order, each as it comes."""
    settings = text.settings()
    del settings["chat"]  # the prompts are encoded
    running: list[Iterable[str]] = [launched.submit(tokens, **settings) for tokens in encoded]
    for number, (prompt, pieces) in enumerate(zip(texts, running, strict=True)):
        if len(texts) > 1:
            say(f"--- {number + 1} of {len(texts)}")
        if echo:
            print(prompt, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print(flush=True)


def show_stats(launched: Launched, link: str | None) -> None:
    """Print the counters of each rank and layer."""
    from epslots.cli.tables import print_stats

    print_stats(launched.stats(), link=link)
