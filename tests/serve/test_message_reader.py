"""Assistants' texts become content, reasoning and tool calls, however the text is cut into pieces."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.cli.serving import utils as transformers_serving

from cluster.serve.message_reader import MessageReader, NamedToolReader, PlainReader, TemplateReader, ToolListReader
from cluster.serve.response_template import _FILE, check_response_template, response_template_of
from epslots.errors import ConfigError
from tests.support.tokenizers import TOKENIZERS

QWEN = response_template_of(TOKENIZERS["bytes"], "qwen3_moe")
CALL = '<tool_call>\n{"name": "look", "arguments": {"x": %d}}\n</tool_call>'
TEXTS = {
    "plain": ("Hello there.", {"content": "Hello there."}),
    "reasoning": ("<think>\nlet me\n</think>\n\nYes.", {"reasoning": "let me\n", "content": "Yes."}),
    "one call": ("I look.\n" + CALL % 1, {"content": "I look.", "calls": [("look", {"x": 1})]}),
    "two calls": (CALL % 1 + "\n" + CALL % 2, {"calls": [("look", {"x": 1}), ("look", {"x": 2})]}),
    "reasoning and a call": ("<think>a</think>" + CALL % 3, {"reasoning": "a", "calls": [("look", {"x": 3})]}),
    "a broken call": ("So <tool_call>{no}</tool_call> then", {"content": "So <tool_call>{no}</tool_call> then"}),
    "a call cut short": ('So <tool_call>{"na', {"content": 'So <tool_call>{"na'}),
    "like a call": ("a < b <tool", {"content": "a < b <tool"}),
}


def ids() -> Callable[[], str]:
    numbers = itertools.count()
    return lambda: f"call_{next(numbers)}"


def reader(**settings: Any) -> TemplateReader:
    assert QWEN is not None
    return TemplateReader(QWEN, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", [], new_id=ids(), **settings)


def read(one: MessageReader, pieces: Iterator[str] | list[str]) -> dict[str, Any]:
    """The message, put together."""
    found: dict[str, Any] = {}
    deltas = [delta for piece in pieces for delta in one.push(piece)] + one.finish()
    for delta in deltas:
        if "content" in delta:
            found["content"] = found.get("content", "") + delta["content"]
        if "reasoning" in delta:
            assert delta["reasoning_content"] == delta["reasoning"]
            found["reasoning"] = found.get("reasoning", "") + delta["reasoning"]
        for call in delta.get("tool_calls", ()):
            calls = found.setdefault("calls", [])
            assert (call["index"], call["id"]) == (len(calls), f"call_{len(calls)}")
            calls.append((call["function"]["name"], json.loads(call["function"]["arguments"])))
    assert one.called == ("calls" in found)
    return found


@pytest.mark.parametrize("name", TEXTS)
@given(data=st.data())
def test_pieces_make_no_difference(name: str, data: st.DataObject):
    text, message = TEXTS[name]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
    assert read(reader(), pieces) == message


TOOL: Any = {
    "type": "function",
    "function": {
        "name": "look",
        "parameters": {"type": "object", "properties": {"x": {"type": "integer"}, "at": {"type": "string"}}},
    },
}
FAMILIES = {
    "qwen3_moe": (
        "<|im_start|>assistant\n",
        "<think>\nhm</think>\n\nI look.\n"
        + "\n".join(
            f'<tool_call>\n{{"name": "look", "arguments": {{"x": {x}, "at": "a <b> {{c}}"}}}}\n</tool_call>' for x in (1, 2)
        ),
    ),
    "qwen3_5_moe": (
        "<|im_start|>assistant\n",
        "<think>\nhm</think>\n\nI look.\n\n"
        + "\n".join(
            f"<tool_call>\n<function=look>\n<parameter=x>\n{x}\n</parameter>\n<parameter=at>\na <b> {{c}}\n</parameter>\n"
            "</function>\n</tool_call>"
            for x in (1, 2)
        ),
    ),
    "gemma4": (
        "<|turn>model\n",
        "<|channel>thought\nhm<channel|>I look."
        + "".join(f'<|tool_call>call:look{{x:{x},at:<|"|>a <b> {{c}}<|"|>}}<tool_call|>' for x in (1, 2)),
    ),
}
"""By the kind of model: the end of a prompt, and one message in the family's notation."""


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
def test_families_write_the_same_message_their_way(family: str, data: st.DataObject):
    template, (prompt, text) = response_template_of(TOKENIZERS["bytes"], family), FAMILIES[family]
    assert template is not None
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
    assert read(TemplateReader(template, prompt, [TOOL], new_id=ids()), pieces) == {
        "reasoning": "hm",
        "content": "I look.",
        "calls": [("look", {"x": 1, "at": "a <b> {c}"}), ("look", {"x": 2, "at": "a <b> {c}"})],
    }


