"""Requests that can't be served: OpenAI's error, the right status, the field by name. Nothing reaches the engine."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.serve.errors import MOST_MESSAGE_CHARS
from cluster.serve.schema import ChatRequest, CompletionRequest, TokenizeRequest
from epslots.generation import chat_template
from epslots.generation.chat_template import Renderer
from tests.support.http_service import CHAT, COMPLETIONS, Client, serving
from tests.support.scripted_cluster import ScriptedCluster

HELLO = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}


COMPLETION_CASES: list[tuple[dict[str, Any], str, str]] = [
    ({}, "prompt", "required"),
    ({"prompt": ""}, "prompt", "at least 1 character"),
    ({"prompt": []}, "prompt", "at least 1 item"),
    ({"prompt": [[]]}, "prompt.0", "at least 1 item"),
    ({"prompt": ["a", ""]}, "prompt.1", "at least 1 character"),
    ({"prompt": [5, -1]}, "prompt.1", "greater than or equal to 0"),
    ({"prompt": [5, 2048]}, "prompt", "allowed: 0 to 2047"),
    ({"prompt": [5, 2**40]}, "prompt.1", "less than"),
    ({"prompt": [5, "a"]}, "prompt.1", "valid integer"),
    ({"prompt": 7}, "prompt", "valid string (given: 7)"),
    ({"prompt": {"a": 1}}, "prompt", "valid string"),
    ({"prompt": "a", "model": "gpt-4"}, "model", "allowed: scripted, other"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens", "echo=true"),
    ({"prompt": "a", "max_tokens": -1}, "max_tokens", "greater than or equal to 0 (given: -1)"),
    ({"prompt": "a", "max_tokens": 1.5}, "max_tokens", "valid integer"),
    ({"prompt": "a", "max_tokens": "5"}, "max_tokens", "valid integer"),
    ({"prompt": "a", "max_tokens": 600}, "max_tokens", "the model's context holds 512 tokens"),
    ({"prompt": [5] * 512}, "prompt", "the prompt has 512"),
    ({"prompt": "x y " * 2000}, "prompt", "context holds 512"),
    ({"prompt": "a", "temperature": -1}, "temperature", "greater than or equal to 0"),
    ({"prompt": "a", "temperature": "hot"}, "temperature", "valid number (given: 'hot')"),
    ({"prompt": "a", "top_p": 0}, "top_p", "greater than 0"),
    ({"prompt": "a", "top_p": 1.1}, "top_p", "less than or equal to 1"),
    ({"prompt": "a", "top_k": -2}, "top_k", "greater than or equal to -1"),
    ({"prompt": "a", "min_p": 2}, "min_p", "less than or equal to 1"),
    ({"prompt": "a", "n": 0}, "n", "greater than or equal to 1"),
    ({"prompt": "a", "n": 129}, "n", "less than or equal to 128"),
    ({"prompt": ["a"] * 40, "n": 2}, "n", "allowed: up to 64"),
    ({"prompt": ["a"] * 1025}, "prompt", "allowed: up to 1024"),
    ({"prompt": "a", "seed": 2**63}, "seed", "less than"),
    ({"prompt": "a", "seed": 10**400}, "seed", ""),
    ({"prompt": "a", "stop": [""]}, "stop.0", "at least 1 character"),
    ({"prompt": "a", "stop": "x" * 257}, "stop", "at most 256 characters"),
    ({"prompt": "a", "stop": ["x"] * 65}, "stop", "at most 64 items"),
    ({"prompt": "a", "stop": 5}, "stop", "valid string; or: Input should be a valid list"),
    ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias", "token ids"),
    *(
        ({"prompt": "a", "logit_bias": {name: 1}}, "logit_bias", "token ids")
        for name in (" 5", "+5", "05", "0_5", "\u0665", "5\n", "9" * 5000)
    ),
    ({"prompt": "a", "logit_bias": {"5": 101}}, "logit_bias", "less than or equal to 100"),
    ({"prompt": "a", "logit_bias": {"5000": 1}}, "logit_bias", "allowed: 0 to 2047"),
    ({"prompt": "a", "logit_bias": {str(t): 1 for t in range(1025)}}, "logit_bias", "at most 1024"),
    ({"prompt": "a", "stop_token_ids": [5000]}, "stop_token_ids", "allowed: 0 to 2047"),
    ({"prompt": "a", "presence_penalty": 3}, "presence_penalty", "less than or equal to 2"),
    ({"prompt": "a", "repetition_penalty": 0}, "repetition_penalty", "greater than 0"),
    ({"prompt": "a", "min_tokens": 17}, "min_tokens", "allowed: up to max_tokens, which is 16"),
    ({"prompt": "a", "logprobs": 21}, "logprobs", "less than or equal to 20"),
    ({"prompt": "a", "logprobs": True}, "logprobs", "valid integer"),
    ({"prompt": "a", "best_of": 3}, "best_of", "the value of n, 1"),
    ({"prompt": "a", "suffix": "b"}, "suffix", "None"),
    ({"prompt": "a", "priority": "high"}, "priority", "valid integer"),
    ({"prompt": "a", "priority": 2**63}, "priority", "less than"),
    ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options", "stream=true"),
    ({"prompt": "a", "stream": True, "stream_options": {"x": 1}}, "x", "unknown parameter"),
    ({"prompt": "a", "stream": True, "prompt_logprobs": 1}, "prompt_logprobs", "without stream"),
    ({"prompt": "a", "prompt_logprobs": 21}, "prompt_logprobs", "less than or equal to 20"),
    ({"prompt": "a" * 1_100_000, "truncate_prompt_tokens": 5}, "prompt", "1,100,000 characters; allowed: up to 1,048,576"),
    ({"prompt": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "at least 1"),
    ({"prompt": "a", "logits_processors": []}, "logits_processors", "'logits_processors': unknown parameter"),
    ({"prompt": "a", "guided_json": {"type": "nonsense"}}, "guided_json", ""),
    ({"prompt": "a", "guided_regex": "("}, "guided_regex", ""),
    ({"prompt": "a", "guided_regex": "a", "guided_choice": ["b"]}, "guided_regex", "one grammar at most"),
    ({"prompt": "a", "guided_regex": "a" * 70_000}, "guided_regex", "allowed: up to 65,536 characters"),
    ({"prompt": "a", "structured_outputs": {}}, "structured_outputs", "give one of"),
    ({"prompt": "a", "structured_outputs": {"regex": "a", "json_object": True}}, "structured_outputs", "give one of"),
]

CHAT_CASES: list[tuple[dict[str, Any], str, str]] = [
    ({}, "messages", "required"),
    ({"messages": []}, "messages", "at least 1 item"),
    ({"messages": [{"content": "a"}]}, "messages.0.role", "required"),
    ({"messages": [{"role": "king", "content": "a"}]}, "messages.0.role", "'developer', 'system'"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "valid string"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
     "messages.0.content.0.type", "'text'"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0", "needs 'text'"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}]},
     "messages.0.tool_calls", "JSON object"),
    ({"messages": [{"role": "user", "content": "x y " * 4000}]}, "messages", ""),
    ({"messages": HELLO, "max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    ({"messages": HELLO, "top_logprobs": 2}, "top_logprobs", "logprobs=true"),
    ({"messages": HELLO, "logprobs": 5}, "logprobs", "valid boolean"),
    ({"messages": HELLO, "response_format": {"type": "json_schema"}}, "response_format", "needs json_schema"),
    ({"messages": HELLO, "response_format": {"type": "xml"}}, "response_format.type", "'json_schema'"),
    ({"messages": HELLO, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 7}}}},
     "response_format", ""),
    ({"messages": HELLO, "tool_choice": "required"}, "tool_choice", "with tools"),
    ({"messages": HELLO, "tools": [TOOL], "tool_choice": "any"}, "tool_choice", "'required'"),
    ({"messages": HELLO, "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "sea"}}},
     "tool_choice", "allowed: a tool of this request: look"),
    ({"messages": HELLO, "tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", "pattern"),
    ({"messages": HELLO, "tools": [TOOL], "tool_choice": "required", "guided_regex": "a"}, "tool_choice", "no other grammar"),
    ({"messages": HELLO, "functions": [{"name": "f"}]}, "functions", "None"),
    ({"messages": HELLO, "audio": {"voice": "x"}}, "audio", "None"),
    ({"messages": HELLO, "modalities": ["audio"]}, "modalities.0", "'text'"),
    ({"messages": HELLO, "continue_final_message": True, "add_generation_prompt": True}, "continue_final_message", ""),
    ({"messages": HELLO, "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "other fields"),
    ({"messages": HELLO, "chat_template": "{{ 1 }}"}, "chat_template", "unknown parameter"),
    ({"messages": HELLO, "best_of": 2}, "best_of", "unknown parameter"),
]  # fmt: skip


def assert_refused(client: Client, path: str, body: Any, param: str | None, words: str) -> dict[str, Any]:
    reply = client.post(path, body)
    assert reply.status == 400, reply.body
    error = reply.error
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert words in error["message"]
    if param is not None:
        assert param.partition(".")[0] in error["message"]
    return error


@pytest.mark.parametrize(("body", "param", "words"), COMPLETION_CASES, ids=lambda value: str(value)[:50])
def test_a_completion_is_refused_by_its_field(client: Client, body: Any, param: str, words: str):
    assert_refused(client, COMPLETIONS, body, param, words) if param != "model" else None
    if param == "model":
        reply = client.post(COMPLETIONS, body)
        assert (reply.status, reply.error["code"], reply.error["param"]) == (404, "model_not_found", "model")
        assert words in reply.error["message"]


@pytest.mark.parametrize(("body", "param", "words"), CHAT_CASES, ids=lambda value: str(value)[:50])
def test_a_chat_is_refused_by_its_field(client: Client, body: Any, param: str, words: str):
    assert_refused(client, CHAT, body, param, words)


def test_nothing_refused_reaches_the_engine(client: Client, there: tuple[Client, ScriptedCluster]):
    client.post(COMPLETIONS, {"prompt": "a"})
    assert len(there[1].requests) == 1


def test_a_prompt_that_is_too_long_has_its_code(client: Client):
    """Agents shorten their chat when they see it."""
    for path, body in (
        (COMPLETIONS, {"prompt": [5] * 600}),
        (CHAT, {"messages": [{"role": "user", "content": "a b " * 999}]}),
    ):
        error = assert_refused(client, path, body, "prompt" if path == COMPLETIONS else "messages", "")
        assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"{bad", b"[1]", b'"a"', b"null", b'{"prompt": NaN}', b'{"prompt": "\\ud800"}', b"\xff\xfe", b"[" * 9999],
)
def test_a_body_that_is_no_object(client: Client, body: bytes):
    """Bad JSON, NaN, half of a surrogate pair, brackets without end: 400, and never a stack trace."""
    reply = client.post(COMPLETIONS, body)
    assert reply.status == 400
    assert reply.error["param"] is None


def test_the_content_type_must_be_json(client: Client):
    """A page of another site could post anything else without asking first."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        reply = client.post(COMPLETIONS, {"prompt": "a"}, {"Content-Type": kind})
        assert (reply.status, reply.error["code"]) == (415, "content_type")
    assert client.post(COMPLETIONS, {"prompt": "a"}, {"Content-Encoding": "gzip"}).status == 415
    assert client.post(COMPLETIONS, {"prompt": "a"}, {"Content-Type": "application/json; charset=utf-8"}).status == 200


