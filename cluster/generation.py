"""The objects that users hold of their prompts: ``GenerationSettings``, ``Generation`` and ``Result``.

prompt and settings -> RequestChecker -> Request -> RequestRouter -> a rank -> TokenStream -> Generation -> Result
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import msgspec
from transformers import PreTrainedTokenizerBase

from cluster.errors import ClusterError, raised_anew
from cluster.token_stream import TextPieces, TokenStream
from epslots.errors import ConfigError, shown
from epslots.generation.requests import Reason
from epslots.generation.sampling import Sampling
from epslots.generation.text import TextStream, stop_strings

_ALL_TOKENS = 2**31  # more than any vocabulary has, and still a number that messages carry
_MOST_NEW_TOKENS = 2**63 - 1
MOST_STOP_TOKENS = 1024

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text; or token ids; or a mapping with one of these as "prompt", and settings of its own."""


class GenerationSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a prompt is continued. ``epslots.generation.sampling.Sampling`` says exactly what the sampling's numbers do.

    Attributes:
        max_new_tokens: stop after this many new tokens.
        n: continue the prompt this many times; the seeds of all but the first are derived from ``seed``.
        temperature: 0 takes the likeliest token; a higher value samples more evenly.
        top_k: sample from this many likeliest tokens; 0 = all.
        top_p: sample from the likeliest tokens with this probability mass together.
        min_p: sample from the tokens at least this share as likely as the likeliest.
        presence_penalty, frequency_penalty: lower the logits of tokens that the new text has, once or for each time.
        repetition_penalty: lowers the logits of tokens in prompt and new text; 1 = doesn't.
        logit_bias: number that is added to a token's logit, by token.
        seed: of the random numbers. They depend on the seed and the token's position alone.
        min_tokens: the text doesn't end, by end tokens or stop strings, before this many new tokens.
        stop: strings that end the text, and aren't part of it.
        stop_tokens: token ids that end the text; None = the end tokens of the checkpoint's generation configuration, and the
            tokenizer's end token.
        ignore_eos: go on after end tokens, up to ``max_new_tokens``.
        ignore_tokenizer_eos: don't end at the tokenizer's end token, as transformers' ``generate`` does.
        logprobs: return the log-probability of each new token, and of this many likeliest ones (up to 20).
        prompt_logprobs: the same for the prompt's tokens.
        json_schema: the text is JSON by this schema, an object or its text; ``True`` = any JSON object.
        regex: the text matches this regular expression as a whole.
        grammar: the text belongs to this grammar, in the notation of Lark.
        chat: wrap text in the checkpoint's chat template; None = if it has one.
    """

    max_new_tokens: int = 128
    n: int = 1
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    seed: int = 0
    min_tokens: int = 0
    stop: str | tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] | None = None
    ignore_eos: bool = False
    ignore_tokenizer_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    json_schema: str | bool | dict[str, Any] | None = None
    regex: str | None = None
    grammar: str | None = None
    chat: bool | None = False

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else self.stop

    @property
    def sampling(self) -> Sampling:
        return Sampling(
            temperature=self.temperature,
            top_k=min(self.top_k, _ALL_TOKENS),
            top_p=self.top_p,
            seed=self.seed,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=tuple(sorted((self.logit_bias or {}).items())),
            min_tokens=self.min_tokens,
        )


def read_settings(given: Mapping[str, Any], defaults: GenerationSettings | None = None) -> GenerationSettings:
    """Settings from names and values; unnamed ones are those of ``defaults``.

    Raises:
        ConfigError: a name is unknown, or a value isn't allowed.
    """
    names = GenerationSettings.__struct_fields__
    if unknown := sorted(set(given) - set(names), key=str):
        raise ConfigError(f"{', '.join(map(shown, unknown[:3]))}: no such setting; allowed: {', '.join(names)}")
    base = {} if defaults is None else msgspec.structs.asdict(defaults)
    try:
        settings = msgspec.convert({**base, **given}, GenerationSettings)
    except msgspec.ValidationError as error:
        raise ConfigError(f"settings {shown(dict(given))}: {error}") from error
    if not 1 <= settings.max_new_tokens <= _MOST_NEW_TOKENS:
        raise ConfigError(f"max_new_tokens={shown(settings.max_new_tokens)}; allowed: at least 1, up to 2**63 - 1")
    if len(settings.stop_tokens or ()) > MOST_STOP_TOKENS:
        raise ConfigError(f"stop_tokens has {len(settings.stop_tokens or ()):,}; allowed: at most {MOST_STOP_TOKENS:,}")
    stop_strings(settings.stops)
    _ = settings.sampling  # checks its own values
    return settings


@dataclass(frozen=True)
class Result:
    """A prompt's continuation, or the error in its place.

    Attributes:
        index: the prompt's position among those of one ``generate`` call; 0 for ``submit``.
        prompt: as given.
        tokens: new token ids, up to the one that ended the text or completed a stop string.
        text: of the new tokens, without special tokens and without the stop string; None if the checkpoint has no tokenizer.
        reason: "stop" (end token or stop string), "length" (``max_new_tokens``), "cancelled", or "error".
        error: the error's message, for the reason "error".
    """

    index: int
    prompt: Prompt
    tokens: tuple[int, ...]
    text: str | None
    reason: Reason
    error: str | None = None


class Generation:
    """A prompt that is being continued. Iterate it for its text, piece by piece, from the beginning, as often as you like.

    The request is cancelled, and its place in the queue free again, when it has lost its last reader: when the last open
    iterator was closed or dropped (as by leaving a loop over it) and no call waits for the result; or when this object is
    dropped. As a context manager, it is cancelled at the end of the block unless it is done.

    Args:
        stop: the request's stop strings.
        stream: the request's tokens.
        cancel: cancels the request; called from anywhere, finalizers included.
        check_process: raises ClusterError in a forked child, which would wait for ever.
    """

    def __init__(
        self,
        index: int,
        prompt: Prompt,
        *,
        stop: Sequence[str],
        tokenizer: PreTrainedTokenizerBase | None,
        stream: TokenStream,
        cancel: Callable[[], None],
        check_process: Callable[[], None],
    ) -> None:
        self.index, self.prompt = index, prompt
        self._stop, self._tokenizer = tuple(stop), tokenizer
        self._stream, self._cancel, self._check_process = stream, cancel, check_process
        weakref.finalize(self, stream.cancel_unless_done, cancel).atexit = False

    @property
    def done(self) -> bool:
        """Whether the result is there."""
        return self._stream.done

    def cancel(self) -> None:
        """End the request with the reason "cancelled" and its tokens so far; does nothing if it is done.

        Raises:
            ClusterError: this is a forked child.
        """
        self._check_process()
        self.give_up()

    close = cancel

    def give_up(self) -> None:
        """As ``cancel``, but allowed in a forked child, where it does nothing."""
        self._stream.cancel_unless_done(self._cancel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.give_up()

    def result(self, timeout_s: float | None = None) -> Result:
        """Wait for the result.

        Raises:
            ClusterError: the cluster can't go on; or this is a forked child.
            TimeoutError: it isn't there in time; the request goes on.
        """
        self._check_process()
        stream, this_call = self._stream, object()
        stream.users.add(this_call)
        try:
            with stream.news:
                if not stream.news.wait_for(lambda: stream.done, timeout_s):
                    raise TimeoutError(f"the prompt isn't done after {timeout_s:g} s")
        finally:
            stream.users.discard(this_call)
        if stream.failure is not None:
            raise raised_anew(stream.failure)
        assert stream.reason is not None
        return Result(self.index, self.prompt, tuple(stream.tokens), self._text(), stream.reason, stream.error)

    def _text(self) -> str | None:
        if self._tokenizer is None:
            return None
        tokens = self._stream.tokens
        if self._stop:
            text_stream = TextStream(self._tokenizer, self._stop)
            return text_stream.push(tokens) + text_stream.finish()
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        assert isinstance(text, str)
        return text

    def __iter__(self) -> TextPieces:
        """Pieces of text, as soon as they are certain.

        Raises (the iterator, when asked for a piece):
            ConfigError: the checkpoint has no tokenizer.
            ClusterError: the cluster can't go on; the request ended with an error; or this is a forked child.
        """
        return TextPieces(self, self._pieces(), self._stream, self._cancel)

    def _pieces(self) -> Iterator[str]:
        if self._tokenizer is None:
            raise ConfigError("the checkpoint has no tokenizer, so there is no text; use result().tokens")
        text_stream = TextStream(self._tokenizer, self._stop)
        for tokens in self._portions():
            if piece := text_stream.push(tokens):
                yield piece
        if piece := text_stream.finish():
            yield piece

    def _portions(self) -> Iterator[list[int]]:
        """The tokens, in the portions in which they come."""
        stream, taken = self._stream, 0
        while True:
            self._check_process()
            with stream.news:
                stream.news.wait_for(lambda: len(stream.tokens) > taken or stream.done)  # noqa: B023 - called here
                portion, done = stream.tokens[taken:], stream.done
            taken += len(portion)
            yield portion
            if done:
                break
        if stream.failure is not None:
            raise raised_anew(stream.failure)
        if stream.reason == "error":
            raise ClusterError(stream.error)
