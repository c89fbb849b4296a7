"""``RequestSummary``: the facts of one HTTP request, for the access log and the metrics."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from starlette.types import Scope

STATE = "epslots_summary"
"""Where a request's scope has its summary."""


@dataclass(eq=False)
class RequestSummary:
    """One request. The middleware fills in the first fields, the endpoint the others.

    Attributes:
        id: the request's, from its client or made here.
        path: as asked; the log shows it.
        client: address of the other end.
        began_s: on the monotonic clock, as all times here.
        status: of the answer; 499 if the client left before one.
        bytes_out: of the answer's body.
        route: the endpoint's path, from a fixed list; empty for any other.
        model: name of the model, as asked.
        stream: the answer is a stream.
        prompt_tokens, new_tokens: of all prompts and choices.
        choices: continuations that were asked for.
        finish_reasons: of the choices that are done.
        first_token_s, last_token_s: when the first and the latest token came.
        problem: code of the error that ended it; "left" if the client did.
        prompt, text: of the request and its answer, if the log is to contain them.
    """

    id: str
    method: str
    path: str
    client: str
    began_s: float
    status: int = 0
    bytes_out: int = 0
    ended_s: float = 0.0
    route: str = ""
    model: str | None = None
    stream: bool = False
    prompt_tokens: int = 0
    new_tokens: int = 0
    choices: int = 0
    finish_reasons: list[str] = field(default_factory=list)
    first_token_s: float | None = None
    last_token_s: float | None = None
    problem: str | None = None
    prompt: Any = None
    text: list[str] | None = None

    @property
    def ttft_s(self) -> float | None:
        """Seconds from the request to its first token."""
        return None if self.first_token_s is None else self.first_token_s - self.began_s

    @property
    def per_token_s(self) -> float | None:
        """Seconds from one token of a choice to its next, on average; None with fewer than two."""
        each = self.new_tokens / max(1, self.choices)
        if self.first_token_s is None or self.last_token_s is None or each < 2:
            return None
        return (self.last_token_s - self.first_token_s) / (each - 1)

    def note_tokens(self, count: int, now_s: float) -> None:
        """Tokens have come."""
        if count:
            self.new_tokens += count
            self.first_token_s = now_s if self.first_token_s is None else self.first_token_s
            self.last_token_s = now_s


def summary_of(scope: Scope) -> RequestSummary:
    """A request's summary."""
    found = scope["state"][STATE]
    assert isinstance(found, RequestSummary)
    return found
