"""From a reader of choices to an HTTP answer: a stream of events, or one whole body. The same for both endpoints."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response

from cluster.serve.bridge import ChoiceReader, ClientLeft
from cluster.serve.completions import Chunk
from cluster.serve.errors import INTERNAL, ApiError, of_cluster
from cluster.serve.request_settings import api_names
from cluster.serve.request_summary import RequestSummary
from cluster.serve.responses import NoAnswer, error_response, json_response
from cluster.serve.schema import CommonRequest
from cluster.serve.service import Service
from cluster.serve.sse import DONE, KEEP_ALIVE, EventFrame, EventStream, event, until_left
from epslots.errors import EpslotsError
from epslots.generation.portions import Portion

logger = logging.getLogger("epslots.serve")
_PART_BYTES = 2**16
"""Of events that are sent together, or little more: none of the rest is made before the client takes these."""


class Answer(Protocol):
    """Makes the chunks of an answer's choices."""

    new_tokens: int

    def opening(self) -> list[Chunk]: ...
    def take(self, choice: int, portion: Portion) -> list[Chunk]: ...
    def complete(self, whole: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Answering:
    """A request that runs, on its way to its client.

    Attributes:
        body: the request.
        head: fields of the whole answer, besides choices and usage.
        chunk_head: fields of each chunk, likewise.
        answer: makes the choices' chunks.
        join: makes a whole choice of its chunks.
        prompt_tokens: of all prompts, each counted once.
    """

    service: Service
    summary: RequestSummary
    reader: ChoiceReader
    body: CommonRequest
    head: dict[str, Any]
    chunk_head: dict[str, Any]
    answer: Answer
    join: Callable[[Sequence[Chunk]], Chunk]
    prompt_tokens: int

    async def respond(self, request: Request) -> Response:
        """The answer, as a stream or whole."""
        if self.body.stream:
            self.summary.stream = True
            return EventStream(
                self._parts(),
                on_left=self.reader.leave,
                on_end=lambda: self.service.forget(self.reader),
                stalled_s=self.service.config.stalled_s,
            )
        watching = asyncio.create_task(until_left(request.receive, self.reader.leave))
        try:
            return json_response(await self._whole())
        except ClientLeft:
            self.summary.problem = "left"
            return NoAnswer()
        except Exception as error:
            return error_response(self._failed(error))
        finally:
            watching.cancel()
            self.service.forget(self.reader)

    async def _whole(self) -> dict[str, Any]:
        chunks: dict[int, list[Chunk]] = defaultdict(list)
        for chunk in self.answer.opening():
            chunks[chunk["index"]].append(chunk)
        async for news in self.reader.portions():
            for choice, portion in news:
                for chunk in self._take(choice, portion):
                    chunks[chunk["index"]].append(chunk)
        choices = [self.join(chunks[index]) for index in sorted(chunks)]
        whole = {**self.head, "choices": choices, "usage": self._usage()}
        self.answer.complete(whole)
        return whole

    async def _parts(self) -> AsyncIterator[bytes]:
        """The stream's events, together as they come together; the last ones with its end."""
        make = self._maker()
        try:
            if opening := self.answer.opening():
                yield b"".join(map(make, opening))
            last = b""
            async for news in self.reader.portions(self.service.config.keepalive_s):
                if not news:
                    yield KEEP_ALIVE
                part = b""
                for choice, portion in news:
                    for chunk in self._take(choice, portion):
                        part += make(chunk)
                        if len(part) > _PART_BYTES:
                            yield part
                            part = b""
                if self.reader.done:
                    last = part
                elif part:
                    yield part
            if self.body.wants_usage:
                last += event({**self.chunk_head, "choices": [], "usage": self._usage()})
            yield last + DONE
        except ClientLeft:
            self.summary.problem = "left"
        except Exception as error:
            yield event(self._failed(error).body) + DONE

    def _maker(self) -> Callable[[Chunk], bytes]:
        """Makes the event of a chunk."""
        if self.body.wants_all_usage:
            return lambda chunk: event({**self.chunk_head, "choices": [chunk], "usage": self._usage()})
        frame = EventFrame(self.chunk_head, "choices", {"usage": None} if self.body.wants_usage else {})
        return lambda chunk: frame.event((chunk,))

    def _take(self, choice: int, portion: Portion) -> list[Chunk]:
        summary = self.summary
        summary.note_tokens(len(portion.tokens), time.perf_counter())
        if portion.reason is not None:
            summary.finish_reasons.append(portion.reason)
        if summary.text is not None:
            summary.text[choice] += portion.text or ""
        return self.answer.take(choice, portion)

    def _usage(self) -> dict[str, int]:
        new = self.answer.new_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": new,
            "total_tokens": self.prompt_tokens + new,
        }

    def _failed(self, error: Exception) -> ApiError:
        """The client's version of an error; the log gets the whole one."""
        found = error if isinstance(error, ApiError) else INTERNAL
        if isinstance(error, EpslotsError):
            logger.warning("request %s failed: %s", self.summary.id, error)
            found = of_cluster(error, api_names(self.body))
        elif found is INTERNAL:
            logger.error("request %s met a bug", self.summary.id, exc_info=error)
        self.summary.problem = found.code or str(found.status)
        return found