def test_a_message_that_the_prompt_has_begun():
    """Templates of models that always think end with the beginning of the thought."""
    assert QWEN is not None
    one = TemplateReader(QWEN, "<|im_start|>assistant\n<think>\n", [], new_id=ids())
    assert read(one, ["hm</think>", "No."]) == {"reasoning": "hm", "content": "No."}


def test_one_call_alone_and_no_reasoning():
    text = "<think>a</think>" + CALL % 1 + "\n" + CALL % 2
    assert read(reader(parallel=False, reasoning=False), [text]) == {"calls": [("look", {"x": 1})]}


def test_arguments_have_their_schemas_types():
    """Where the notation has text alone, a tool's schema says what is a number."""
    template = response_template_of(TOKENIZERS["bytes"], "qwen3_5_moe")
    assert template is not None
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}}
    tools = [{"type": "function", "function": {"name": "look", "parameters": schema}}]
    text = "<tool_call>\n<function=look>\n<parameter=x>\n7\n</parameter>\n</function>\n</tool_call>"
    one = TemplateReader(template, "<|im_start|>assistant\n", tools, new_id=ids())
    assert read(one, [text]) == {"calls": [("look", {"x": 7})]}


def test_a_forced_tools_arguments_stream():
    one = NamedToolReader("look", ids())
    pieces = [one.push(piece) for piece in ("", '{"x"', ": 1}")]
    assert pieces[0] == []
    assert pieces[1][0]["tool_calls"][0] == {
        "index": 0, "id": "call_0", "type": "function", "function": {"name": "look", "arguments": '{"x"'},
    }  # fmt: skip
    assert pieces[2] == [{"tool_calls": [{"index": 0, "function": {"arguments": ": 1}"}}]}]
    assert one.called
    assert one.finish() == []


def test_a_list_of_forced_calls():
    text = '[{"name": "a", "parameters": {"x": 1}}, {"name": "b", "parameters": {}}]'
    assert read(ToolListReader(True, ids()), [text[:9], text[9:]]) == {"calls": [("a", {"x": 1}), ("b", {})]}
    assert read(ToolListReader(False, ids()), [text]) == {"calls": [("a", {"x": 1})]}
    assert read(ToolListReader(True, ids()), [text[:40]]) == {"content": text[:40]}


def test_plain_text_is_content():
    assert read(PlainReader(), ["a", "", "b"]) == {"content": "ab"}


def test_the_file_holds_transformers_own_templates():
    """They are private there."""
    ours = {tuple(family["model_types"]): family["response_template"] for family in msgspec.json.decode(_FILE.read_bytes())}
    assert ours == transformers_serving._RESPONSE_TEMPLATE_FALLBACKS


def test_a_tokenizers_own_template_comes_first():
    own: Any = SimpleNamespace(
        response_template={"start_anchor": "A", "fields": {"content": {"close": "B", "content": "text"}}}
    )
    found = response_template_of(own, "qwen3_moe")
    assert found is not None
    assert list(found.fields) == ["content"]
    own.response_template = {"fields": 3}
    assert response_template_of(own, "qwen3_moe") is not None, "a broken one is left out"
    assert response_template_of(own, "mixtral") is None
    with pytest.raises(ConfigError, match="a response template that isn't one"):
        check_response_template({"fields": 3})
