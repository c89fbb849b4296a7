"""Chat templates that are several, broken or hostile: the right text, or one message, within limits of time and memory."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import psutil
import pytest
from transformers import PreTrainedTokenizerBase

from epslots.errors import ConfigError
from epslots.example import example_model
from epslots.generation import chat_template
from epslots.generation.chat_template import Chat, Renderer, Renderers, find_template, render
from epslots.generation.text import encode_chat, encode_prompt, load_tokenizer

GOOD = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ '<A>' * add_generation_prompt }}"
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(example_model())


@pytest.fixture(scope="module", autouse=True)
def renderer() -> Iterator[Renderer]:
    """With less time: the limit is the same."""
    with pytest.MonkeyPatch.context() as patch:
        one = Renderer(cpu_s=0.5, memory_bytes=128 * 1024**2)
        patch.setattr(chat_template, "_renderers", lambda _: one)
        yield one
        one._end()


def test_the_text_is_what_transformers_makes_of_it(tokenizer: PreTrainedTokenizerBase):
    for template in (GOOD, {"default": GOOD, "tool_use": "other"}, "{{ messages | tojson }}", "{{ 'a' * 3 }}"):
        tokenizer.chat_template = template
        for text in ("hi", "a\u2028b\x85\U0001f642\x00\r\n{{ 7 * 7 }}"):
            turns = [{"role": "user", "content": text}]
            expected = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
            assert encode_prompt(tokenizer, text, chat=True) == encode_prompt(tokenizer, text) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ({"tool_use": "x", "rag": "y"}, "has the chat templates rag, tool_use, and none is called 'default'"),
        (5, "chat template is no text, but int"),
        ({"default": ["x"]}, "chat template is no text, but list"),
        ("{% for", "the chat template is broken: line 1: unexpected"),
        ("{{ messages[0].nothing.there }}", "the chat template is broken: .* has no attribute 'nothing'"),
        ("{{ 1 / 0 }}", "the chat template is broken: ZeroDivisionError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "the chat template is broken: RecursionError"),
        ("{{ ''.__class__.__mro__ }}", "the chat template is broken: access to attribute '__class__'.*unsafe"),
        ("{{ raise_exception('only about cats') }}", "the chat template refuses the prompt: only about cats"),
        ("{{ '' }}", "has no tokens"),
    ],
)
def test_bad_templates_are_named(template: Any, message: str, tokenizer: PreTrainedTokenizerBase):
    tokenizer.chat_template = template
    with pytest.raises(ConfigError, match=message):
        encode_prompt(tokenizer, "hi")
    assert encode_prompt(tokenizer, "hi", chat=False), "the text alone can be served"


@pytest.mark.parametrize("given", [None, {}])
def test_no_template_is_needed_unless_it_is_asked_for(given: Any, tokenizer: PreTrainedTokenizerBase):
    tokenizer.chat_template = given
    assert find_template(tokenizer) is None
    assert encode_prompt(tokenizer, "hi") == encode_prompt(tokenizer, "hi", chat=False)
    with pytest.raises(ConfigError, match=r"chat=True: this tokenizer has no chat template; allowed: False or None"):
        encode_prompt(tokenizer, "hi", chat=True)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (ENDLESS, r"takes more than the 0.5 s of CPU time"),
        ("{{ 7 ** (7 ** 9) }}", r"takes more than the 0.5 s of CPU time"),  # one operation, which no thread survives
        ("{{ 'x' * 10000000000 }}", r"needs more memory than the"),
        ("{{ 'x' * 100000 }}", r"makes 100,000 characters of the prompt; at most 70,000 fit"),
    ],
)
def test_hostile_templates_end_at_a_limit(template: str, message: str, tokenizer: PreTrainedTokenizerBase):
    with pytest.raises(ConfigError, match=message):
        render(tokenizer, template, Chat.of_user("hi"), most_chars=70_000)
    assert render(tokenizer, "{{ messages[0].content }}", Chat.of_user("hi"), most_chars=10) == "hi", "the next one is served"


def test_a_process_that_is_killed_is_replaced(renderer: Renderer, tokenizer: PreTrainedTokenizerBase):
    assert render(tokenizer, "a", Chat.of_user("hi"), most_chars=None) == "a"
    assert renderer._process is not None
    renderer._process.kill()
    with pytest.raises(ConfigError, match=rf"the process for chat templates ended \(exit code {-signal.SIGKILL}\)"):
        render(tokenizer, "b", Chat.of_user("hi"), most_chars=None)
    assert render(tokenizer, "b", Chat.of_user("hi"), most_chars=None) == "b"


def test_the_process_ends_with_its_owner():
    """Also when that is killed."""
    code = (
        "import json, os, signal; from epslots.generation.chat_template import Renderer; one = Renderer();"
        "one.ask({'template': 'x', 'messages': [], 'variables': {}, 'most_chars': None});"
        "print(one._process.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    process = int(done.stdout)
    assert done.returncode == -signal.SIGKILL
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(process).wait(60)


def test_a_module_in_the_working_folder_is_not_run(tmp_path: Any, monkeypatch: pytest.MonkeyPatch):
    for name in ("json", "jinja2", "transformers", "epslots"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    one = Renderer()
    assert one.ask({"template": "x", "messages": [], "variables": {}, "most_chars": None}) == {"text": "x"}
    one._end()
    assert not (tmp_path / "ran").exists()


def test_without_a_process_the_text_alone_can_be_served(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(ConfigError, match=r"can't be started \(.*No such file.*\); allowed without it: chat=False"):
        Renderer().ask({})


def test_a_busy_renderer_holds_up_no_other():
    """And the second is used only while the first is busy."""

    class Held:
        def __init__(self) -> None:
            self.asked = 0
            self.busy, self.may_go_on = threading.Event(), threading.Event()

        def ask(self, request: dict[str, Any]) -> dict[str, Any]:
            self.asked += 1
            if request.get("slow"):
                self.busy.set()
                assert self.may_go_on.wait(60)
            return {"text": "x"}

    second, first = Held(), Held()
    both = Renderers([second, first])  # type: ignore[list-item]
    for _ in range(3):
        both.ask({})
    assert (first.asked, second.asked) == (3, 0)
    slow = threading.Thread(target=both.ask, args=({"slow": True},))
    slow.start()
    assert first.busy.wait(60)
    assert both.ask({}) == {"text": "x"} and second.asked == 1
    first.may_go_on.set()
    slow.join()


def test_a_whole_chat_is_encoded(tokenizer: PreTrainedTokenizerBase):
    """Messages, tools and variables reach the template; a message can be gone on with."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    tools = [{"type": "function", "function": {"name": "look"}}]
    template = GOOD + "{{ mood }}{% for t in tools or () %}[{{ t.function.name }}]{% endfor %}"
    for chat, text in (
        (Chat(messages, tools=tools, template=template, variables={"mood": "!"}), "<user>a<assistant>b<A>![look]"),
        (Chat(messages, template=GOOD, add_generation_prompt=False), "<user>a<assistant>b"),
        (Chat(messages, template=GOOD, add_generation_prompt=False, continue_final_message=True), "<user>a<assistant>b"),
    ):
        assert tokenizer.decode(encode_chat(tokenizer, chat)).removeprefix(str(tokenizer.bos_token)) == text


def test_chats_that_cant_be_encoded(tokenizer: PreTrainedTokenizerBase):
    chat = Chat.of_user("hi")
    with pytest.raises(ConfigError, match="has no chat template"):
        encode_chat(tokenizer, chat)
    with pytest.raises(ConfigError, match="no tokens of these messages"):
        encode_chat(tokenizer, replace(chat, template="{{ '' }}"))
    with pytest.raises(ConfigError, match="refuses the prompt: no"):
        encode_chat(tokenizer, replace(chat, template="{{ raise_exception('no') }}"))
    with pytest.raises(ConfigError, match="at most"):
        encode_chat(tokenizer, replace(chat, template="{{ 'ab ' * 100000 }}"), most_tokens=10)
