"""``epslots generate``: prompts in, text out, streamed as it comes."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Optional

import msgspec
import typer

from epslots.cli.option_groups import takes_groups
from epslots.cli.options import (
    DecodeRanksOption,
    GroupsOption,
    LoadConfigOptions,
    ModelOption,
    PlacementOption,
    PrefillRanksOption,
    StrategyOption,
    ray_address,
)
from epslots.cli.text_options import TextOptions
from epslots.config import DEFAULT_KV_TOKENS, LoadConfig
from epslots.errors import ConfigError, RequestError
from epslots.generation.prompt_line import PromptLine, decode_prompt
from epslots.generation.request_limits import cached_tokens, check_context, tokens_that_fit
from epslots.generation.settings import GenerationSettings, with_own_settings
from epslots.json_lines import MOST_LINE_BYTES, decode_text, read_lines
from epslots.streams import is_terminal, read_input, say
from epslots.units import format_bytes, parse_kv_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from epslots.cli.launchers import Continuation, Launched, Launcher
    from epslots.generation.requests import Reason, TokenLogprobs


@dataclass(frozen=True)
class RankOptions:
    """How many ranks run the model, and where."""

    PANEL: ClassVar[str] = "The ranks"

    ranks: Annotated[
        int,
        typer.Option("--ranks", min=1, help="Ranks; their slots are one cache of the experts. Several run under Ray."),
    ] = 1
    groups: GroupsOption = 1
    prefill_ranks: PrefillRanksOption = 0
    decode_ranks: DecodeRanksOption = 0
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
        return self.ranks > 1 or self.groups > 1 or self.prefill_ranks > 0 or self.address is not None


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
        typer.Option(
            "--file",
            "-f",
            help='One prompt (a text file), or many (.jsonl: a line is an object with "prompt", and settings of its own).',
        ),
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
        Optional[str],
        typer.Option(
            "--kv-tokens",
            help=f"Tokens that each rank's KV cache keeps; auto: as many as requests need, in slots that experts cede. "
            f"Default: enough for all prompts at once, but not over {DEFAULT_KV_TOKENS:,} unless one needs more.",
        ),
    ] = None,
) -> None:
    """Continue prompts with a model larger than the device.

    Text goes to standard output as it is made; progress, statistics, log-probabilities and errors go to standard error.
    Several prompts, and choices of one (--n), run together, and their texts are printed one after the other. A text that fails
    ends no other; the exit status is 2 then.

        epslots generate --model ./Qwen3-30B-A3B --slots 25% "The capital of France is"
        epslots generate --model ./Qwen3-30B-A3B --ranks 4 --slots 12GiB --file prompts.jsonl --stats
        echo "import os" | epslots generate --temperature 0.7 --n 3
        epslots generate --json-schema @person.json "Describe a person, as JSON:"
    """
    lines, config, settings = read_prompts(prompts or [], file), load.config(), text.settings()
    room = None if kv_tokens is None else parse_kv_tokens(kv_tokens)

    from epslots.cli.launchers import find_launcher

    launcher = find_launcher() if where.many else None  # before the model's files are read

    from epslots.cli.one_rank import OneRank
    from epslots.example import example_model
    from epslots.generation.text import load_tokenizer
    from epslots.models.checkpoint import find_checkpoint

    source = str(example_model()) if model is None else model
    folder = find_checkpoint(source)
    context = context_of(folder)
    tokenizer = load_tokenizer(folder)
    most_tokens = tokens_that_fit(context, room if isinstance(room, int) else None)
    encoded = []
    for number, line in enumerate(lines, start=1):
        with _naming(number, len(lines)):
            encoded.append(_EncodedPrompt.of(line, settings, tokenizer, most_tokens))
    config = msgspec.structs.replace(config, kv_tokens=room_for(encoded, context=context, kv_tokens=room))
    launched: Launched
    if launcher is None:
        launched = OneRank(source, tokenizer, config, where.placement)
    else:
        launched = _launch(launcher, source, where, config, max_queue=sum(prompt.settings.n for prompt in encoded))
    with launched:
        try:
            print_texts(launched, encoded, tokenizer, echo=echo)
        except (KeyboardInterrupt, RequestError):
            if stats:
                show_stats(launched, config.link)
            raise
        if stats:
            show_stats(launched, config.link)


@contextmanager
def _naming(number: int, count: int) -> Iterator[None]:
    """Let a ConfigError within say which of several prompts it is about."""
    try:
        yield
    except ConfigError as error:
        if count == 1:
            raise
        raise ConfigError(f"prompt {number} of {count}: {error}") from error


@dataclass(frozen=True)
class _EncodedPrompt:
    """A prompt's tokens, and its settings.

    Attributes:
        text: None if the prompt was given as token ids.
    """

    text: str | None
    tokens: Sequence[int]
    settings: GenerationSettings

    @classmethod
    def of(
        cls, line: PromptLine, settings: GenerationSettings, tokenizer: PreTrainedTokenizerBase, most_tokens: int | None
    ) -> _EncodedPrompt:
        """Tokenize a prompt.

        Args:
            settings: where the line has none of its own.
            most_tokens: tokens that fit, new ones included; None for any.

        Raises:
            ConfigError: the prompt or a setting is not allowed.
        """
        from epslots.generation.text import encode_prompt

        prompt, settings = with_own_settings(line.request(), settings)
        if not isinstance(prompt, str):
            return cls(None, prompt, settings)
        most = None if most_tokens is None else most_tokens - settings.max_new_tokens
        tokens = encode_prompt(tokenizer, prompt, chat=settings.chat, most_tokens=most)
        return cls(prompt, tokens, msgspec.structs.replace(settings, chat=False))


def _launch(launcher: Launcher, source: str, where: RankOptions, config: LoadConfig, max_queue: int) -> Launched:
    """Load the model on the launcher's ranks, which have another working folder."""
    path = str(Path(source).resolve()) if Path(source).is_dir() else source
    ranks = {**asdict(where), "address": ray_address(where.address)}
    if where.prefill_ranks and where.ranks == 1:
        ranks["ranks"] = None  # as many as both roles have
    return launcher(path, **ranks, max_queue=max_queue, **config.keywords())


