"""Bounds the rows of logits of a paged step when the log-probabilities of prompts are asked for.

A step has room for ``max_requests`` rows: one for each request. A prompt whose log-probabilities are asked for needs a row for
each of its tokens, so its chunks are cut, and requests behind it may wait for the next step (``share_rows``, pure).
``PromptRows`` makes transformers' scheduler follow that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from epslots.generation.tracked_request import TrackedRequest


def share_rows(wanted: Sequence[int], most: int) -> list[int]:
    """How many rows of logits each request of a step gets, in its order; 0 = it waits.

    A request that wants several gets all that are left beside one for each later request; at least half of what is left, so
    that a long queue doesn't reduce it to a token a step.

    Args:
        wanted: at least one for each request.
        most: rows of a step.
    """
    given, left = [], most
    for later, rows in zip(reversed(range(len(wanted))), wanted, strict=True):
        given.append(min(rows, max(-(-left // 2), left - later)))
        left -= given[-1]
    return given


class PromptRows:
    """Cuts the chunks of prompts whose log-probabilities are asked for.

    These prompts share no prefix until all log-probabilities are known: what isn't computed gives no logits.

    Args:
        processor: transformers' batch processor; its scheduler, and its search for prefixes, are changed.
    """

    def __init__(self, processor: Any) -> None:
        scheduler, cache = processor.scheduler, processor.cache
        self._scheduler = scheduler
        self._process, self._schedule, self._search = (
            scheduler._process_candidates,
            scheduler._schedule_request,
            cache.search_prefix_match,
        )
        # By transformers' id: requests with missing log-probabilities, and the tokens that each may compute in the next step.
        self._asking: dict[str, TrackedRequest] = {}
        self._chunks: dict[str, int] = {}
        scheduler._process_candidates = self._process_candidates
        scheduler._schedule_request = self._schedule_request
        cache.search_prefix_match = self._search_prefix_match

    def add(self, number: str, entry: TrackedRequest) -> None:
        """A request was queued in transformers, under this id."""
        if _missing(entry, 0):
            self._asking[number] = entry

    def clear(self) -> None:
        """All ids are gone."""
        self._asking.clear()

    def _process_candidates(self, candidates: Sequence[Any], *rest: Any) -> Any:
        self._asking = {number: entry for number, entry in self._asking.items() if entry.reason is None and _missing(entry, 0)}
        self._chunks = {}
        if not self._asking:
            return self._process(candidates, *rest)
        missing = [self._rows_of(state) for state in candidates]
        # The last token of the prompt has a row in any case.
        given = share_rows([1 + len(rows) for rows in missing], self._scheduler.max_requests_per_batch)
        scheduled = [state for state, rows in zip(candidates, given, strict=True) if rows]
        for state, rows, count in zip(candidates, missing, given, strict=True):
            if rows:  # tokens that are computed again come first, and need none
                self._chunks[state.request_id] = rows.start - state.position_offset + count
        return self._process(scheduled, *rest)

    def _rows_of(self, state: Any) -> range:
        entry = self._asking.get(state.request_id)
        return range(0) if entry is None else _missing(entry, state.position_offset)

    def _schedule_request(self, state: Any, request_tokens: list[int], token_budget: int, removed: set[str]) -> None:
        chunk = self._chunks.get(state.request_id, token_budget)
        self._schedule(state, request_tokens, min(chunk, token_budget), removed)

    def _search_prefix_match(self, request_id: str, prompt_ids: list[int]) -> int:
        found: int = 0 if request_id in self._asking else self._search(request_id, prompt_ids)
        return found


def _missing(entry: TrackedRequest, start: int) -> range:
    """The positions from ``start`` on whose logits the prompt's log-probabilities need."""
    return entry.prompt_rows(start, entry.prompt_length)
