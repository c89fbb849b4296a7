"""A request's continuation as it comes: portions of tokens, text and log-probabilities, up to a stop string."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from epslots.generation.requests import Output, Reason, TokenLogprobs
from epslots.generation.text import TextStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Portion:
    """A part of a request's continuation. All portions together are the whole of it; any field of one may be empty.

    Attributes:
        tokens: new token ids, up to the one that ended the text or completed a stop string.
        text: the text that has become certain, without special tokens and without the stop string. It may be that of earlier
            tokens, and that of these tokens may be yet to come. None if the checkpoint has no tokenizer.
        logprobs: of each of ``tokens``, if the request asked for them.
        prompt_logprobs: of the prompt's tokens from the second on, if the request asked for them.
        reason: why the request ended; only of the last portion.
    """

    tokens: tuple[int, ...]
    text: str | None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    reason: Reason | None = None


class PortionMaker:
    """Makes portions of a request's outputs.

    Args:
        tokenizer: the checkpoint's, if it has one.
        stop: the request's stop strings.
        min_tokens: the request's.
        special_tokens: the text has special tokens, too.
        unsaid: tokens that the text leaves out in any case: those that end it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        stop: Iterable[str],
        min_tokens: int,
        *,
        special_tokens: bool = False,
        unsaid: frozenset[int] = frozenset(),
    ) -> None:
        self._unsaid = unsaid
        self._stream = None
        if tokenizer is not None:
            self._stream = TextStream(tokenizer, stop, min_tokens, special_tokens=special_tokens)

    def take(self, output: Output) -> Portion:
        """The portion for the next output; the last one if that is finished, or completes a stop string."""
        text = None
        if self._stream is not None:
            said = output
            if not self._unsaid.isdisjoint(output.tokens):
                said = replace(output, tokens=tuple(token for token in output.tokens if token not in self._unsaid))
            text, told = push_until_stop(self._stream, said)
            output = output if told is said else told
            text += self._stream.finish() if output.finished else ""
        return Portion(output.tokens, text, output.logprobs, output.prompt_logprobs, output.reason)


def push_until_stop(stream: TextStream, output: Output) -> tuple[str, Output]:
    """Push an output's tokens into the request's stream.

    Returns:
        The text that has become certain; and the output, which ends with the token that completes a stop string.
    """
    before = stream.tokens
    text = stream.push(output.tokens)
    if stream.stopped_after is None:
        return text, output
    kept = stream.stopped_after - before
    tokens, logprobs = output.tokens[:kept], output.logprobs[:kept]
    return text, replace(output, tokens=tokens, logprobs=logprobs, finished=True, reason="stop", error=None)
