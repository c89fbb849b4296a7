"""The text and the bytes of single tokens, and log-probabilities as OpenAI's APIs write them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from epslots.generation.requests import TokenLogprobs

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_LEAST = -9999.0
"""In place of minus infinity, which JSON has no number for."""


def _byte_of_character() -> dict[str, int]:
    """The byte that each character stands for in the tokens of byte-level BPE (GPT-2, ``bytes_to_unicode``)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


_BYTE_OF = _byte_of_character()


class TokenTexts:
    """The bytes and texts of a tokenizer's tokens, each found once. For one thread."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._bytes: dict[int, bytes] = {}

    def bytes(self, token: int) -> bytes:
        """The bytes that a token stands for; those of tokens without a text are none."""
        if token not in self._bytes:
            self._bytes[token] = self._find(token)
        return self._bytes[token]

    def text(self, token: int) -> str:
        """A token's text; where its bytes are a part of a character, these as OpenAI writes them: ``bytes:\\xe2\\x98``."""
        found = self.bytes(token)
        try:
            return found.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)

    def _find(self, token: int) -> bytes:
        name = self._tokenizer.convert_ids_to_tokens(token)
        if name is None:
            return b""  # padding of the vocabulary
        if (byte := _BYTE.fullmatch(name)) is not None:
            return bytes([int(byte[1], 16)])
        # As it stands behind another token: at the beginning, tokenizers drop a space.
        alone = self._tokenizer.decode([token], skip_special_tokens=False)
        twice = self._tokenizer.decode([token, token], skip_special_tokens=False)
        if "\N{REPLACEMENT CHARACTER}" in twice and all(character in _BYTE_OF for character in name):
            return bytes(_BYTE_OF[character] for character in name)
        return twice[len(alone) :].encode()


def chat_logprobs(texts: TokenTexts, found: Iterable[TokenLogprobs]) -> dict[str, Any]:
    """Log-probabilities as chats have them."""
    content = []
    for one in found:
        top = [_likely(texts, token, logprob) for token, logprob in one.top]
        content.append(_likely(texts, one.token, one.logprob) | {"top_logprobs": top})
    return {"content": content, "refusal": None}


def _likely(texts: TokenTexts, token: int, logprob: float) -> dict[str, Any]:
    return {"token": texts.text(token), "logprob": max(logprob, _LEAST), "bytes": list(texts.bytes(token))}


class CompletionLogprobsWriter:
    """Writes log-probabilities as completions have them, portion by portion: offsets go on.

    Args:
        texts: of the tokens.
        top: likeliest tokens that were asked for; the token itself is always among the returned ones.
    """

    def __init__(self, texts: TokenTexts, top: int) -> None:
        self._texts, self._top = texts, top
        self._offset = 0

    def write(self, found: Sequence[TokenLogprobs], *, first: int | None = None) -> dict[str, Any]:
        """The next tokens.

        Args:
            found: of the tokens.
            first: a token before them without a log-probability: the prompt's first one.
        """
        tokens: list[str] = []
        logprobs: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        if first is not None:
            tokens.append(self._texts.text(first))
            logprobs.append(None)
            tops.append(None)
        for one in found:
            likely = one.top[: self._top]
            own = {self._texts.text(one.token): max(one.logprob, _LEAST)}
            tokens.append(self._texts.text(one.token))
            logprobs.append(max(one.logprob, _LEAST))
            tops.append({self._texts.text(token): max(logprob, _LEAST) for token, logprob in likely} | own)
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token)
        return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}