def context_of(folder: Path) -> int | None:
    """Tokens of the model's context; None if it states none.

    Raises:
        UnsupportedModelError: the model predicts no tokens.
    """
    from epslots.models.pretrained import read_language_config

    return getattr(read_language_config(folder).get_text_config(), "max_position_embeddings", None)


def room_for(prompts: Sequence[_EncodedPrompt], *, context: int | None, kv_tokens: int | str | None) -> int | str:
    """Tokens of KV cache that these prompts are served with, or "auto".

    Args:
        prompts: all that are served.
        context: tokens of the model's context; None if it states none.
        kv_tokens: the value of --kv-tokens.

    Raises:
        ConfigError: a prompt and its new tokens exceed the model's context, or a number of --kv-tokens.
    """
    longest = max(prompts, key=lambda prompt: len(prompt.tokens) + prompt.settings.max_new_tokens)
    new = longest.settings.max_new_tokens
    size = f"the prompt has {len(longest.tokens)} tokens and --max-new-tokens is {new}"
    check_context(len(longest.tokens), new, context, size)
    needed = cached_tokens(len(longest.tokens), new)
    if kv_tokens is None:
        together = sum((len(prompt.tokens) + prompt.settings.max_new_tokens) * prompt.settings.n for prompt in prompts)
        return max(needed, min(DEFAULT_KV_TOKENS, together))
    if isinstance(kv_tokens, int) and kv_tokens < needed:
        raise ConfigError(f"{size}, which need {needed} tokens of KV cache, but --kv-tokens is {kv_tokens}")
    return kv_tokens


_GIVE = "give text as an argument, with --file, or on standard input"


