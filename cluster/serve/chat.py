"""``/v1/chat/completions``: from a request to a ``Chat``, and from portions of texts to the choices of its answer. No I/O.

A whole answer is the sum of the chunks that a stream would have, so both say the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.serve.completions import Chunk
from cluster.serve.errors import refused
from cluster.serve.message_reader import MessageReader
from cluster.serve.schema import ChatRequest, Message, NamedTool, TokenizeRequest, Tool
from cluster.serve.token_text import TokenTexts, chat_logprobs, prompt_logprobs
from epslots.errors import shown
from epslots.generation.chat_template import Chat
from epslots.generation.portions import Portion
from epslots.generation.requests import TokenLogprobs

OBJECT, CHUNK_OBJECT = "chat.completion", "chat.completion.chunk"
ID_PREFIX = "chatcmpl-"
_RESERVED = frozenset(
    ("messages", "tools", "documents", "conversations", "chat_template", "add_generation_prompt", "continue_final_message")
) | {"return_assistant_tokens_mask"}
"""Variables of a template that other fields set."""


def chat_of(body: ChatRequest | TokenizeRequest, template: str | None) -> Chat:
    """The chat of a request.

    Args:
        body: the request; it has messages.
        template: in place of the tokenizer's.

    Raises:
        ApiError: a message or a variable isn't allowed.
    """
    variables = dict(body.chat_template_kwargs or {})
    if wrong := sorted(_RESERVED & variables.keys()):
        raise refused(f"chat_template_kwargs: {wrong[0]!r} isn't allowed; other fields say it", "chat_template_kwargs")
    if (effort := getattr(body, "reasoning_effort", None)) is not None:
        variables.setdefault("reasoning_effort", effort)
    goes_on = bool(body.continue_final_message)
    tools = offered_tools(body)
    begin = not goes_on if body.add_generation_prompt is None else body.add_generation_prompt
    return Chat(
        messages=tuple(_message(number, message) for number, message in enumerate(body.messages or ())),
        tools=[tool.model_dump(exclude_none=True) for tool in tools] or None,
        template=template,
        add_generation_prompt=begin,
        continue_final_message=goes_on,
        variables=variables,
    )


def offered_tools(body: ChatRequest | TokenizeRequest) -> list[Tool]:
    """The tools in the model's prompt; none with tool_choice "none"."""
    if getattr(body, "tool_choice", None) == "none":
        return []
    return list(body.tools or ())


