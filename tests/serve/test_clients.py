"""The clients that people use: ``openai``, and curl."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from tests.support.http_service import COMPLETIONS, PATIENCE_S, Client, serving
from tests.support.scripted_cluster import SAYS, ScriptedCluster
from tests.support.tokenizers import TOKENIZERS

KEY = "a-key-of-ours"
HELLO: Any = [{"role": "user", "content": "hi"}]
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {"x": {"type": "integer"}},
                "required": ["x"],
                "additionalProperties": False,
            },
        },
    }
]


class Person(BaseModel):
    name: str
    age: int


@pytest.fixture(scope="module")
def there() -> Iterator[tuple[Client, ScriptedCluster]]:
    with ScriptedCluster() as cluster, serving(cluster, keys=(KEY,)) as client:
        yield client, cluster


@pytest.fixture
def client(there: tuple[Client, ScriptedCluster]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{there[0].url}/v1", api_key=KEY, max_retries=0, timeout=PATIENCE_S) as found:
        yield found


def test_models_are_listed(client: openai.OpenAI):
    assert [model.id for model in client.models.list()] == ["scripted", "other"]
    assert client.models.retrieve("other").owned_by == "epslots"
    with pytest.raises(openai.NotFoundError, match="there is no 'nope'"):
        client.models.retrieve("nope")


def test_completions(client: openai.OpenAI, cluster: ScriptedCluster):
    found = client.completions.create(
        model="scripted", prompt="a", max_tokens=40, logprobs=1, extra_body={"top_k": 5, "min_p": 0.1}
    )
    assert (found.choices[0].text, found.choices[0].finish_reason) == (SAYS, "stop")
    assert found.choices[0].logprobs is not None
    assert found.usage is not None
    assert found._request_id == found.id.removeprefix("cmpl-")
    parts = client.completions.create(model="scripted", prompt="a", max_tokens=40, stream=True)
    assert "".join(part.choices[0].text for part in parts) == SAYS


def test_chats(client: openai.OpenAI, cluster: ScriptedCluster):
    found = client.chat.completions.create(model="scripted", messages=HELLO, n=2, logprobs=True, top_logprobs=1)
    assert [choice.message.content for choice in found.choices] == [SAYS, SAYS]
    options: Any = {"include_usage": True}
    parts = list(client.chat.completions.create(model="scripted", messages=HELLO, stream=True, stream_options=options))
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == SAYS
    assert parts[-1].usage is not None
    assert found.usage is not None
    assert 2 * parts[-1].usage.completion_tokens == found.usage.completion_tokens


def test_the_stream_helper(client: openai.OpenAI, cluster: ScriptedCluster):
    with client.chat.completions.stream(model="scripted", messages=HELLO) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.content == SAYS


def test_the_parse_helper_has_a_schema(client: openai.OpenAI, cluster: ScriptedCluster):
    cluster.says = '{"name": "Ada", "age": 36}'
    cluster.requests.clear()
    found = client.chat.completions.parse(model="scripted", messages=HELLO, response_format=Person)
    assert found.choices[0].message.parsed == Person(name="Ada", age=36)
    grammar = cluster.requests[0].grammar
    assert grammar is not None
    assert json.loads(grammar.text)["required"] == ["name", "age"]


def test_the_parse_helper_says_when_a_text_was_cut(client: openai.OpenAI, cluster: ScriptedCluster):
    cluster.says = '{"name": "Ada", "age": 36}'
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model="scripted", messages=HELLO, response_format=Person, max_tokens=2)


def test_the_parse_helpers_stream_and_call_tools(client: openai.OpenAI, cluster: ScriptedCluster):
    cluster.says = '{"name": "Ada", "age": 36}'
    with client.chat.completions.stream(model="scripted", messages=HELLO, response_format=Person) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == Person(name="Ada", age=36)
    cluster.says = '[{"name": "Person", "parameters": {"name": "Ada", "age": 36}}]'
    tools: Any = [openai.pydantic_function_tool(Person)]
    found = client.chat.completions.parse(model="scripted", messages=HELLO, tools=tools, tool_choice="required")
    assert found.choices[0].finish_reason == "tool_calls"
    (call,) = found.choices[0].message.tool_calls or ()
    assert call.function.parsed_arguments == Person(name="Ada", age=36)


def test_tools_are_called_and_answered(client: openai.OpenAI, cluster: ScriptedCluster):
    cluster.says = '{"x": 5}'
    choice: Any = {"type": "function", "function": {"name": "look"}}
    message = (
        client.chat.completions.create(model="scripted", messages=HELLO, tools=TOOLS, tool_choice=choice).choices[0].message
    )
    assert message.tool_calls is not None
    call: Any = message.tool_calls[0]
    assert (call.function.name, json.loads(call.function.arguments)) == ("look", {"x": 5})
    cluster.says = SAYS
    answer: Any = {"role": "tool", "tool_call_id": call.id, "content": "seen"}
    again = client.chat.completions.create(model="scripted", messages=[*HELLO, message, answer])  # type: ignore[list-item]
    assert again.choices[0].message.content == SAYS
    assert TOKENIZERS["bytes"].decode(cluster.requests[-1].prompt) == "<user>hi<assistant>[look5]<tool>seen<assistant>"


def test_errors_are_the_clients_own(client: openai.OpenAI):
    with pytest.raises(openai.BadRequestError, match="temperature") as raised:
        client.completions.create(model="scripted", prompt="a", temperature=-1)
    assert raised.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(model="scripted", prompt="x y " * 999)
    assert raised.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="a-wrong-one").models.list()
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="scripted", input="a")


def test_sixteen_at_once(there: tuple[Client, ScriptedCluster]):
    async def main() -> list[int]:
        async with openai.AsyncOpenAI(base_url=f"{there[0].url}/v1", api_key=KEY, timeout=PATIENCE_S) as one:
            found = await asyncio.gather(*(one.completions.create(model="scripted", prompt="a", n=2) for _ in range(16)))
        return [len(each.choices) for each in found]

    assert asyncio.run(main()) == [2] * 16


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
def test_curl_as_the_ready_line_says(there: tuple[Client, ScriptedCluster]):
    done = subprocess.run(
        ["curl", "-sS", "-N", f"{there[0].url}{COMPLETIONS}", "-H", "Content-Type: application/json", "-H",
         f"Authorization: Bearer {KEY}", "-d", json.dumps({"prompt": "a", "max_tokens": 3, "stream": True})],
        capture_output=True, check=True,
    )  # fmt: skip
    assert done.stdout.endswith(b"data: [DONE]\n\n")