def test_unknown_paths_and_methods(client: Client):
    reply = client.post("/v1/embeddings", {})
    assert (reply.status, reply.error["type"]) == (404, "not_found_error")
    reply = client.get(COMPLETIONS)
    assert (reply.status, reply.headers["allow"]) == (405, "POST")
    assert "allowed: POST" in reply.error["message"]
    assert client.get("/v1/models/nope").error["code"] == "model_not_found"


def test_an_error_repeats_no_long_input(client: Client):
    reply = client.post(COMPLETIONS, {"prompt": "a", "temperature": "x" * 100_000, "y" * 100_000: 1})
    assert reply.status == 400
    assert len(reply.error["message"]) <= MOST_MESSAGE_CHARS
    assert len(reply.body) < 3000


def test_fields_without_an_effect_are_accepted(client: Client):
    """Clients send them by themselves."""
    body = {
        "user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "safety_identifier": "s",
        "prompt_cache_key": "k", "parallel_tool_calls": True, "verbosity": "low", "modalities": ["text"],
        "reasoning_effort": "low", "prediction": {"type": "content", "content": "x"}, "functions": None,
    }  # fmt: skip
    assert client.post(CHAT, {"messages": HELLO, "max_tokens": 1, **body}).status == 200


def test_a_template_that_refuses_says_why():
    with ScriptedCluster() as cluster, serving(cluster, chat_template="{{ raise_exception('users first') }}") as client:
        error = assert_refused(client, CHAT, {"messages": HELLO}, "messages", "users first")
        assert "--no-chat" not in error["message"]


