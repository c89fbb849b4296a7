"""``/v1/completions``: from portions of continuations to the choices of its answer. No I/O.

A whole answer is the sum of the chunks that a stream would have, so both say the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cluster.serve.schema import CompletionRequest
from cluster.serve.token_text import CompletionLogprobsWriter, TokenTexts, prompt_logprobs
from epslots.generation.portions import Portion
from epslots.generation.requests import TokenLogprobs

Chunk = dict[str, Any]
"""One choice's part of an answer."""

CHUNK_OBJECT = OBJECT = "text_completion"
ID_PREFIX = "cmpl-"


class CompletionAnswer:
    """Makes the choices of an answer. Choice i is continuation i % n of prompt i // n.

    Args:
        request: as it was asked.
        prompts: the prompts' tokens.
        echoes: the prompts' texts, if they are to be returned.
        texts: of tokens.
    """

    def __init__(
        self, request: CompletionRequest, prompts: Sequence[Sequence[int]], echoes: Sequence[str] | None, texts: TokenTexts
    ) -> None:
        self._request, self._prompts, self._echoes = request, prompts, echoes
        self._choices, self._texts = request.choices, texts
        top = request.logprobs
        self._writers = None
        if top is not None:
            self._writers = [CompletionLogprobsWriter(texts, top) for _ in range(len(prompts) * self._choices)]
        scored = echoes is not None and top is not None
        # Log-probabilities of each prompt: those that its echo waits for, those that have come, and the portions until then.
        self._unscored = [len(prompt) - 1 if scored else 0 for prompt in prompts]
        self._of_prompt: list[list[TokenLogprobs]] = [[] for _ in prompts]
        self._held: list[list[tuple[int, Portion]]] = [[] for _ in prompts]
        self.new_tokens = 0
        """Of all choices so far."""

    def opening(self) -> list[Chunk]:
        """The chunks before the first portion."""
        if self._echoes is None:
            return []
        return [chunk for prompt, unscored in enumerate(self._unscored) if not unscored for chunk in self._echo(prompt)]

    def take(self, choice: int, portion: Portion) -> list[Chunk]:
        """The chunks for a choice's next portion."""
        prompt, number = divmod(choice, self._choices)
        if number == 0:  # which brings the prompt's log-probabilities for all
            self._of_prompt[prompt] += portion.prompt_logprobs
        if not self._unscored[prompt]:
            return self._continue(choice, portion)
        if number == 0:
            self._unscored[prompt] -= len(portion.prompt_logprobs)
        self._held[prompt].append((choice, portion))
        if self._unscored[prompt]:
            return []
        held, self._held[prompt] = self._held[prompt], []
        return self._echo(prompt) + [chunk for each in held for chunk in self._continue(*each)]

    def complete(self, whole: dict[str, Any]) -> None:
        """Add the prompts' log-probabilities to a whole answer, if they were asked for."""
        if (top := self._request.prompt_logprobs) is not None:
            for choice in whole["choices"]:
                of_prompt = self._of_prompt[choice["index"] // self._choices]
                choice["prompt_logprobs"] = prompt_logprobs(self._texts, of_prompt, top)

    def _echo(self, prompt: int) -> list[Chunk]:
        assert self._echoes is not None
        first = prompt * self._choices
        return [
            self._chunk(choice, self._echoes[prompt], self._of_prompt[prompt], first_token=self._prompts[prompt][0])
            for choice in range(first, first + self._choices)
        ]

    def _continue(self, choice: int, portion: Portion) -> list[Chunk]:
        if self._request.max_tokens == 0:  # only the prompt is asked for; the one new token is not
            return [self._chunk(choice, "", ()) | {"finish_reason": "length"}] if portion.reason else []
        self.new_tokens += len(portion.tokens)
        if not portion.text and not portion.reason and not (self._writers and portion.tokens):
            return []
        return [self._chunk(choice, portion.text or "", portion.logprobs) | {"finish_reason": portion.reason}]

    def _chunk(self, choice: int, text: str, logprobs: Sequence[TokenLogprobs], *, first_token: int | None = None) -> Chunk:
        written = None
        if self._writers is not None:
            written = self._writers[choice].write(logprobs, first=first_token)
        return {"index": choice, "text": text, "logprobs": written, "finish_reason": None}


def joined_completion(chunks: Sequence[Chunk]) -> Chunk:
    """A choice of a whole answer, of all its chunks."""
    logprobs = [chunk["logprobs"] for chunk in chunks if chunk["logprobs"] is not None]
    return {
        "index": chunks[0]["index"],
        "text": "".join(chunk["text"] for chunk in chunks),
        "logprobs": {name: [x for each in logprobs for x in each[name]] for name in logprobs[0]} if logprobs else None,
        "finish_reason": chunks[-1]["finish_reason"],
    }
