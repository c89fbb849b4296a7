"""``epslots generate``: prompts in, text out, streamed as it comes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from epslots.cli.options import (
    CacheDirOption,
    DeviceOption,
    DtypeOption,
    HostStoreOption,
    ModelOption,
    PolicyOption,
    SlotsOption,
)
from epslots.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def generate(
    prompts: Annotated[
        Optional[list[str]], typer.Argument(help="Prompts. Without any, --file or standard input is read.")
    ] = None,
    model: ModelOption = None,
    slots: SlotsOption = "auto",
    file: Annotated[
        Optional[Path],
        typer.Option("--file", "-f", help='One prompt (a text file), or many (.jsonl: an object with "prompt" a line).'),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after this many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token; above, samples.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Sample from this much probability mass.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from this many tokens; 0 = all.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 0,
    chat: Annotated[
        Optional[bool],
        typer.Option("--chat/--no-chat", help="Wrap prompts in the chat template. Default: if the tokenizer has one."),
    ] = None,
    echo: Annotated[bool, typer.Option("--echo", help="Print each prompt before its continuation.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Print hits, misses, bytes and stalls of each layer.")] = False,
    policy: PolicyOption = "lrfu",
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    host_store: HostStoreOption = None,
    cache_dir: CacheDirOption = None,
) -> None:
    """Continue prompts with a model larger than the device.

    Text goes to standard output as it is made; progress, statistics and errors go to standard error.

        epslots generate --model ./Qwen3-30B-A3B --slots 25% "The capital of France is"
        epslots generate --model ./Qwen3-30B-A3B --slots 12GiB --file prompts.jsonl --stats
        echo "import os" | epslots generate --temperature 0.7
    """
    texts = read_prompts(prompts or [], file)

    from transformers import set_seed

    import epslots
    from epslots.cli.tables import print_stats
    from epslots.example import example_model

    source = model or str(example_model())
    loaded = epslots.load(
        source, slots=slots, device=device, dtype=dtype, policy=policy, host_store=host_store, cache_dir=cache_dir
    )
    tokenizer = load_tokenizer(loaded.name_or_path)
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        settings |= {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    try:
        for number, text in enumerate(texts):
            if len(texts) > 1:
                print(f"--- {number + 1} of {len(texts)}", file=sys.stderr)
            set_seed(seed)
            stream(loaded, tokenizer, text, settings, chat=chat, echo=echo)
    finally:  # after Ctrl-C, too
        if stats:
            print_stats(epslots.stats(loaded))


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


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The checkpoint's own tokenizer.

    Raises:
        ConfigError: it has none.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{path} has no tokenizer that transformers can load") from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    settings: dict[str, Any],
    *,
    chat: bool | None,
    echo: bool,
) -> None:
    """Continue one prompt, printing each piece of text as it is finished.

    Raises:
        ConfigError: prompt and new tokens exceed the model's context, or there is no chat template to wrap it in.
    """
    from transformers import TextStreamer

    has_template = getattr(tokenizer, "chat_template", None) is not None
    if chat and not has_template:
        raise ConfigError("--chat: this tokenizer has no chat template")
    if has_template if chat is None else chat:
        turns = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    tokens = inputs["input_ids"].shape[1]
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and tokens + settings["max_new_tokens"] > context:
        raise ConfigError(
            f"the prompt has {tokens} tokens and --max-new-tokens is {settings['max_new_tokens']}, but the model's context "
            f"holds {context}"
        )
    streamer = TextStreamer(tokenizer, skip_prompt=not echo, skip_special_tokens=True)
    model.generate(**inputs.to(model.device), streamer=streamer, **settings)
