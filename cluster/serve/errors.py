"""``ApiError``: every refusal and failure of the service, in the form of OpenAI's API.

    {"error": {"message": ..., "type": ..., "param": the field or null, "code": ... or null}}

A message names the field, the value that was given, and those that are allowed. It holds no path and no stack trace.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cluster.errors import ClusterError, Overloaded, RequestFailed
from epslots.errors import ConfigError, shown

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
"""Statuses that the service answers with, and the type in their bodies."""
MOST_MESSAGE_CHARS = 2000
RETRY_S = {429: 1, 503: 5}


class ApiError(Exception):
    """An answer that isn't the asked one.

    Args:
        status: of HTTP; one of ``TYPES``.
        message: for people.
        param: the request's field that it is about.
        code: for programs.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = dict(headers or {})
        if status in RETRY_S:
            self.headers.setdefault("Retry-After", str(RETRY_S[status]))

    @property
    def body(self) -> dict[str, Any]:
        """The answer's body."""
        message = str(self)
        if len(message) > MOST_MESSAGE_CHARS:
            message = f"{message[:MOST_MESSAGE_CHARS]}..."
        return {"error": {"message": message, "type": TYPES[self.status], "param": self.param, "code": self.code}}


def refused(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The refusal of a field's value."""
    return ApiError(400, message, param=param, code=code)


def too_long(message: str, param: str) -> ApiError:
    """The refusal of a prompt that the model's context has no room for; clients know its code."""
    return ApiError(400, message, param=param, code="context_length_exceeded")


def overloaded(message: str) -> ApiError:
    return ApiError(429, message, code="overloaded")


def unavailable(message: str, *, close: bool = False) -> ApiError:
    """The service can't answer now; another one, or this one later, can.

    Args:
        close: end the connection, so that the client's next one may go elsewhere.
    """
    return ApiError(503, message, code="service_unavailable", headers={"Connection": "close"} if close else None)


INTERNAL = ApiError(500, "internal error; the service's log has more", code="internal_error")


def of_cluster(error: Exception, names: Mapping[str, str]) -> ApiError:
    """The answer for an error of epslots.

    Args:
        error: what a call of the cluster raised.
        names: the API's names of settings, by those that messages begin with.
    """
    match error:
        case Overloaded():
            return overloaded("the queue is full; try again when requests have ended")
        case ConfigError():
            return _of_setting(str(error), names)
        case RequestFailed() if _GRAMMAR.match(str(error)):  # which no text belongs to, or which takes too much work
            return _of_setting(str(error), names)
        case RequestFailed():
            return ApiError(500, "the request failed while it was computed; the service's log has more", code="request_failed")
        case ClusterError():
            return unavailable("the model's ranks can't serve now; try again")
    return INTERNAL


_GRAMMAR = re.compile(r"(json_schema|regex|grammar): ")
_FIRST_WORD = re.compile(r"^(\w+)")
_PATH = re.compile(r"(?<![\w/])/(?:[\w.@+-]+/)+[\w.@+-]*")


def _of_setting(message: str, names: Mapping[str, str]) -> ApiError:
    """The refusal of a setting, by the API's name for it."""
    first = _FIRST_WORD.match(message)
    name = names.get(first[1]) if first else None
    if first and name is not None:
        message = name + message[first.end() :]
    return refused(without_paths(message), name)


def without_paths(message: str) -> str:
    """A message without the paths of this machine."""
    return _PATH.sub("(a file)", message)


Problem = Mapping[str, Any]
"""One of pydantic's errors: "type", "loc", "msg", "input"."""


def of_problems(problems: Sequence[Problem], fields: frozenset[str]) -> ApiError:
    """The refusal of a body that doesn't follow the schema.

    Args:
        problems: in the order of their discovery; the first one's field is refused.
        fields: names of all fields of the schema.
    """
    first = problems[0]
    if first["type"] == "json_invalid":
        return refused(f"the body is no JSON: {first.get('ctx', {}).get('error', 'it ends early')}"[:300])
    if first["type"] == "extra_forbidden":
        name = str(first["loc"][-1])[:100]
        return refused(f"{shown(name)}: unknown parameter; see /openapi.json for those that are known", name)
    if first["loc"][:1] == ("query",):
        name = str(first["loc"][-1])[:100]
        return refused(f"{name}: {_wish(first)}{_given(first.get('input'))}", name)
    root = _path(first["loc"], fields)[:1]
    if not root:
        return _of_body(first, fields)
    # Of a union, each branch has problems; the one that a value was meant for is understood deepest.
    paths = [(_path(problem["loc"], fields), problem) for problem in problems]
    deepest = max((path for path, _ in paths if path[:1] == root), key=len)
    same = [problem for path, problem in paths if path == deepest]
    param = ".".join(deepest)
    if same[0]["type"] == "missing":
        return refused(f"{param}: this field is required", param)
    wishes = list(dict.fromkeys(_wish(problem) for problem in same))[:4]
    return refused(f"{param}: {'; or: '.join(wishes)}{_given(same[0].get('input'))}", param)


def _of_body(problem: Problem, fields: frozenset[str]) -> ApiError:
    """The refusal of a body as a whole."""
    if problem["type"] != "value_error":
        return refused("the body must be a JSON object")
    wish = _wish(problem)  # it begins with the field
    name = wish.partition(":")[0]
    return refused(wish, name if name in fields else None)


def _path(location: Iterable[str | int], fields: frozenset[str]) -> list[str]:
    """The place of a problem: fields and places in lists. Other parts are pydantic's names for branches of a union."""
    return [str(step) for step in location if isinstance(step, int) or step in fields]


def _wish(problem: Problem) -> str:
    text = str(problem["msg"]).removeprefix("Value error, ")
    return text[:300]


def _given(value: object) -> str:
    """A scalar as it was given; longer things aren't repeated."""
    return f" (given: {shown(value)})" if isinstance(value, str | int | float | bool) else ""
