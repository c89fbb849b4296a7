"""From an assistant's text, as it comes, to the fields of its message: content, reasoning, tool calls.

``PlainReader``      text is content
``TemplateReader``   transformers' response template finds reasoning and tool calls
``NamedToolReader``  the text is the arguments of the one tool that has to be called
``ToolListReader``   the text is a JSON list of calls, because some tool has to be called

Each returns deltas, as a stream of OpenAI's API has them.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from transformers.utils.chat_parsing import ResponseParser
    from transformers.utils.chat_parsing.response_templates import ResponseTemplate

Delta = dict[str, Any]
logger = logging.getLogger("epslots.serve")


class MessageReader(Protocol):
    """Reads one message."""

    def push(self, text: str) -> list[Delta]:
        """The deltas for the next text."""

    def finish(self) -> list[Delta]:
        """The deltas of what was held back; no text follows."""

    @property
    def called(self) -> bool:
        """Whether a tool was called."""


def new_call_id() -> str:
    """An id for a tool call."""
    return f"call_{secrets.token_hex(12)}"


def _tool_call(index: int, name: str, arguments: str, id: str) -> Delta:
    return {"tool_calls": [{"index": index, "id": id, "type": "function", "function": {"name": name, "arguments": arguments}}]}


class PlainReader:
    """Text is content."""

    called = False

    def push(self, text: str) -> list[Delta]:
        return [{"content": text}] if text else []

    def finish(self) -> list[Delta]:
        return []


class NamedToolReader:
    """The text is a tool's arguments.

    Args:
        name: the tool's.
        new_id: makes the call's id.
    """

    def __init__(self, name: str, new_id: Callable[[], str] = new_call_id) -> None:
        self._name, self._new_id = name, new_id
        self.called = False

    def push(self, text: str) -> list[Delta]:
        if not text:
            return []
        if not self.called:
            self.called = True
            return [_tool_call(0, self._name, text, self._new_id())]
        return [{"tool_calls": [{"index": 0, "function": {"arguments": text}}]}]

    def finish(self) -> list[Delta]:
        return []


class ToolListReader:
    """The text is a JSON list of objects with "name" and "parameters". A text that was cut short is content.

    Args:
        parallel: several calls are allowed.
        new_id: makes the calls' ids.
    """

    def __init__(self, parallel: bool, new_id: Callable[[], str] = new_call_id) -> None:
        self._parallel, self._new_id = parallel, new_id
        self._text = ""
        self.called = False

    def push(self, text: str) -> list[Delta]:
        self._text += text
        return []

    def finish(self) -> list[Delta]:
        try:
            calls = json.loads(self._text)
            found = [(str(call["name"]), json.dumps(call["parameters"], ensure_ascii=False)) for call in calls]
        except (ValueError, TypeError, KeyError):
            return [{"content": self._text}] if self._text else []
        self.called = bool(found)
        chosen = found if self._parallel else found[:1]
        return [_tool_call(index, name, text, self._new_id()) for index, (name, text) in enumerate(chosen)]


class TemplateReader:
    """Reads by transformers' response template. Text that doesn't follow it is content.

    A tool call is one delta, when it is whole: its arguments are known only then.

    Args:
        template: the response template.
        prompt: the chat's text, which may have begun the message.
        tools: the tools that the model was offered; their schemas give arguments their types.
        parallel: several calls are allowed.
        reasoning: return the reasoning.
        new_id: makes the calls' ids.
    """

    def __init__(
        self,
        template: ResponseTemplate,
        prompt: str,
        tools: Sequence[Mapping[str, Any]],
        *,
        parallel: bool = True,
        reasoning: bool = True,
        new_id: Callable[[], str] = new_call_id,
    ) -> None:
        self._parallel, self._reasoning, self._new_id = parallel, reasoning, new_id
        from transformers.utils.chat_parsing import ResponseParser  # here: it takes a moment that the service's start hasn't

        self._parser: ResponseParser | None = ResponseParser(template, prefix=prompt, tools=list(tools))
        self._calls = 0
        self._unpassed = ""
        """Text whose meaning isn't known yet."""
        self._began: set[str] = set()

    @property
    def called(self) -> bool:
        return self._calls > 0

    def push(self, text: str) -> list[Delta]:
        if self._parser is None:
            return [{"content": text}] if text else []
        self._unpassed += text
        try:
            events = self._parser.feed(text)
        except Exception as error:  # the template's patterns and parsers meet any text of a model
            return self._give_up(error)
        return self._deltas(events)

    def finish(self) -> list[Delta]:
        if self._parser is None:
            return []
        try:
            _, events = self._parser.finalize()
        except Exception as error:
            return self._give_up(error)
        return self._deltas(events)

    def _give_up(self, error: Exception) -> list[Delta]:
        """Pass the region that can't be read, and all later text, on as content."""
        logger.info("a text doesn't follow the response template: %s", type(error).__name__)
        self._parser = None
        rest, self._unpassed = self._unpassed, ""
        return [{"content": rest}] if rest else []

    def _deltas(self, events: Sequence[Mapping[str, Any]]) -> list[Delta]:
        found: list[Delta] = []
        for event in events:
            if event["type"] == "region_chunk" and not event["dirty"]:
                self._unpassed = self._unpassed.partition(event["text"])[2]
                found += self._text_delta(event["field"], event["text"])
            elif event["type"] == "region_close":
                if event["field"] not in _TEXT_FIELDS:  # it had been kept as a whole
                    self._unpassed = ""
                found += self._closed(event["field"], event["value"])
        return found

    def _text_delta(self, field: str, text: str) -> list[Delta]:
        name = _TEXT_FIELDS.get(field)
        if name is None:
            return []
        if field not in self._began:  # transformers strips a field's text, too
            text = text.lstrip()
            if not text:
                return []
            self._began.add(field)
        if name == "reasoning":
            return [{"reasoning": text, "reasoning_content": text}] if self._reasoning else []
        return [{"content": text}]

    def _closed(self, field: str, value: Any) -> list[Delta]:
        if field != "tool_calls":
            return []
        found = []
        for call in value if isinstance(value, list) else [value]:
            function = call.get("function", {}) if isinstance(call, dict) else {}
            if not isinstance(function.get("name"), str) or (self._calls and not self._parallel):
                continue
            arguments = function.get("arguments", {})
            text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            found.append(_tool_call(self._calls, function["name"], text, self._new_id()))
            self._calls += 1
        return found


_TEXT_FIELDS = {"content": "content", "reasoning_content": "reasoning", "reasoning": "reasoning", "thinking": "reasoning"}
"""Fields of response templates whose text is passed on as it comes; several name the reasoning."""
