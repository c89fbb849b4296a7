"""A prompt on its way through the cluster: what is asked for, what is refused, and what comes back.

prompt and settings -> Checker.request -> epslots' Request -> ... -> Arrivals of tokens -> Generation -> Result
"""

from __future__ import annotations

import copy
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Self

import msgspec
from transformers import PreTrainedTokenizerBase

from cluster.errors import ClusterError, raised_anew
from cluster.messages.rank import Loaded
from epslots.engine.end_tokens import tokenizer_end_tokens
from epslots.engine.requests import Reason, Request
from epslots.engine.sampling import Sampling
from epslots.engine.text import TextStream, encode_prompt, stop_strings
from epslots.errors import ConfigError, shown

_ALL = 2**31  # more tokens than any vocabulary has, and still a number that messages carry
_MOST_NEW_TOKENS = 2**63 - 1
MOST_STOP_TOKENS = 1024

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text; or token ids; or one of these as "prompt" with any settings of its own."""


class GenerationSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a prompt is continued.

    Attributes:
        max_new_tokens: stop after this many tokens.
        temperature: 0 takes the likeliest token; above, samples: the higher, the more evenly.
        top_k: sample from this many tokens; 0 = all.
        top_p: sample from this much probability mass.
        seed: of the random numbers, which depend on it and on a token's position alone.
        stop: strings that end the text; not part of it.
        stop_tokens: token ids that end the text; None = the checkpoint's: those of its generation configuration, and the
            tokenizer's end token.
        ignore_tokenizer_eos: leave the tokenizer's end token out of these, as transformers' ``generate`` does.
        chat: wrap text in the checkpoint's chat template; None = if it has one.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: str | tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] | None = None
    ignore_tokenizer_eos: bool = False
    chat: bool | None = False

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else self.stop

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, min(self.top_k, _ALL), self.top_p, self.seed)


def read_settings(given: Mapping[str, Any], defaults: GenerationSettings | None = None) -> GenerationSettings:
    """Settings by name, over defaults.

    Raises:
        ConfigError: a name is unknown, or a value not one of those allowed.
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
    _ = settings.sampling  # which checks itself
    return settings


@dataclass(frozen=True)
class Result:
    """What came of a prompt.

    Attributes:
        index: its number among the prompts of one ``generate``; 0 from ``submit``.
        prompt: as given.
        tokens: new tokens, up to one that ended the text, or completed a stop string.
        text: of the new tokens, without special ones and what a stop string begins; None if the checkpoint has no tokenizer.
        reason: "stop" (end token or stop string), "length" (``max_new_tokens``), "cancelled", or "error".
        error: what was wrong, if that is the reason.
    """

    index: int
    prompt: Prompt
    tokens: tuple[int, ...]
    text: str | None
    reason: Reason
    error: str | None = None


class Arrivals:
    """What has come of a request: written by the supervisor's thread, read by any.

    Args:
        on_done: called in that thread when the end is known.

    Attributes:
        users: the iterators and waiting calls that want the rest. No lock guards it, because iterators also end in finalizers.
    """

    def __init__(self, on_done: Callable[[], None]) -> None:
        self._on_done = on_done
        self.news = threading.Condition()
        self.tokens: list[int] = []
        self.reason: Reason | None = None
        self.error: str | None = None
        self.failure: ClusterError | None = None
        self.users: set[object] = set()

    @property
    def done(self) -> bool:
        """Whether the end is known."""
        return self.reason is not None or self.failure is not None

    def arrive(self, tokens: Sequence[int], reason: Reason | None, error: str | None) -> None:
        """More tokens; and why there will be no others, if so."""
        with self.news:
            self.tokens += tokens
            self.reason, self.error = reason, error
            self.news.notify_all()
        if reason is not None:
            self._on_done()

    def fail(self, error: ClusterError) -> None:
        """The cluster can't go on."""
        with self.news:
            self.failure = error
            self.news.notify_all()
        self._on_done()


