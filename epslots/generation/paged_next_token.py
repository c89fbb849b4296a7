"""``PagedNextToken``: the choice of tokens in transformers' continuous batching, in place of its own.

transformers computes one row of logits for each request of a step, and takes a token from it. Here a prompt whose
log-probabilities are asked for has a row for each of its tokens, and a prompt that continues in a later step has one that
shows whether it is still a prompt of numbers. A step's choices change nothing until it is committed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.generation.continuous_batching.requests import FutureRequestState
from transformers.generation.continuous_batching.utils import stream_context

from epslots.device_copy import to_device
from epslots.generation.batcher import NotFiniteError
from epslots.generation.next_token import Chosen, choose, prompt_logprobs
from epslots.generation.requests import TokenLogprobs
from epslots.generation.tracked_request import NO_TOKEN, NextToken, TrackedRequest


@dataclass(frozen=True, eq=False)
class _PromptRows:
    """Rows of logits for the log-probabilities of a prompt.

    Attributes:
        positions: in the request's sequence.
        first: the first of them among the step's rows of logits; the others follow.
    """

    entry: TrackedRequest
    positions: range
    first: int

    def score(self, logits_NV: torch.Tensor) -> tuple[TokenLogprobs, ...]:
        request, positions = self.entry.request, self.positions
        assert request.prompt_logprobs is not None
        tokens = request.prompt[positions.start + 1 : positions.stop + 1]
        return prompt_logprobs(logits_NV[self.first : self.first + len(positions)], tokens, request.prompt_logprobs)


class PagedNextToken:
    """The choices of one batcher's steps. A repeated step chooses the same again, and so does one with a cancelled request.

    Args:
        processor: transformers' batch processor; how it samples, and reads what it sampled, is replaced.

    Attributes:
        choices: those of the last step, by transformers' id of the request.
    """

    def __init__(self, processor: Any) -> None:
        self.choices: dict[str, NextToken] = {}
        self._batch = processor.inputs_and_outputs
        self._inputs = self._batch.get_model_kwargs
        self._numbers: list[str] = []
        self._entries: list[TrackedRequest | None] = []
        # The tokens of the batch whose logits are computed; None = the last one of each request.
        self._places: list[int] | None = None
        self._prompts: list[_PromptRows] = []
        self._found: list[tuple[_PromptRows, tuple[TokenLogprobs, ...]]] = []
        self._chosen: Chosen | None = None
        processor.model_runner._sample = self._choose
        self._batch.get_model_kwargs = self._inputs_with_places
        self._batch.prepare_batch_update = self._read

    def prepare(self, part: Sequence[FutureRequestState], entries: Sequence[TrackedRequest | None]) -> None:
        """Lay out the rows of logits of the prepared batch. One row for each new token, and behind them those of prompts.

        Args:
            part: the batch's requests.
            entries: the same; None = a cancelled one.
        """
        self._numbers, self._entries, self._prompts = [], [], []
        places: list[int] = []
        behind: list[int] = []
        count = sum(future.has_new_token for future in part)
        end = 0
        for future, entry in zip(part, entries, strict=True):
            end += future.query_length
            after = future.state.position_offset  # transformers counts the chunk as computed once it is prepared
            positions = range(0) if entry is None else entry.prompt_rows(after - future.query_length, after)
            if positions:
                assert entry is not None
                self._prompts.append(_PromptRows(entry, positions, count + len(behind)))
                behind += [end - after + position for position in positions]
            if future.has_new_token:
                places.append(end - 1)
                self._numbers.append(future.state.request_id)
                self._entries.append(entry)
            elif after - 1 not in positions:
                # The last token of a chunk attends to all the others: its logits tell whether any came out as NaN.
                behind.append(end - 1)
        self._places = [*places, *behind] if behind else None

    def _inputs_with_places(self, use_padding: bool = False) -> Any:
        inputs = self._inputs(use_padding=use_padding)
        if self._places is not None:
            with stream_context(self._batch.compute_stream):
                inputs["logits_indices"] = to_device(np.array(self._places, np.int32), self._batch.device)
        return inputs

    def _choose(self, scores: torch.Tensor, _output_ids: torch.Tensor) -> None:
        """``choose`` as transformers calls it.

        Args:
            scores: fp32 [1, N, V].
            _output_ids: not filled: ``_read`` is the only one who would look there.
        """
        self.choose(scores[0])

    def choose(self, logits_NV: torch.Tensor) -> None:
        """Choose a token for each row, fp32 [N, V]."""
        self._chosen = choose(logits_NV, [*self._entries, *[None] * (len(logits_NV) - len(self._entries))])
        self._found = [(prompt, prompt.score(logits_NV)) for prompt in self._prompts]

    def _read(self) -> tuple[list[FutureRequestState], list[int], None]:
        """The step's requests, and the tokens of those that get one.

        Raises:
            NotFiniteError: a row has no token; transformers has not entered any.
        """
        assert self._chosen is not None
        choices = self._chosen.read()
        if any(choice.token == NO_TOKEN for choice in choices):
            raise NotFiniteError
        self.choices = dict(zip(self._numbers, choices, strict=False))
        return self._batch.requests_in_batch, [choice.token for choice in self.choices.values()], None

    def commit(self) -> None:
        """Enter the log-probabilities that the step found of prompts; its tokens follow from transformers' results."""
        for prompt, found in self._found:
            if prompt.entry.reason is None:
                prompt.entry.add_prompt_logprobs(prompt.positions, found)
