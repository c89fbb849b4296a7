"""The page at ``/openapi.json`` is true: its types are those of real answers, and its statuses those that are sent."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from pydantic import BaseModel

from cluster.serve import answer_schema as answers
from tests.support.http_service import CHAT, COMPLETIONS, Client, serving
from tests.support.scripted_cluster import ScriptedCluster

HELLO = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
FORCED = {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "look"}}}


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with ScriptedCluster() as cluster, serving(cluster) as client:
        yield client


@pytest.fixture(scope="module")
def page(client: Client) -> dict[str, Any]:
    found: dict[str, Any] = client.get("/openapi.json").json
    return found


def holds(page: dict[str, Any], name: str, value: Any) -> None:
    """Check a value against one of the page's types."""
    jsonschema.validate(value, {"$ref": f"#/components/schemas/{name}", "components": page["components"]})


BODIES: list[tuple[str, dict[str, Any]]] = [
    (COMPLETIONS, {"prompt": "a"}),
    (COMPLETIONS, {"prompt": ["a", [5, 6]], "n": 2, "logprobs": 2, "echo": True, "max_tokens": 2, "temperature": 1}),
    (CHAT, {"messages": HELLO}),
    (CHAT, {"messages": HELLO, "n": 2, "logprobs": True, "top_logprobs": 2, "max_tokens": 3}),
    (CHAT, {"messages": HELLO, **FORCED}),
    (COMPLETIONS, {"prompt": [[5, 6], "a"], "prompt_logprobs": 1}),
    (CHAT, {"messages": HELLO, "prompt_logprobs": 0}),
]


@pytest.mark.parametrize(("path", "body"), BODIES)
def test_answers_are_of_the_pages_types(client: Client, page: dict[str, Any], path: str, body: dict[str, Any]):
    whole: type[BaseModel] = answers.Completion if path == COMPLETIONS else answers.ChatCompletion
    chunk: type[BaseModel] = answers.Completion if path == COMPLETIONS else answers.ChatChunk
    found = client.post(path, body)
    assert found.status == 200
    whole.model_validate_json(found.body)
    holds(page, whole.__name__, found.json)
    if "prompt_logprobs" in body:
        return  # not in streams
    stream = client.post(path, body | {"stream": True, "stream_options": {"include_usage": True}})
    told = page["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"]["schema"]["description"]
    assert f"a {chunk.__name__};" in told
    for event in stream.events:
        chunk.model_validate(event)
        holds(page, chunk.__name__, event)


def test_plain_answers_are_of_the_pages_types(client: Client, page: dict[str, Any]):
    for path, name in (
        ("/v1/models", "ModelList"),
        ("/v1/models/other", "ModelCard"),
        ("/health", "Readiness"),
        ("/version", "Version"),
    ):
        holds(page, name, client.get(path).json)
    holds(page, "Tokenized", client.post("/tokenize", {"prompt": "a", "return_token_strs": True}).json)
    holds(page, "Detokenized", client.post("/detokenize", {"tokens": [5]}).json)
    holds(page, "ErrorAnswer", client.post(COMPLETIONS, {}).json)


def test_requests_are_of_the_pages_types(page: dict[str, Any]):
    """Accepted bodies are valid by the page, and refused ones aren't."""
    for path, body in BODIES:
        name = "CompletionRequest" if path == COMPLETIONS else "ChatRequest"
        holds(page, name, body)
        for wrong in ({**body, "n": 0}, {**body, "unknown": 1}, {**body, "temperature": "hot"}):
            with pytest.raises(jsonschema.ValidationError):
                holds(page, name, wrong)


def test_every_path_is_described(page: dict[str, Any]):
    assert page["paths"].keys() == {
        "/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/models/{model}", "/tokenize", "/detokenize", "/health",
        "/ready", "/metrics", "/version",
    }  # fmt: skip
    for path in page["paths"].values():
        for operation in path.values():
            assert "422" not in operation["responses"]
            assert operation.get("summary") or operation.get("description")


def test_the_page_says_whether_a_key_is_needed():
    with ScriptedCluster() as cluster, serving(cluster, keys=("some-key-1",)) as client:
        page = client.get("/openapi.json", Authorization="Bearer some-key-1").json
    assert page["security"] == [{"key": []}]