def test_a_long_prompt_holds_up_no_other(client: Client):
    """The loop goes on while a prompt of 100,000 characters and one of a million tokens are read."""
    for prompt in ("def f(x):\n" * 10_000, [5] * 1_000_000):
        began = time.perf_counter()
        assert client.post(COMPLETIONS, {"prompt": prompt}).status == 400
        assert time.perf_counter() - began < 30  # minutes, if each token were an error
    assert client.get("/health").status == 200


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
FIELDS = [*CompletionRequest.model_fields, *ChatRequest.model_fields, *TokenizeRequest.model_fields, "tokens", "x"]
PATHS = {COMPLETIONS: {"prompt": "a"}, CHAT: {"messages": HELLO}, "/tokenize": {}, "/detokenize": {}}


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(list(PATHS)), extra=st.dictionaries(st.sampled_from(FIELDS), JSON))
def test_no_body_is_answered_with_a_server_error(client: Client, path: str, extra: dict[str, Any]):
    base = PATHS[path]
    reply = client.post(path, json.dumps({**base, "max_tokens": 2, **extra} if base else extra).encode())
    assert reply.status in (200, 400, 404, 429), reply.body
    if reply.status != 200:
        assert set(reply.error) == {"message", "type", "param", "code"}


def test_a_prompt_to_tokenize_has_a_limit(client: Client):
    """It needn't fit into the context, and still must not hold up others' prompts."""
    assert client.post("/tokenize", {"prompt": "a " * 3000}).json["count"] > 512
    long = "a" * 1_100_000
    assert_refused(client, "/tokenize", {"prompt": long}, "prompt", "allowed: up to 1,048,576")
    assert_refused(client, "/tokenize", {"messages": [{"role": "user", "content": long}]}, "messages", "1,100,000 characters")


