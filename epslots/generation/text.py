"""Text to tokens, and tokens to text as they come."""

from __future__ import annotations

import codecs
import contextlib
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from epslots.errors import ConfigError, shown
from epslots.generation.chat_template import Chat, find_template, render
from epslots.generation.token_bytes import byte_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_Utf8 = codecs.getincrementaldecoder("utf-8")
# SentencePiece's token for a single byte of a character that has no token.
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# Tokens that uncertain text waits for, at most. Whole characters come much earlier; bytes that form none never do.
_WAIT_TOKENS = 64

MOST_STOP_STRINGS = 64
MOST_STOP_CHARS = 256
"""All stop strings are searched after every token, in the one thread that serves all requests."""
# Text up to this length is always tokenized, in some hundredths of a second: the error then states the number of tokens, which
# says more than characters; tokenizers that drop spaces make few tokens of much text.
_SMALL_TEXT_CHARS = 2**16
# Ordinary text has four characters a token. Of longer text a part is tokenized first, which refuses most text that can't fit.
_PART_CHARS_PER_TOKEN = 16


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The checkpoint's own tokenizer.

    Raises:
        ConfigError: it has none, or one that can't be read: damaged, newer than the libraries, or with code of its own.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    with _refusing(f"{path} has no tokenizer that transformers can load"):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        no_words = tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens)
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    if no_words:  # transformers returns such a tokenizer for a folder without files
        raise ConfigError(f"{path} has no tokenizer: there is no vocabulary")
    return tokenizer


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    chat: bool | None = None,
    most_tokens: int | None = None,
    special_tokens: bool = True,
) -> list[int]:
    """A prompt's tokens.

    Args:
        tokenizer: the checkpoint's.
        text: the prompt.
        chat: whether to wrap the text in the tokenizer's chat template, as a user's message; None: if it has one.
        most_tokens: tokens that fit, None for any. Text that certainly has more is refused early; somewhat more than fit may
            be returned.
        special_tokens: add the tokenizer's special tokens, as the beginning of the text, unless a chat template does.

    Raises:
        ConfigError: the text is empty, too long, no text or has no tokens; there is no chat template, or it is broken, or
            refuses the text.
    """
    if not isinstance(text, str) or not text:
        raise ConfigError(f"a prompt of {shown(text)}; allowed: text that isn't empty")
    most_tokens = None if most_tokens is None else max(0, most_tokens)
    most_chars = None if most_tokens is None else max(_SMALL_TEXT_CHARS, most_tokens * _longest_token(tokenizer))
    if most_chars is not None and len(text) > most_chars:
        raise ConfigError(
            f"a prompt of {len(text):,} characters; at most {most_chars:,} are read where {most_tokens:,} tokens fit"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"a prompt of {shown(text)}: character {error.start} is half of a pair, which no text has"
        ) from error
    template = None if chat is False else find_template(tokenizer)
    if chat and template is None:
        raise ConfigError(
            "chat=True: this tokenizer has no chat template; allowed: False or None (on the command line --no-chat)"
        )
    with _refusing("the tokenizer fails on the prompt"):
        wrapped = text if template is None else render(tokenizer, template, Chat.of_user(text), most_chars=most_chars)
        tokens = _encode(tokenizer, wrapped, add_special_tokens=special_tokens and template is None, most_tokens=most_tokens)
    if not tokens:
        raise ConfigError(f"a prompt of {shown(text)} has no tokens; at least one is needed")
    return tokens