def read_prompts(arguments: list[str], file: Path | None) -> list[PromptLine]:
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
            found = [PromptLine(prompt=text) for text in arguments]
        elif file is not None and file.suffix.lower() == ".jsonl":
            found = _read_lines(file)
        elif file is not None:
            with file.open("rb") as whole:
                found = [PromptLine(prompt=_text_of(whole.read(MOST_LINE_BYTES + 1), name))]
        else:
            found = [PromptLine(prompt=_text_of(read_input(MOST_LINE_BYTES), name))]
    except OSError as error:
        raise ConfigError(f"{name}: {error.strerror or error}") from error
    if not found:
        raise ConfigError(f"no prompt: {_GIVE}")
    for number, line in enumerate(found, start=1):
        with _naming(number, len(found)):
            if not (line.prompt.strip("\r\n") if isinstance(line.prompt, str) else line.prompt):
                raise ConfigError(f"an empty prompt: {_GIVE}")
    return found


def _read_lines(file: Path) -> list[PromptLine]:
    found = []
    with file.open("rb") as lines:
        for line in read_lines(lines):
            try:
                found.append(decode_prompt(line))
            except ConfigError as error:
                raise ConfigError(f"{file}, line {line.number}: {error}") from error
    return found


def _text_of(data: bytes, name: str) -> str:
    if len(data) > MOST_LINE_BYTES:
        raise ConfigError(f"{name} is longer than {format_bytes(MOST_LINE_BYTES)}, the most that is read")
    try:
        return decode_text(data)
    except ConfigError as error:
        raise ConfigError(f"{name} is {error}") from error


def print_texts(
    launched: Launched, prompts: Sequence[_EncodedPrompt], tokenizer: PreTrainedTokenizerBase, *, echo: bool
) -> None:
    """Continue all prompts at once, and print their texts in order, each as it comes.

    Raises:
        ConfigError: a prompt or a setting is refused; nothing is printed.
        RequestError: texts ended with errors; of several, each error is printed behind its text.
    """
    running = []
    for number, prompt in enumerate(prompts, start=1):
        with _naming(number, len(prompts)):
            running.append(launched.submit_choices(prompt.tokens, **prompt.settings.keywords()))
    texts, failed = sum(map(len, running)), 0
    for number, (prompt, choices) in enumerate(zip(prompts, running, strict=True), start=1):
        for choice, continuation in enumerate(choices, start=1):
            if texts > 1:
                of_choices = f", choice {choice} of {len(choices)}" if len(choices) > 1 else ""
                say(f"--- {number} of {len(prompts)}{of_choices}")
            if echo:
                print(prompt.text or tokenizer.decode(list(prompt.tokens)), end="", flush=True)
            try:
                reason = _print_text(continuation, tokenizer)
            except RequestError as error:
                if texts == 1:
                    raise
                failed += 1
                print(flush=True)
                say(f"error: {error}")
            else:
                if reason == "length" and prompt.settings.text_grammar is not None:
                    say(f"cut off by max_new_tokens={prompt.settings.max_new_tokens}: it may end before its grammar does")
    if failed:
        raise RequestError(f"{failed} of {texts} texts ended with an error")


def _print_text(continuation: Continuation, tokenizer: PreTrainedTokenizerBase) -> Reason | None:
    """Print a text as it comes; after it, log-probabilities to standard error if they were asked for.

    Returns:
        Why it ended.
    """
    from epslots.cli.tables import print_logprobs

    of_prompt: list[TokenLogprobs] = []
    of_text: list[TokenLogprobs] = []
    reason: Reason | None = None
    for portion in continuation.portions():
        print(portion.text, end="", flush=True)
        of_prompt += portion.prompt_logprobs
        of_text += portion.logprobs
        reason = portion.reason
    print(flush=True)
    for title, logprobs in (("prompt", of_prompt), ("text", of_text)):
        if logprobs:
            print_logprobs(f"log-probabilities of the {title}", logprobs, lambda token: tokenizer.decode([token]))
    return reason


def show_stats(launched: Launched, link: str | None) -> None:
    """Print the counters of each rank and layer."""
    from epslots.cli.tables import print_stats

    print_stats(launched.stats(), link=link)