def test_a_grammar_that_fails_is_the_clients_error():
    """No text belongs to it, or it takes too much work: that is found out when it is computed."""
    with ScriptedCluster() as cluster, serving(cluster) as client:
        cluster.fails = "grammar: no token of the vocabulary continues the text as its grammar wants it"
        assert_refused(client, COMPLETIONS, {"prompt": "a", "guided_grammar": "start: start"}, "guided_grammar", "no token")
        *_, last = client.post(COMPLETIONS, {"prompt": "a", "guided_grammar": "start: start", "stream": True}).events
        assert last["error"]["param"] == "guided_grammar"


def test_a_parameter_of_a_path_is_refused_by_name(client: Client):
    reply = client.get("/metrics?layers=maybe")
    assert (reply.status, reply.error["param"]) == (400, "layers")
    assert "(given: 'maybe')" in reply.error["message"]


def test_an_error_has_no_paths(monkeypatch: pytest.MonkeyPatch):
    def broken(*_: Any, **__: Any) -> Any:
        raise OSError(2, "No such file or directory", "/opt/secret/place/python")

    monkeypatch.setattr(chat_template.subprocess, "Popen", broken)
    monkeypatch.setattr(chat_template, "_renderers", lambda _: Renderer())
    with ScriptedCluster() as cluster, serving(cluster) as client:
        error = assert_refused(client, CHAT, {"messages": HELLO}, "messages", "can't be started")
        assert "secret" not in error["message"]
