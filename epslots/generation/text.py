"""Text to tokens, and tokens to text as they come."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from epslots.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
# SentencePiece's token for a single byte of a character that it has no token for.
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# Tokens that text waits for at the most, to be certain. Whole characters come much earlier; bytes that make none, never.
_WAIT_TOKENS = 64


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
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
    if tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):  # what transformers makes of a folder without files
        raise ConfigError(f"{path} has no tokenizer: there is no vocabulary")
    return tokenizer


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str, *, chat: bool | None = None) -> list[int]:
    """A prompt's tokens.

    Args:
        chat: whether to wrap the text in the tokenizer's chat template, as what a user says; None: if it has one.

    Raises:
        ConfigError: the text is none, empty or has no tokens; there is no chat template, or it refuses the text.
    """
    if not isinstance(text, str) or not text:
        raise ConfigError(f"a prompt of {text!r}; allowed: text that isn't empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"a prompt of {text!r}: character {error.start} is half of a pair, which no text has") from error
    has_template = getattr(tokenizer, "chat_template", None) is not None
    if chat and not has_template:
        raise ConfigError("chat=True: this tokenizer has no chat template; allowed: False or None")
    if has_template if chat is None else chat:
        from jinja2 import TemplateError

        try:
            turns = [{"role": "user", "content": text}]
            inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
        except TemplateError as error:
            raise ConfigError(f"the chat template refuses the prompt: {error}") from error
    else:
        inputs = tokenizer(text, return_token_type_ids=False)
    tokens: list[int] = inputs["input_ids"]
    if not tokens:
        raise ConfigError(f"a prompt of {text!r} has no tokens; at least one is needed")
    return tokens


def stop_strings(given: Iterable[str]) -> tuple[str, ...]:
    """The strings that end an output.

    Raises:
        ConfigError: one is empty, or no string.
    """
    allowed = "allowed: strings of at least one character each, in a list or a tuple"
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        raise ConfigError(f"stop={given!r}; {allowed}")
    found = tuple(given)
    if not all(isinstance(stop, str) and stop for stop in found):
        raise ConfigError(f"stop={given!r}; {allowed}")
    return found


class TextStream:
    """The text of tokens that come one by one, up to a stop string.

    All pieces together are ``tokenizer.decode`` of all tokens, special ones left out; with a stop string, what of it is before
    that. A piece is certain: no later token changes it. So characters and stop strings of which only a beginning is there are
    held back. (What a tokenizer's ``clean_up_tokenization_spaces`` would take back later can't be known, and stays.)

    Only the last few tokens are decoded, twice: alone, and with the new ones. The difference is the new text: spaces and
    characters that span tokens come out right. As in text-generation-inference, ``Model.decode_token``:
    https://github.com/huggingface/text-generation-inference/blob/main/server/text_generation_server/models/model.py

    Attributes:
        stopped_after: how many tokens it took to complete a stop string; None while there is none. Tokens after that have no
            effect. The stop string is that which ends first, and of those that end together the longest.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Iterable[str] = ()) -> None:
        self.stopped_after: int | None = None
        self._tokenizer = tokenizer
        self._stops = stop_strings(stop)
        self._special = frozenset(tokenizer.all_special_ids)
        self._count = 0
        # Tokens whose text is out (the context), then those that wait; and the context's text.
        self._window: list[int] = []
        self._read = 0
        self._context = ""
        # Certain text that may be the beginning of a stop string.
        self._held = ""

    @property
    def stopped(self) -> bool:
        return self.stopped_after is not None

    def push(self, tokens: Iterable[int]) -> str:
        """Take the next tokens; returns the text that has become certain."""
        return "".join([self._push(token) for token in tokens])

    def finish(self) -> str:
        """The text that was held back, when no token follows."""
        rest = self._held + self._waiting()
        self._held, self._context = "", self._decode(self._window)
        return rest

    def _push(self, token: int) -> str:
        if self.stopped:
            return ""
        self._count += 1
        name = self._tokenizer.convert_ids_to_tokens(token)
        if name is None or (token in self._special and not self._decode([token])):
            return ""  # padding of the vocabulary, or left out
        self._window.append(token)
        waiting = self._waiting()
        # A stop string may be found in what isn't certain: nothing follows then.
        text = self._held + waiting.rstrip(_UNFINISHED)
        if (start := self._stop_starts(text)) is not None:
            self.stopped_after, self._held, self._window, self._context = self._count, "", [], ""
            return text[:start]
        # Bytes become characters all together when the last is there, and else none of them.
        certain = waiting and not waiting.endswith(_UNFINISHED) and not _BYTE.fullmatch(name)
        if not certain and len(self._window) - self._read <= _WAIT_TOKENS:
            return ""
        del self._window[: self._read]
        self._read, self._context = len(self._window), self._decode(self._window)
        text = self._held + waiting
        begins = self._stop_begins(text)
        self._held = text[begins:]
        return text[:begins]

    def _decode(self, tokens: list[int]) -> str:
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        assert isinstance(text, str)
        return text

    def _waiting(self) -> str:
        """Text of the tokens after the context."""
        return self._decode(self._window)[len(self._context) :]

    def _stop_starts(self, text: str) -> int | None:
        """Where the stop string starts that ends first."""
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        return min(found)[1] if found else None

    def _stop_begins(self, text: str) -> int:
        """Where the end of ``text`` may be the beginning of a stop string; its length if nowhere."""
        longest = max(map(len, self._stops), default=0)
        for start in range(max(0, len(text) - longest + 1), len(text)):
            if any(stop.startswith(text[start:]) for stop in self._stops):
                return start
        return len(text)