def encode_chat(tokenizer: PreTrainedTokenizerBase, chat: Chat, *, most_tokens: int | None = None) -> list[int]:
    """A chat's tokens.

    Args:
        tokenizer: the checkpoint's.
        chat: the conversation.
        most_tokens: tokens that fit, None for any. Text that certainly has more is refused early; somewhat more than fit may
            be returned.

    Raises:
        ConfigError: there is no chat template, or it is broken, or refuses the chat; the chat is too long, or has no tokens.
    """
    template = chat.template or find_template(tokenizer)
    if template is None:
        raise ConfigError("this tokenizer has no chat template; allowed: prompts that are no chats, or a template of your own")
    most_tokens = None if most_tokens is None else max(0, most_tokens)
    most_chars = None if most_tokens is None else max(_SMALL_TEXT_CHARS, most_tokens * _longest_token(tokenizer))
    with _refusing("the tokenizer fails on the chat"):
        text = render(tokenizer, template, chat, most_chars=most_chars)
        tokens = _encode(tokenizer, text, add_special_tokens=False, most_tokens=most_tokens)
    if not tokens:
        raise ConfigError("the chat template makes no tokens of these messages; at least one is needed")
    return tokens


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool, most_tokens: int | None) -> list[int]:
    def ids(part: str) -> list[int]:
        found = tokenizer(part, add_special_tokens=add_special_tokens, return_token_type_ids=False, verbose=False)
        return list(found["input_ids"])

    if most_tokens is not None:
        part = text[: max(_SMALL_TEXT_CHARS, most_tokens * _PART_CHARS_PER_TOKEN)]
        if len(part) < len(text) and (count := len(ids(part))) > 2 * most_tokens:
            raise ConfigError(
                f"a prompt of {len(text):,} characters, of which the first {len(part):,} alone have {count:,} tokens; "
                f"{most_tokens:,} tokens fit"
            )
    return ids(text)


@lru_cache(maxsize=4)
def _longest_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Characters of the longest token. No token stands for more, except for characters that a normalizer drops."""
    return max(map(len, tokenizer.get_vocab()))


@contextlib.contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Turn all errors of tokenizers into ConfigError: those in Rust raise plain Exception, and panic with a BaseException."""
    try:
        yield
    except (ConfigError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"{what} ({type(error).__name__}: {reason})") from error


def stop_strings(given: Iterable[str]) -> tuple[str, ...]:
    """The strings that end an output.

    Raises:
        ConfigError: one is empty, too long or no string; or there are too many.
    """
    allowed = (
        f"allowed: strings of at least one character each and at most {MOST_STOP_CHARS}, in a list or a tuple of at most "
        f"{MOST_STOP_STRINGS}"
    )
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        raise ConfigError(f"stop={shown(given)}; {allowed}")
    found = tuple(islice(given, MOST_STOP_STRINGS + 1))
    if len(found) > MOST_STOP_STRINGS or not all(isinstance(stop, str) and 0 < len(stop) <= MOST_STOP_CHARS for stop in found):
        raise ConfigError(f"stop={shown(given)}; {allowed}")
    return found


