"""In place of a replica that dies amid a request, Serve's proxy answers with an error that says to try again."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cluster.serve.ray_proxy import LOST, LostReplicas, middlewares
from cluster.serve.responses import json_response
from cluster.serve.sse import DONE, HEADERS, event
from tests.support.asgi_client import ask_app
from tests.support.http_service import Reply

STREAM = {"type": "http.response.start", "status": 200, "headers": HEADERS}
FIRST = {"type": "http.response.body", "body": event({"choices": []}), "more_body": True}
LAST = {"type": "http.response.body", "body": DONE, "more_body": False}


def behind(*messages: dict[str, Any]) -> Reply:
    """The answer through the middleware, if these messages come from behind it."""

    async def proxy(scope: Any, receive: Any, send: Any) -> None:
        for message in messages:
            await send(message)

    (made,) = middlewares()
    assert made.cls is LostReplicas
    return asyncio.run(ask_app(made.cls(proxy), "POST", "/v1/completions"))


def test_an_answer_that_doesnt_begin_is_a_503():
    reply = behind()
    assert (reply.status, reply.headers["retry-after"], reply.error["code"]) == (503, "5", "service_unavailable")
    assert reply.error["message"] == LOST


def test_a_stream_that_doesnt_end_gets_an_error():
    first, last = behind(STREAM, FIRST).events
    assert (first, last["error"]["message"]) == ({"choices": []}, LOST)


@pytest.mark.parametrize("messages", [(STREAM, FIRST, LAST), (STREAM, LAST)])
def test_a_stream_that_ends_is_left_alone(messages: tuple[dict[str, Any], ...]):
    reply = behind(*messages)
    assert reply.body == b"".join(message["body"] for message in messages[1:])


def test_a_refusal_is_left_alone():
    refusal = json_response({"error": {}}, 429)
    start = {"type": "http.response.start", "status": 429, "headers": refusal.raw_headers}
    reply = behind(start, {"type": "http.response.body", "body": refusal.body})
    assert (reply.status, reply.body) == (429, b'{"error":{}}')


def test_half_of_a_whole_answer_stays_cut_off():
    """An error behind it would make its JSON neither the answer nor an error."""
    start = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]}
    assert behind(start, {"type": "http.response.body", "body": b"{", "more_body": True}).body == b"{"


def test_other_protocols_are_left_alone():
    async def main() -> list[Any]:
        sent: list[Any] = []

        async def proxy(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "websocket.close"})

        async def send(message: Any) -> None:
            sent.append(message)

        async def receive() -> Any:
            raise AssertionError("it isn't asked")

        await LostReplicas(proxy)({"type": "websocket"}, receive, send)
        return sent

    assert asyncio.run(main()) == [{"type": "websocket.close"}]
