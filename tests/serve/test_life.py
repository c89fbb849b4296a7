"""A request's life over HTTP: clients that leave or read slowly, overload, time limits, failures; and the service's own."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest

from cluster.serve.errors import ApiError
from epslots.generation import text
from epslots.generation.chat_template import Chat
from tests.support.http_service import CHAT, COMPLETIONS, PATIENCE_S, raw_request, read_until, serving
from tests.support.scripted_cluster import ScriptedCluster

LONG = {"prompt": "a", "max_tokens": 400, "ignore_eos": True}
WORDS = "one two three four five " * 60


def until(condition: Callable[[], bool]) -> None:
    ends = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("path", "body", "choices"),
    [
        (COMPLETIONS, LONG, 1),
        (COMPLETIONS, LONG | {"stream": True}, 1),
        (COMPLETIONS, LONG | {"n": 8}, 8),
        (COMPLETIONS, LONG | {"prompt": ["a", "b"], "n": 2, "stream": True}, 4),
        (CHAT, {"messages": [{"role": "user", "content": "a"}], "stream": True}, 1),
    ],
)
@pytest.mark.parametrize("news", [False, True])
def test_a_client_that_leaves_frees_its_place(path: str, body: Any, choices: int, news: bool):
    """Streaming or whole, before and after its first token; and nothing is left of it."""
    with ScriptedCluster(WORDS, held=True, places=choices) as cluster, serving(cluster) as client:
        with client.asking(path, body):
            cluster.wait_for(lambda: len(cluster.requests) == choices)
            if news:
                cluster.go_on(3)
            assert cluster.state().free == 0
        cluster.wait_for(lambda: len(cluster.cancelled) == choices)
        until(lambda: client.service.running == 0 and cluster.state().free == choices)
        cluster.held = False
        assert client.post(path, body).status == 200


MUCH = {
    "messages": [{"role": "user", "content": "a"}],
    "ignore_eos": True,
    "logprobs": True,
    "top_logprobs": 20,
    "stream": True,
    "n": 12,
}
"""Some six megabytes, more than sockets hold."""


def test_a_slow_reader_is_held_up_alone():
    """Its socket fills up; others' requests go on, and no more is made of its own than the socket holds."""
    with ScriptedCluster(WORDS) as cluster, serving(cluster, stalled_s=3600) as client:
        with client.asking(CHAT, MUCH):
            cluster.wait_for(lambda: len(cluster.requests) == 12)
            for _ in range(5):
                assert client.post(COMPLETIONS, {"prompt": [8]}).status == 200
            assert client.service.running == 1
        until(lambda: client.service.running == 0)


def test_a_reader_that_takes_nothing_is_dropped():
    with ScriptedCluster(WORDS) as cluster, serving(cluster, stalled_s=0.2) as client, socket.socket() as small:
        small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        small.settimeout(PATIENCE_S)
        small.connect(client.address)
        small.sendall(raw_request(CHAT, MUCH))
        cluster.wait_for(lambda: len(cluster.requests) == 12)
        until(lambda: client.service.running == 0)
        found = b""
        while part := small.recv(65536):
            found = part
        assert b"[DONE]" not in found, "it isn't kept open for the rest"


def test_overload_is_said_at_once():
    """With the time to come again, and before the prompt is read."""
    with ScriptedCluster(held=True, places=2) as cluster, serving(cluster) as client:
        with client.asking(COMPLETIONS, LONG | {"n": 2}):
            cluster.wait_for(lambda: len(cluster.requests) == 2)
            reply = client.post(COMPLETIONS, {"prompt": "x" * 1_000_000})
            assert (reply.status, reply.error["type"], reply.headers["retry-after"]) == (429, "rate_limit_error", "1")
        until(lambda: cluster.state().free == 2)
        cluster.held = False
        assert client.post(COMPLETIONS, {"prompt": "a"}).status == 200


def test_a_place_counts_once_at_every_moment():
    """Also between the start of a request's choices and the end of its admission: another one isn't refused early."""
    with ScriptedCluster(held=True, places=3) as cluster, serving(cluster) as client:

        async def admit() -> None:
            service = client.service
            with service.admitted(2) as (model, places):
                assert cluster.state().free == 1
                first = model.cluster.submit_choices([5], n=2, places=places, max_new_tokens=5)
                with service.admitted(1), pytest.raises(ApiError, match="3 requests run or wait"), service.admitted(1):
                    pass
                assert cluster.state().free == 1
                del first
            with pytest.raises(ApiError, match="allowed: up to 3"), service.admitted(4):
                pass

        client.server.call(admit())
        until(lambda: cluster.state().free == 3)


