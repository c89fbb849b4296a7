"""``/v1/chat/completions`` over HTTP: templates, deltas, tools, reasoning, and the tokens of chats."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from epslots.generation import chat_template
from epslots.generation.chat_template import Renderer
from epslots.generation.requests import Request
from tests.support.http_service import CHAT, Client, serving
from tests.support.scripted_cluster import SAYS, ScriptedCluster, scored
from tests.support.tokenizers import TOKENIZERS

TOKENIZER = TOKENIZERS["bytes"]
HELLO = [{"role": "user", "content": "hi"}]
RESPONSES = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<assistant>",
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>", "content": "text"},
        "tool_calls": {
            "open_pattern": r"\s*<call>",
            "close": "</call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close": ["<end>"], "content": "text"},
    },
}
TOOLS = [
    {
        "type": "function",
        "function": {"name": name, "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}},
    }
    for name in ("look", "see")
]


@pytest.fixture(scope="module")
def there() -> Iterator[tuple[Client, ScriptedCluster]]:
    with ScriptedCluster() as cluster, serving(cluster, response_template=RESPONSES) as client:
        yield client, cluster


def prompts(cluster: ScriptedCluster) -> list[str]:
    return [TOKENIZER.decode(request.prompt) for request in cluster.requests]


def deltas(events: list[Any], choice: int = 0) -> list[dict[str, Any]]:
    return [each["delta"] for event in events for each in event["choices"] if each["index"] == choice]


def merged(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The message of deltas, as clients put it together."""
    message: dict[str, Any] = {}
    for delta in found:
        for name, value in delta.items():
            if name != "tool_calls":
                message[name] = message.get(name, "") + value
                continue
            for call in value:
                calls = message.setdefault("tool_calls", [])
                if call["index"] == len(calls):
                    calls.append({"id": call["id"], "name": call["function"]["name"], "arguments": ""})
                calls[call["index"]]["arguments"] += call["function"]["arguments"]
    return message