class TextStream:
    """The text of tokens that come one by one, up to a stop string.

    All pieces together are ``tokenizer.decode`` of all tokens without special ones, up to the first stop string. A piece is
    certain: no later token changes it. So incomplete characters and possible beginnings of stop strings are held back. (Text
    that a tokenizer's ``clean_up_tokenization_spaces`` would remove later can't be known, and stays.)

    Without stop strings, tokens of a byte-level vocabulary are looked up, and their bytes read as UTF-8. Else only the last
    few tokens are decoded, twice: alone, and with the new ones. The difference is the new text: spaces and characters that
    span tokens come out right. As in text-generation-inference, ``Model.decode_token``:
    https://github.com/huggingface/text-generation-inference/blob/main/server/text_generation_server/models/model.py

    Args:
        stop: the stop strings.
        min_tokens: a stop string that is complete within this many tokens is text like any other, as in vLLM.
        special_tokens: special tokens are a part of the text.

    Attributes:
        tokens: number of tokens so far, without those after a stop string.
        stopped_after: number of tokens until a stop string was complete; None without one. Later tokens have no effect. The
            stop string is the one that ends first, and of those that end together the longest.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: Iterable[str] = (),
        min_tokens: int = 0,
        *,
        special_tokens: bool = False,
    ) -> None:
        self.tokens = 0
        self.stopped_after: int | None = None
        self._min_tokens = min_tokens
        self._tokenizer = tokenizer
        self._stops = sorted(stop_strings(stop))
        self._words: tuple[bytes, ...] | None = None
        """Bytes by token id, where texts are their tokens' bytes in a row."""
        if not self._stops and (vocabulary := byte_vocabulary(tokenizer)) is not None:
            self._words = vocabulary.all if special_tokens else vocabulary.said
            self._utf8 = _Utf8("replace")
        self._first_characters = {stop[0] for stop in self._stops}
        self._longest_stop = max(map(len, self._stops), default=0)
        self._skips_special = not special_tokens
        self._special = frozenset(tokenizer.all_special_ids)
        # Tokens whose text is returned (the context), then those that wait; and the context's text.
        self._recent: list[int] = []
        self._read = 0
        self._context = ""
        # Certain text that may be the beginning of a stop string.
        self._held = ""
        # Characters of the text that isn't returned yet in which no stop string counts: those of the first ``min_tokens``.
        self._exempt = 0

    @property
    def stopped(self) -> bool:
        return self.stopped_after is not None

    def push(self, tokens: Iterable[int]) -> str:
        """Add the next tokens; returns the text that has become certain."""
        new = list(tokens)
        if (words := self._words) is not None:
            self.tokens += len(new)
            return self._utf8.decode(b"".join([words[token] for token in new if token < len(words)]))
        if not self._stops and len(new) > 1 and (text := self._push_together(new)) is not None:
            return text
        return "".join([self._push(token) for token in new])

    def finish(self) -> str:
        """The text that was held back; no token follows."""
        if self._words is not None:
            return self._utf8.decode(b"", final=True)
        rest = self._held + self._waiting()
        self._held, self._context = "", self._decode(self._recent)
        return rest

    def _push_together(self, tokens: list[int]) -> str | None:
        """Add tokens at the price of one, where no stop string is looked for; None if some of their text isn't certain."""
        names = self._tokenizer.convert_ids_to_tokens(tokens)
        said = [(token, name) for token, name in zip(tokens, names, strict=True) if self._is_said(token, name)]
        if not said or _BYTE.fullmatch(said[-1][1]):
            return None
        recent = self._recent + [token for token, _ in said]
        text = self._decode(recent)[len(self._context) :]
        if not text or text.endswith(_UNFINISHED):
            return None
        self.tokens += len(tokens)
        self._recent = recent[self._read :]
        self._read, self._context = len(self._recent), self._decode(self._recent)
        return text

    def _is_said(self, token: int, name: str | None) -> bool:
        """Whether a token has text: it is neither padding of the vocabulary nor a special token."""
        return name is not None and not (token in self._special and not self._decode([token]))

    def _push(self, token: int) -> str:
        if self.stopped:
            return ""
        self.tokens += 1
        name = self._tokenizer.convert_ids_to_tokens(token)
        if not self._is_said(token, name):
            return ""
        self._recent.append(token)
        waiting = self._waiting()
        # A stop string may lie in uncertain text: nothing follows then.
        text = self._held + waiting.rstrip(_UNFINISHED)
        if self.tokens <= self._min_tokens:
            self._exempt = len(text)
        elif (start := self._stop_starts(text)) is not None:
            self.stopped_after, self._held, self._recent, self._context = self.tokens, "", [], ""
            return text[:start]
        # Bytes become characters together when the last one is there, and not before.
        certain = waiting and not waiting.endswith(_UNFINISHED) and not _BYTE.fullmatch(name)
        if not certain and len(self._recent) - self._read <= _WAIT_TOKENS:
            return ""
        del self._recent[: self._read]
        self._read, self._context = len(self._recent), self._decode(self._recent)
        text = self._held + waiting
        begins = self._stop_begins(text)
        self._held, self._exempt = text[begins:], max(0, self._exempt - begins)
        return text[:begins]

    def _decode(self, tokens: list[int]) -> str:
        text = self._tokenizer.decode(tokens, skip_special_tokens=self._skips_special)
        assert isinstance(text, str)
        return text

    def _waiting(self) -> str:
        """Text of the tokens after the context."""
        return self._decode(self._recent)[len(self._context) :]

    def _stop_starts(self, text: str) -> int | None:
        """The start of the stop string that ends first, behind the exempt characters; None without one."""
        found = []
        for stop in self._stops:
            if (start := text.find(stop, max(0, self._exempt - len(stop) + 1))) >= 0:
                found.append((start + len(stop), start))
        return min(found)[1] if found else None

    def _stop_begins(self, text: str) -> int:
        """The place in ``text`` from which a stop string may begin; its length if none may."""
        for start in range(max(0, len(text) - self._longest_stop + 1), len(text)):
            if text[start] in self._first_characters:
                rest = text[start:]
                following = self._stops[bisect_left(self._stops, rest) :][:1]  # sorted: before all others that begin like this
                if following and following[0].startswith(rest):
                    return start
        return len(text)
