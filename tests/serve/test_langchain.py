"""``langchain-openai``: chats, streams, batches, structured output and tools."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel, SecretStr

from tests.support.http_service import PATIENCE_S, Client, serving
from tests.support.scripted_cluster import SAYS, ScriptedCluster
from tests.support.tokenizers import TOKENIZERS

langchain = pytest.importorskip("langchain_openai", reason='langchain-openai isn\'t installed: pip install "epslots[clients]"')
KEY = "a-key-of-ours"


class Street(BaseModel):
    name: str
    number: int


class Address(BaseModel):
    """A place."""

    city: str
    street: Street


@pytest.fixture(scope="module")
def there() -> Iterator[tuple[Client, ScriptedCluster]]:
    with ScriptedCluster() as cluster, serving(cluster, keys=(KEY,)) as client:
        yield client, cluster


@pytest.fixture
def chat(there: tuple[Client, ScriptedCluster]) -> Any:
    return langchain.ChatOpenAI(
        model="scripted", base_url=f"{there[0].url}/v1", api_key=SecretStr(KEY), max_retries=0, timeout=PATIENCE_S
    )


def test_chats_streams_and_batches(chat: Any, cluster: ScriptedCluster):
    answer = chat.invoke([("system", "s"), ("human", "hi")])
    assert answer.content == SAYS
    assert answer.response_metadata["finish_reason"] == "stop"
    assert answer.usage_metadata["output_tokens"] == len(TOKENIZERS["bytes"].encode(SAYS)) + 1
    assert TOKENIZERS["bytes"].decode(cluster.requests[0].prompt) == "<system>s<user>hi<assistant>"
    assert "".join(part.content for part in chat.stream("hi")) == SAYS
    assert [each.content for each in chat.batch(["a", "b", "c"])] == [SAYS] * 3


def test_completions(there: tuple[Client, ScriptedCluster], cluster: ScriptedCluster):
    one = langchain.OpenAI(
        model="scripted",
        base_url=f"{there[0].url}/v1",
        api_key=SecretStr(KEY),
        max_retries=0,
        max_tokens=40,
        timeout=PATIENCE_S,
    )
    assert one.invoke("def f(") == SAYS
    assert "".join(one.stream("def f(")) == SAYS


@pytest.mark.parametrize("method", ["json_schema", "json_mode", "function_calling"])
def test_structured_output(chat: Any, cluster: ScriptedCluster, method: str):
    """Each way holds the text to JSON: by the schema, as any object, or as a function's arguments."""
    given = {"city": "Ulm", "street": {"name": "Main", "number": 4}}
    cluster.says = json.dumps(given)
    found = chat.with_structured_output(Address, method=method).invoke("where?")
    assert found == Address.model_validate(given)
    grammar = cluster.requests[0].grammar
    assert grammar is not None
    assert grammar.kind == ("json_object" if method == "json_mode" else "json_schema")


@pytest.mark.parametrize("choice", ["any", "Address"])
def test_tools_that_have_to_be_called(chat: Any, cluster: ScriptedCluster, choice: str):
    """Their schemas refer to parts of themselves."""
    arguments = {"city": "Ulm", "street": {"name": "Main", "number": 4}}
    cluster.says = json.dumps([{"name": "Address", "parameters": arguments}] if choice == "any" else arguments)
    answer = chat.bind_tools([Address, Street], tool_choice=choice).invoke("where?")
    assert [(call["name"], call["args"]) for call in answer.tool_calls] == [("Address", arguments)]


def test_tools_that_cant_be_found_are_refused(chat: Any, cluster: ScriptedCluster):
    """Without a response template, the service could not tell a call from a text: it says so instead of answering."""
    import openai

    with pytest.raises(openai.BadRequestError, match="no response template"):
        chat.bind_tools([Address]).invoke("where?")