class Generation:
    """A prompt that is being continued. Iterate it for pieces of text as they come, from the first, once or several times.

    A request that has lost its last reader is cancelled, and its place in the queue is free again: when the last open iterator
    is closed or dropped (a loop over it was left) and no call waits for the result; or when the generation itself is dropped.
    As a context manager, it is cancelled at the end of the block unless it is done.

    Args:
        arrivals: what the dispatcher writes to.
        cancel: gives the request up; called from anywhere, finalizers included.
        check_process: raises ClusterError in a forked child, which would wait for ever.
    """

    def __init__(
        self,
        index: int,
        prompt: Prompt,
        *,
        stop: Sequence[str],
        tokenizer: PreTrainedTokenizerBase | None,
        arrivals: Arrivals,
        cancel: Callable[[], None],
        check_process: Callable[[], None],
    ) -> None:
        self.index, self.prompt = index, prompt
        self._stop, self._tokenizer = tuple(stop), tokenizer
        self._there, self._cancel, self._check_process = arrivals, cancel, check_process
        weakref.finalize(self, _cancel_unless_done, arrivals, cancel).atexit = False

    @property
    def done(self) -> bool:
        """Whether the end is known."""
        return self._there.done

    def cancel(self) -> None:
        """Give it up: it ends with the reason "cancelled" and what there is. Once it is done, nothing happens.

        Raises:
            ClusterError: this is a forked child.
        """
        self._check_process()
        self.give_up()

    close = cancel

    def give_up(self) -> None:
        """As ``cancel``, but a forked child, which has nothing to give up, is not refused."""
        _cancel_unless_done(self._there, self._cancel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.give_up()

    def result(self, timeout_s: float | None = None) -> Result:
        """Wait for the end.

        Raises:
            ClusterError: the cluster can't go on; or this is a forked child.
            TimeoutError: it isn't done by then, and goes on.
        """
        self._check_process()
        there, this_call = self._there, object()
        there.users.add(this_call)
        try:
            with there.news:
                if not there.news.wait_for(lambda: there.done, timeout_s):
                    raise TimeoutError(f"the prompt isn't done after {timeout_s:g} s")
        finally:
            there.users.discard(this_call)
        if there.failure is not None:
            raise raised_anew(there.failure)
        assert there.reason is not None
        return Result(self.index, self.prompt, tuple(there.tokens), self._text(), there.reason, there.error)

    def _text(self) -> str | None:
        if self._tokenizer is None:
            return None
        tokens = self._there.tokens
        if self._stop:
            stream = TextStream(self._tokenizer, self._stop)
            return stream.push(tokens) + stream.finish()
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        assert isinstance(text, str)
        return text

    def __iter__(self) -> Pieces:
        """Pieces of text, as they become certain.

        Raises (the iterator, when asked for a piece):
            ConfigError: the checkpoint has no tokenizer.
            ClusterError: the cluster can't go on; the request was refused or could not be served; or this is a forked child.
        """
        return Pieces(self, self._read(), self._there, self._cancel)

    def _read(self) -> Iterator[str]:
        if self._tokenizer is None:
            raise ConfigError("the checkpoint has no tokenizer, so there is no text; use result().tokens")
        stream = TextStream(self._tokenizer, self._stop)
        for seen in self._arrivals():
            if piece := stream.push(seen):
                yield piece
        if piece := stream.finish():
            yield piece

    def _arrivals(self) -> Iterator[list[int]]:
        """Tokens in the portions in which they come."""
        there, taken = self._there, 0
        while True:
            self._check_process()
            with there.news:
                there.news.wait_for(lambda: len(there.tokens) > taken or there.done)  # noqa: B023 - called here
                portion, done = there.tokens[taken:], there.done
            taken += len(portion)
            yield portion
            if done:
                break
        if there.failure is not None:
            raise raised_anew(there.failure)
        if there.reason == "error":
            raise ClusterError(there.error)


class Pieces(Iterator[str]):
    """One reader of a generation's text.

    Attributes:
        close: read no more; any thread may call it. Once the end is known, or if others read on, the request isn't cancelled.
    """

    def __init__(self, generation: Generation, pieces: Iterator[str], arrivals: Arrivals, cancel: Callable[[], None]) -> None:
        self._generation, self._pieces = generation, pieces  # which isn't dropped before its last reader
        this_reader = object()
        arrivals.users.add(this_reader)
        self.close = weakref.finalize(self, _leave, arrivals, this_reader, cancel)
        self.close.atexit = False

    def __next__(self) -> str:
        if not self.close.alive:
            raise StopIteration
        try:
            return next(self._pieces)
        except BaseException:  # the end, a failure or an interrupt: there is no more to be had from it
            self.close()
            raise


def _leave(arrivals: Arrivals, reader: object, cancel: Callable[[], None]) -> None:
    """A reader has gone."""
    arrivals.users.discard(reader)
    if not arrivals.users:
        _cancel_unless_done(arrivals, cancel)


def _cancel_unless_done(arrivals: Arrivals, cancel: Callable[[], None]) -> None:
    if not arrivals.done:
        cancel()


class Checker:
    """Turns prompts into requests, or says what is wrong with them. For any thread.

    Args:
        loaded: what the model takes.
        tokenizer: the checkpoint's, if it can be loaded.
        problem: why it can't.
    """

    def __init__(self, loaded: Loaded, tokenizer: PreTrainedTokenizerBase | None, problem: str = "") -> None:
        self._loaded, self._problem = loaded, f" ({problem})" if problem else ""
        self._numbers = itertools.count()
        # Those in Rust work for several threads at once, unless one sets padding or truncation meanwhile: nobody else has the
        # copy. Those in Python keep a state while they work.
        in_rust = getattr(tokenizer, "is_fast", False)
        self._tokenizer = copy.deepcopy(tokenizer) if in_rust else tokenizer
        self._tokenizing: AbstractContextManager[object] = nullcontext() if in_rust else threading.Lock()
        self._tokenizer_ends = tokenizer_end_tokens(tokenizer, loaded.vocabulary)

    def request(self, prompt: Prompt, settings: GenerationSettings) -> tuple[Request, GenerationSettings]:
        """The request for a prompt, and its own settings. Refuses what is too long before it is looked at.

        Raises:
            ConfigError: saying what was given and what is allowed.
        """
        if isinstance(prompt, Mapping):
            own = dict(prompt)
            if "prompt" not in own:
                raise ConfigError(f'a prompt with settings needs "prompt", but has only {shown(sorted(own, key=str))}')
            prompt = own.pop("prompt")
            settings = read_settings(own, settings)
        if settings.stops and self._tokenizer is None:
            raise ConfigError(f"stop: the checkpoint has no tokenizer; use stop_tokens{self._problem}")
        loaded, new = self._loaded, settings.max_new_tokens
        if isinstance(prompt, str):
            tokens = self._encode(prompt, settings)
        else:
            self._check_length(prompt, new)
            tokens = _token_ids(prompt)
        self._check_length(tokens, new)
        wrong = next((token for token in tokens if not 0 <= token < loaded.vocabulary), None)
        if wrong is not None:
            raise ConfigError(f"the prompt has token {shown(wrong)}; allowed: 0 to {loaded.vocabulary - 1}")
        ends = self._ends(settings)
        return Request(str(next(self._numbers)), tuple(tokens), new, ends, settings.sampling), settings

    def _check_length(self, prompt: object, new: int) -> None:
        length = len(prompt) if isinstance(prompt, Sequence) else 0
        size = f"the prompt has {length} tokens and max_new_tokens is {new}"
        loaded = self._loaded
        if loaded.context is not None and length + new > loaded.context:
            raise ConfigError(f"{size}, but the model's context holds {loaded.context}")
        if length + new - 1 > loaded.capacity:
            raise ConfigError(
                f"{size}, but a rank's cache holds {loaded.capacity}; shorten one of them, or give the cluster a larger "
                f"kv_tokens"
            )

    def _encode(self, text: str, settings: GenerationSettings) -> Sequence[int]:
        if self._tokenizer is None:
            raise ConfigError(f"the checkpoint has no tokenizer; give prompts as token ids{self._problem}")
        loaded = self._loaded
        room = loaded.capacity + 1 if loaded.context is None else min(loaded.context, loaded.capacity + 1)
        with self._tokenizing:
            return encode_prompt(self._tokenizer, text, chat=settings.chat, most_tokens=room - settings.max_new_tokens)

    def _ends(self, settings: GenerationSettings) -> frozenset[int]:
        vocabulary = self._loaded.vocabulary
        if settings.stop_tokens is None:
            stated = frozenset(token for token in self._loaded.end_tokens if token < vocabulary)
            return stated if settings.ignore_tokenizer_eos else stated | self._tokenizer_ends
        for token in settings.stop_tokens:
            if not 0 <= token < vocabulary:
                raise ConfigError(f"stop_tokens has {shown(token)}; allowed: 0 to {vocabulary - 1}")
        return frozenset(settings.stop_tokens)


def _token_ids(prompt: object) -> list[int]:
    """The token ids of a prompt that is no text.

    Raises:
        ConfigError: it is no list of them, or empty.
    """
    tokens = list(prompt) if isinstance(prompt, Sequence) and not isinstance(prompt, bytes | bytearray) else None
    if tokens is None or not all(isinstance(token, int) and not isinstance(token, bool) for token in tokens):
        raise ConfigError(f"a prompt of {shown(prompt)}; allowed: text, or a list of token ids")
    if not tokens:
        raise ConfigError("an empty prompt; at least one token is needed")
    return tokens