def _message(number: int, message: Message) -> dict[str, Any]:
    """A message as templates read it; transformers itself gives reasoning its other names."""
    role = "system" if message.role == "developer" else message.role
    found: dict[str, Any] = {"role": role, "content": message.text or ""}
    for name in ("name", "tool_call_id"):
        if (value := getattr(message, name)) is not None:
            found[name] = value
    if (reasoning := message.reasoning_content or message.reasoning) is not None:
        found["reasoning_content"] = reasoning
    if message.tool_calls:
        found["tool_calls"] = [
            {
                **({} if call.id is None else {"id": call.id}),
                "type": "function",
                "function": {"name": call.function.name, "arguments": _arguments(number, call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    return found


def _arguments(number: int, given: str | Mapping[str, Any]) -> Mapping[str, Any]:
    """A call's arguments as templates read them: an object."""
    try:
        found = json.loads(given or "{}") if isinstance(given, str) else given
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, Mapping):
        raise refused(
            f"messages.{number}.tool_calls: arguments must be the text of a JSON object (given: {shown(given)})",
            f"messages.{number}.tool_calls",
        )
    return found


def tool_grammar(body: ChatRequest) -> dict[str, Any]:
    """The setting that makes the model call a tool, if the request says that it has to; else empty.

    Raises:
        ApiError: the request asks for another grammar, too.
    """
    if isinstance(body.tool_choice, NamedTool):
        name = body.tool_choice.function.name
        return {"json_schema": _parameters(next(tool for tool in body.tools or () if tool.function.name == name))}
    if body.tool_choice != "required":
        return {}
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                "parameters": _moved(_parameters(tool), f"#/items/anyOf/{number}/properties/parameters"),
            },
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for number, tool in enumerate(body.tools or ())
    ]
    most = {} if body.parallel_tool_calls is not False else {"maxItems": 1}
    return {"json_schema": {"type": "array", "minItems": 1, **most, "items": {"anyOf": calls}}}


def _parameters(tool: Tool) -> dict[str, Any]:
    return tool.function.parameters or {"type": "object", "properties": {}, "additionalProperties": False}


def _moved(schema: Any, place: str) -> Any:
    """A schema with its references to itself as they are at another place of a larger one."""
    if isinstance(schema, list):
        return [_moved(each, place) for each in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {name: _moved(value, place) for name, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = place + reference[1:]
    return moved


class ChatAnswer:
    """Makes the choices of an answer.

    Args:
        request: as it was asked.
        readers: of each choice's message.
        texts: of tokens.
    """

    def __init__(self, request: ChatRequest, readers: Sequence[MessageReader], texts: TokenTexts) -> None:
        self._readers, self._texts = readers, texts
        self._with_logprobs, self._prompt_top = bool(request.logprobs), request.prompt_logprobs
        self._of_prompt: list[TokenLogprobs] = []
        self.new_tokens = 0
        """Of all choices so far."""

    def opening(self) -> list[Chunk]:
        """The chunks before the first portion: later ones have no role."""
        return [_chunk(choice, {"role": "assistant", "content": ""}) for choice in range(len(self._readers))]

    def take(self, choice: int, portion: Portion) -> list[Chunk]:
        """The chunks for a choice's next portion."""
        self.new_tokens += len(portion.tokens)
        self._of_prompt += portion.prompt_logprobs
        reader = self._readers[choice]
        deltas = reader.push(portion.text or "")
        if portion.reason:
            deltas += reader.finish()
        chunks = [_chunk(choice, delta) for delta in deltas]
        if self._with_logprobs and portion.tokens:
            chunks = chunks or [_chunk(choice, {})]
            chunks[0]["logprobs"] = chat_logprobs(self._texts, portion.logprobs)
        if portion.reason:
            called = reader.called and portion.reason == "stop"
            chunks.append(_chunk(choice, {}) | {"finish_reason": "tool_calls" if called else portion.reason})
        return chunks

    def complete(self, whole: dict[str, Any]) -> None:
        """Add the prompt's log-probabilities to a whole answer, if they were asked for."""
        if self._prompt_top is not None:
            whole["prompt_logprobs"] = prompt_logprobs(self._texts, self._of_prompt, self._prompt_top)


def _chunk(choice: int, delta: dict[str, Any]) -> Chunk:
    return {"index": choice, "delta": delta, "logprobs": None, "finish_reason": None}


def joined_chat(chunks: Sequence[Chunk]) -> Chunk:
    """A choice of a whole answer, of all its chunks."""
    message: dict[str, Any] = {"role": "assistant", "content": None, "refusal": None}
    texts: dict[str, list[str]] = {}
    calls: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for name, value in chunk["delta"].items():
            if name == "tool_calls":
                _add_calls(calls, value)
            elif name != "role":
                texts.setdefault(name, []).append(value)
    message |= {name: "".join(parts) for name, parts in texts.items()}
    if calls:
        message["tool_calls"] = [calls[index] for index in sorted(calls)]
        message["content"] = message["content"] or None
    logprobs = [entry for chunk in chunks if chunk["logprobs"] for entry in chunk["logprobs"]["content"]]
    asked = any(chunk["logprobs"] is not None for chunk in chunks)
    return {
        "index": chunks[0]["index"],
        "message": message,
        "logprobs": {"content": logprobs, "refusal": None} if asked else None,
        "finish_reason": chunks[-1]["finish_reason"],
    }


def _add_calls(calls: dict[int, dict[str, Any]], deltas: Sequence[Mapping[str, Any]]) -> None:
    for delta in deltas:
        if delta["index"] in calls:
            calls[delta["index"]]["function"]["arguments"] += delta["function"]["arguments"]
        else:
            function = {name: delta["function"][name] for name in ("name", "arguments")}
            calls[delta["index"]] = {"id": delta["id"], "type": "function", "function": function}