def test_slow_templates_hold_up_no_other_prompts(monkeypatch: pytest.MonkeyPatch):
    """Nor a chat, as long as one of the threads for them is free."""
    may_go_on, waiting = threading.Event(), threading.Semaphore(0)
    render = text.render

    def slowly(tokenizer: Any, template: str, chat: Chat, **limits: Any) -> str:
        if chat.messages[0]["content"] == "slow":
            waiting.release()
            assert may_go_on.wait(PATIENCE_S)
        return render(tokenizer, template, chat, **limits)

    def body(content: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": content}], "max_tokens": 1}

    monkeypatch.setattr(text, "render", slowly)
    with ScriptedCluster() as cluster, serving(cluster) as client, client.asking(CHAT, body("slow")) as first:
        assert waiting.acquire(timeout=PATIENCE_S)
        assert client.post(CHAT, body("quick")).status == 200
        with client.asking(CHAT, body("slow")) as second:
            assert waiting.acquire(timeout=PATIENCE_S)
            assert client.post("/tokenize", {"prompt": "a " * 3000}).status == 200  # too long to be read without a thread
            may_go_on.set()
            for stream in (first, second):
                assert b"HTTP/1.1 200" in read_until(stream, b"}}")


def test_a_request_has_its_time():
    with ScriptedCluster(WORDS, held=True) as cluster, serving(cluster, request_timeout_s=0.2) as client:
        reply = client.post(COMPLETIONS, LONG)
        assert (reply.status, reply.error["code"]) == (504, "timeout")
        events = client.post(COMPLETIONS, LONG | {"stream": True}).events
        assert events[-1]["error"]["code"] == "timeout"
        until(lambda: len(cluster.cancelled) == 2)


def test_a_request_that_fails():
    """Whole, it is an error; in a stream, an event of one, without a finish reason. The reason stays in the log."""
    with ScriptedCluster() as cluster, serving(cluster) as client:
        cluster.fails = "NaN at /secret/path, says the test"
        reply = client.post(COMPLETIONS, {"prompt": "a"})
        assert (reply.status, reply.error["code"]) == (500, "request_failed")
        *rest, last = client.post(CHAT, {"messages": [{"role": "user", "content": "a"}], "stream": True}).events
        assert last["error"]["code"] == "request_failed"
        assert not any(choice["finish_reason"] for event in rest for choice in event["choices"])
        assert b"secret" not in reply.body
        cluster.fails = None
        assert client.post(COMPLETIONS, {"prompt": "a"}).status == 200


def test_a_cluster_that_fails_ends_what_runs():
    """Requests in flight are told to try again; none hangs."""
    with ScriptedCluster(WORDS, held=True) as cluster, serving(cluster) as client:
        with client.asking(COMPLETIONS, LONG | {"stream": True}) as stream, client.asking(COMPLETIONS, LONG) as whole:
            cluster.wait_for(lambda: len(cluster.requests) == 2)
            cluster.break_down("all ranks are lost")
            assert b'"code":"service_unavailable"' in read_until(stream, b"[DONE]")
            assert b"HTTP/1.1 503" in read_until(whole, b"}}")
        reply = client.post(COMPLETIONS, {"prompt": "a"})
        assert (reply.status, reply.headers["retry-after"]) == (503, "5")
        assert client.get("/health").status == 503
        assert client.get("/ready").json == {"status": "failed", "ranks": 0}


def test_a_quiet_stream_is_kept_open():
    with (
        ScriptedCluster(WORDS, held=True) as cluster,
        serving(cluster, keepalive_s=0.05) as client,
        client.asking(COMPLETIONS, LONG | {"stream": True}) as stream,
    ):
        read_until(stream, b": keep-alive\n\n")
        cluster.wait_for(lambda: len(cluster.requests) == 1)
        cluster.go_on()
        read_until(stream, b"data: [DONE]\n\n")


def test_tokens_stream_as_they_come():
    """The first one is there while the others are yet to come."""
    with (
        ScriptedCluster(WORDS, held=True) as cluster,
        serving(cluster) as client,
        client.asking(COMPLETIONS, LONG | {"stream": True}) as stream,
    ):
        cluster.wait_for(lambda: len(cluster.requests) == 1)
        cluster.go_on(2)
        beginning = read_until(stream, b'"text":"one')
        assert b'"text":"one' in beginning
        assert b"keep-alive" not in beginning
        cluster.go_on()
        read_until(stream, b"data: [DONE]\n\n")


def test_before_the_model_is_loaded_the_service_says_so():
    with ScriptedCluster() as cluster, serving(None) as client:
        assert client.get("/health").json == {"status": "starting", "ranks": 0}
        assert client.get("/ready").status == 503
        reply = client.post(COMPLETIONS, {"prompt": "a"})
        assert (reply.status, reply.headers["retry-after"]) == (503, "5")
        assert client.get("/metrics").status == 200
        client.service.attach(cluster)
        assert client.get("/ready").json == {"status": "ready", "ranks": 2}
        assert client.post(COMPLETIONS, {"prompt": "a"}).status == 200


def test_draining_lets_running_requests_end():
    """New ones are sent elsewhere meanwhile."""
    with (
        ScriptedCluster(WORDS, held=True) as cluster,
        serving(cluster, drain_s=PATIENCE_S) as client,
        client.asking(COMPLETIONS, LONG | {"stream": True}) as stream,
        ThreadPoolExecutor(1) as pool,
    ):
        cluster.wait_for(lambda: len(cluster.requests) == 1)
        drained = pool.submit(client.server.call, client.service.drain())
        until(lambda: client.service.phase == "draining")
        assert client.get("/ready").json["status"] == "draining"
        assert client.get("/health").status == 200
        reply = client.post(COMPLETIONS, {"prompt": "a"})
        assert (reply.status, reply.headers["connection"]) == (503, "close")
        assert not drained.done()
        cluster.go_on()
        assert read_until(stream, b"data: [DONE]\n\n").count(b"error") == 0
        assert drained.result(PATIENCE_S) == 0


def test_draining_has_its_time():
    """Requests that run longer get an error that says to try again."""
    with ScriptedCluster(WORDS, held=True) as cluster, serving(cluster, drain_s=0) as client:
        with client.asking(COMPLETIONS, LONG | {"stream": True}) as stream:
            cluster.wait_for(lambda: len(cluster.requests) == 1)
            assert client.server.call(client.service.drain()) == 1
            assert b"try again" in read_until(stream, b"[DONE]")
        cluster.wait_for(lambda: len(cluster.cancelled) == 1)


def test_many_at_once():
    """A thousand choices of a hundred clients, none lost and none mixed up."""
    before = threading.active_count()  # other tests' may be left
    with ScriptedCluster(lambda request: f"my prompt was {request.prompt[0]}", places=2000) as cluster:
        with serving(cluster) as client, ThreadPoolExecutor(16) as pool:

            def ask(number: int) -> list[str]:
                body = {"prompt": [number], "n": 10, "max_tokens": 30, "stream": bool(number % 2)}
                reply = client.post(COMPLETIONS, body)
                assert reply.status == 200
                texts = [""] * 10
                for event in reply.events if body["stream"] else [reply.json]:
                    for choice in event["choices"]:
                        texts[choice["index"]] += choice["text"]
                return texts

            for number, texts in zip(range(100, 200), pool.map(ask, range(100, 200)), strict=True):
                assert texts == [f"my prompt was {number}"] * 10
        assert threading.active_count() - before < 100


def test_a_reader_that_takes_nothing_of_a_whole_answer():
    """It is dropped, too: the answer's bytes would wait for it for ever."""
    with ScriptedCluster(WORDS) as cluster, serving(cluster, stalled_s=0.2) as client, socket.socket() as small:
        small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        small.settimeout(PATIENCE_S)
        small.connect(client.address)
        small.sendall(raw_request(CHAT, MUCH | {"stream": False}))
        cluster.wait_for(lambda: len(cluster.requests) == 12)
        until(lambda: client.service.running == 0)
        until(lambda: not client.server._server.server_state.connections)
        found = b""
        with suppress(ConnectionResetError):
            while part := small.recv(65536):
                found += part
        length = re.search(rb"content-length: (\d+)", found)
        assert length and len(found) < int(length[1])


def test_a_request_before_the_last_ones_answer():
    """It is left unread, and its connection is closed after the answer: so a client that leaves is noticed here, too."""
    with ScriptedCluster(WORDS, held=True) as cluster, serving(cluster) as client:
        for together in (True, False):
            with socket.create_connection(client.address, timeout=PATIENCE_S) as one:
                first, second = raw_request(COMPLETIONS, LONG), raw_request(COMPLETIONS, {"prompt": "b"})
                one.sendall(first + second if together else first)
                cluster.wait_for(lambda: len(cluster.requests) == 1)
                if not together:
                    one.sendall(second * 1000)
            cluster.wait_for(lambda: len(cluster.cancelled) == 1)
            until(lambda: client.service.running == 0)
            cluster.requests.clear()
            cluster.cancelled.clear()
        cluster.held = False
        with socket.create_connection(client.address, timeout=PATIENCE_S) as one:
            one.sendall(first + second)
            found = b""
            while part := one.recv(65536):
                found += part
        assert found.count(b"HTTP/1.1 200 OK") == 1
        assert len(cluster.requests) == 1
