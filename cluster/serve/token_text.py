"""The text and the bytes of single tokens, and log-probabilities as OpenAI's APIs write them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from epslots.errors import ConfigError
from epslots.generation.requests import TokenLogprobs
from epslots.generation.token_bytes import token_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LEAST = -9999.0
"""In place of minus infinity, which JSON has no number for."""


class TokenTexts:
    """The bytes and texts of a model's tokens. Made once, which takes a moment with a large vocabulary.

    Args:
        tokenizer: the checkpoint's.
        vocabulary: number of the model's token ids.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
        self._tokenizer = tokenizer
        try:
            self._words: tuple[bytes, ...] = token_bytes(tokenizer, vocabulary).words
        except ConfigError:  # a tokenizer of another kind: tokens are decoded one by one
            self._words = (b"",) * vocabulary

    def bytes(self, token: int) -> bytes:
        """The bytes that a token stands for; those of its name, if it is a special one."""
        if word := self._words[token]:
            return word
        # Its text behind another token: at the beginning, tokenizers drop a space.
        alone, twice = (self._tokenizer.decode([token] * times, skip_special_tokens=False) for times in (1, 2))
        return str(twice[len(alone) :]).encode()

    def text(self, token: int) -> str:
        """A token's text; where its bytes are a part of a character, these as OpenAI writes them: ``bytes:\\xe2\\x98``."""
        found = self.bytes(token)
        try:
            return found.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)


def chat_logprobs(texts: TokenTexts, found: Iterable[TokenLogprobs]) -> dict[str, Any]:
    """Log-probabilities as chats have them."""
    content = []
    for one in found:
        top = [_likely(texts, token, logprob) for token, logprob in one.top]
        content.append(_likely(texts, one.token, one.logprob) | {"top_logprobs": top})
    return {"content": content, "refusal": None}


def _likely(texts: TokenTexts, token: int, logprob: float) -> dict[str, Any]:
    return {"token": texts.text(token), "logprob": max(logprob, _LEAST), "bytes": list(texts.bytes(token))}


def prompt_logprobs(texts: TokenTexts, found: Iterable[TokenLogprobs], top: int) -> list[dict[str, Any] | None]:
    """Log-probabilities of a prompt's tokens as vLLM writes them; the first token has none.

    Args:
        found: of the tokens from the second on.
        top: likeliest tokens that were asked for; the token itself is always among the returned ones, with a rank of null if
            it isn't one of them.
    """
    written: list[dict[str, Any] | None] = [None]
    for one in found:
        own = {one.token: (one.logprob, None)}
        likely = {token: (logprob, rank) for rank, (token, logprob) in enumerate(one.top[:top], 1)}
        written.append(
            {
                str(token): {"logprob": max(logprob, _LEAST), "rank": rank, "decoded_token": texts.text(token)}
                for token, (logprob, rank) in (own | likely).items()
            }
        )
    return written


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