def both_ways(client: Client, body: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A message whole, and put together of its stream."""
    whole = client.post(CHAT, body)
    assert whole.status == 200, whole.body
    events = client.post(CHAT, body | {"stream": True}).events
    return whole.json["choices"][0]["message"], merged(deltas(events))


def test_a_chat_is_answered(client: Client, cluster: ScriptedCluster):
    body = client.post(CHAT, {"model": "other", "messages": HELLO, "max_tokens": 3}).json
    text = TOKENIZER.decode(TOKENIZER.encode(SAYS, add_special_tokens=False)[:3])
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": text, "refusal": None}
    assert (choice["finish_reason"], choice["logprobs"]) == ("length", None)
    assert (body["object"], body["model"]) == ("chat.completion", "other")
    assert prompts(cluster) == ["<user>hi<assistant>"]
    assert body["usage"]["prompt_tokens"] == len(cluster.requests[0].prompt)


def test_a_streams_first_delta_alone_has_the_role(client: Client, cluster: ScriptedCluster):
    reply = client.post(CHAT, {"messages": HELLO, "stream": True, "n": 2, "temperature": 1})
    for choice in (0, 1):
        first, *rest = deltas(reply.events, choice)
        assert first == {"role": "assistant", "content": ""}
        assert not any("role" in delta for delta in rest)
        assert merged([first, *rest])["content"] == SAYS
        assert rest[-1] == {}
    reasons = [c["finish_reason"] for event in reply.events for c in event["choices"] if c["finish_reason"]]
    assert reasons == ["stop", "stop"]
    assert len({event["id"] for event in reply.events}) == 1


def test_messages_as_clients_send_them(client: Client, cluster: ScriptedCluster):
    """System only, null content, parts of text, an answer that comes back with all of its fields."""
    answer = {"role": "assistant", "content": None, "refusal": None, "annotations": [], "audio": None, "function_call": None}
    calls = [{"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"x": 7}'}}]
    for messages, prompt in (
        ([{"role": "system", "content": "s"}], "<system>s"),
        ([{"role": "developer", "content": "d"}], "<system>d"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}], "<user>a\nb"),
        ([answer | {"tool_calls": calls}, {"role": "tool", "tool_call_id": "1", "content": "t"}], "<assistant>[look7]<tool>t"),
    ):
        assert client.post(CHAT, {"messages": messages}).status == 200
        assert prompts(cluster)[-1] == prompt + "<assistant>"


def test_a_chat_goes_on_with_its_last_message(client: Client, cluster: ScriptedCluster):
    messages = [*HELLO, {"role": "assistant", "content": "so"}]
    client.post(CHAT, {"messages": messages, "continue_final_message": True})
    client.post(CHAT, {"messages": messages, "add_generation_prompt": False, "chat_template_kwargs": {"style": "brief"}})
    assert prompts(cluster) == ["<user>hi<assistant>so", "<user>hi<assistant>so(brief)"]


def test_max_tokens_is_what_fits(client: Client, cluster: ScriptedCluster):
    """By default, and where more is asked for."""
    for more in ({}, {"max_tokens": 10_000}, {"max_completion_tokens": 10_000}, {"max_completion_tokens": 7, "max_tokens": 9}):
        client.post(CHAT, {"messages": HELLO, **more})
    left = 512 - len(cluster.requests[0].prompt)
    assert [request.max_new_tokens for request in cluster.requests] == [left, left, left, 7]


def test_log_probabilities_come_with_the_tokens(client: Client, cluster: ScriptedCluster):
    body = {"messages": HELLO, "max_tokens": 4, "logprobs": True, "top_logprobs": 2}
    whole = client.post(CHAT, body).json["choices"][0]["logprobs"]["content"]
    events = client.post(CHAT, body | {"stream": True}).events
    streamed = [entry for event in events for c in event["choices"] if c["logprobs"] for entry in c["logprobs"]["content"]]
    tokens = TOKENIZER.encode(SAYS, add_special_tokens=False)[:4]
    assert whole == streamed
    assert [entry["logprob"] for entry in whole] == [scored(token, 2).logprob for token in tokens]
    assert [bytes(entry["bytes"]).decode() for entry in whole] == [entry["token"] for entry in whole]
    assert [len(entry["top_logprobs"]) for entry in whole] == [2] * 4


def test_a_response_format_is_a_grammar(client: Client, cluster: ScriptedCluster):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    for given in (
        {"type": "text"},
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}},
    ):
        assert client.post(CHAT, {"messages": HELLO, "response_format": given}).status == 200
    found = [request.grammar and (request.grammar.kind, request.grammar.text) for request in cluster.requests]
    assert found == [None, ("json_object", ""), ("json_schema", json.dumps(schema, separators=(",", ":")))]


def test_reasoning_has_both_of_its_names(client: Client, cluster: ScriptedCluster):
    cluster.says = "<think>let me see</think>the answer"
    message, streamed = both_ways(client, {"messages": HELLO})
    assert (message["reasoning"], message["reasoning_content"]) == ("let me see", "let me see")
    assert message["content"] == "the answer"
    assert {name: message[name] for name in streamed} == streamed
    hidden, _ = both_ways(client, {"messages": HELLO, "include_reasoning": False})
    assert hidden == {"role": "assistant", "content": "the answer", "refusal": None}


def test_tool_calls_are_found(client: Client, cluster: ScriptedCluster):
    """Several, each with an index and an id of its own; the same streamed."""
    calls = ['{"name": "look", "arguments": {"x": 1}}', '{"name": "see", "arguments": {}}']
    cluster.says = "I look." + "".join(f"\n<call>{call}</call>" for call in calls)
    body = {"messages": HELLO, "tools": TOOLS}
    whole = client.post(CHAT, body).json["choices"][0]
    assert whole["finish_reason"] == "tool_calls"
    assert whole["message"]["content"] == "I look."
    found = whole["message"]["tool_calls"]
    assert [(call["type"], call["function"]["name"], json.loads(call["function"]["arguments"])) for call in found] == [
        ("function", "look", {"x": 1}),
        ("function", "see", {}),
    ]
    assert len({call["id"] for call in found}) == 2
    assert all("index" not in call for call in found)
    events = client.post(CHAT, body | {"stream": True}).events
    streamed = merged(deltas(events))
    assert [call["name"] for call in streamed["tool_calls"]] == ["look", "see"]
    assert [json.loads(call["arguments"]) for call in streamed["tool_calls"]] == [{"x": 1}, {}]
    assert prompts(cluster)[-1] == "<user>hi{look}{see}<assistant>"
    one = client.post(CHAT, body | {"parallel_tool_calls": False}).json["choices"][0]["message"]["tool_calls"]
    assert [call["function"]["name"] for call in one] == ["look"]


def test_a_broken_tool_call_is_text(client: Client, cluster: ScriptedCluster):
    """Also one that was cut short."""
    for says in ("well <call>{nonsense</call> then", 'well <call>{"name": "lo'):
        cluster.says = says
        message, streamed = both_ways(client, {"messages": HELLO, "tools": TOOLS})
        assert message["content"] == streamed["content"] == says
        assert "tool_calls" not in message


def test_no_tools_are_offered_without_a_choice_of_them(client: Client, cluster: ScriptedCluster):
    client.post(CHAT, {"messages": HELLO, "tools": TOOLS, "tool_choice": "none"})
    assert prompts(cluster) == ["<user>hi<assistant>"]


def test_a_named_tool_gets_its_arguments(client: Client, cluster: ScriptedCluster):
    cluster.says = '{"x": 12345}'
    body = {"messages": HELLO, "tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "see"}}}
    message, streamed = both_ways(client, body)
    assert message["content"] is None
    assert [(call["function"]["name"], call["function"]["arguments"]) for call in message["tool_calls"]] == [
        ("see", '{"x": 12345}')
    ]
    assert [(call["name"], call["arguments"]) for call in streamed["tool_calls"]] == [("see", '{"x": 12345}')]
    grammar = cluster.requests[0].grammar
    assert grammar is not None
    assert json.loads(grammar.text) == TOOLS[1]["function"]["parameters"]  # type: ignore[index]


def test_some_tool_has_to_be_called(client: Client, cluster: ScriptedCluster):
    def says(request: Request) -> str:
        return json.dumps([{"name": "look", "parameters": {"x": 3}}])

    cluster.says = says
    message, streamed = both_ways(client, {"messages": HELLO, "tools": TOOLS, "tool_choice": "required"})
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {"x": 3}
    assert streamed["tool_calls"][0]["name"] == "look"
    grammar = cluster.requests[0].grammar
    assert grammar is not None
    assert json.loads(grammar.text)["items"]["anyOf"][1]["properties"]["name"] == {"const": "see"}


def test_a_chats_tokens(client: Client):
    found = client.post("/tokenize", {"messages": HELLO, "return_token_strs": True}).json
    assert TOKENIZER.decode(found["tokens"]) == "<user>hi<assistant>"
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert found["max_model_len"] == 512
    assert client.post("/detokenize", {"tokens": found["tokens"]}).json == {"prompt": "<user>hi<assistant>"}
    plain = client.post("/tokenize", {"prompt": "def f("}).json
    assert plain["tokens"] == TOKENIZER("def f(").input_ids


def test_without_templates_what_needs_them_is_refused():
    with ScriptedCluster() as cluster, serving(cluster, chat_template=None) as client:
        error = client.post(CHAT, {"messages": HELLO})
        assert (error.status, error.error["param"]) == (400, "messages")
        assert "no chat template" in error.error["message"]
    with ScriptedCluster() as cluster, serving(cluster) as client:
        error = client.post(CHAT, {"messages": HELLO, "tools": TOOLS})
        assert (error.status, error.error["param"]) == (400, "tools")
        assert client.post(CHAT, {"messages": HELLO, "tools": TOOLS, "tool_choice": "none"}).status == 200


def test_references_within_a_forced_tools_schema(client: Client, cluster: ScriptedCluster):
    """They lead to the same place where its schema is a part of a larger one."""
    point = {"type": "object", "properties": {"next": {"$ref": "#/$defs/Point"}, "$ref": {"type": "string"}}}
    schema = {"$defs": {"Point": point}, "type": "object", "properties": {"p": {"$ref": "#/$defs/Point"}}}
    tools = [TOOLS[0], {"type": "function", "function": {"name": "draw", "parameters": schema}}]
    assert client.post(CHAT, {"messages": HELLO, "tools": tools, "tool_choice": "required"}).status == 200
    grammar = cluster.requests[0].grammar
    assert grammar is not None
    whole = json.loads(grammar.text)
    moved = whole["items"]["anyOf"][1]["properties"]["parameters"]
    place = moved["properties"]["p"]["$ref"].removeprefix("#/").split("/")
    found: Any = whole
    for step in place:
        found = found[int(step)] if isinstance(found, list) else found[step]
    assert found is moved["$defs"]["Point"]
    assert found["properties"]["$ref"] == {"type": "string"}, "a property of that name is none"


def test_a_chats_prompt_has_log_probabilities(client: Client, cluster: ScriptedCluster):
    found = client.post(CHAT, {"messages": HELLO, "prompt_logprobs": 0}).json["prompt_logprobs"]
    prompt = cluster.requests[0].prompt
    assert found[0] is None
    assert [list(each) for each in found[1:]] == [[str(token)] for token in prompt[1:]]


def test_a_template_has_its_time(monkeypatch: pytest.MonkeyPatch):
    """A checkpoint's template that never ends is ended, and other requests are served."""
    renderer = Renderer(cpu_s=0.1)
    monkeypatch.setattr(chat_template, "_renderers", lambda _: renderer)
    loop = "{% for a in range(99999) %}" * 2 + "{% endfor %}" * 2
    endless = "{% if messages[0].content == 'x' %}" + loop + "{% endif %}a"
    with ScriptedCluster() as cluster, serving(cluster, chat_template=endless) as client:
        reply = client.post(CHAT, {"messages": [{"role": "user", "content": "x"}]})
        assert (reply.status, reply.error["param"]) == (400, "messages")
        assert "of CPU time" in reply.error["message"]
        assert client.post(CHAT, {"messages": HELLO}).status == 200
