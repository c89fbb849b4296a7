"""Grammars are prepared beside the steps: nothing waits for one but its own request."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from epslots.errors import ConfigError
from epslots.generation.grammar import GrammarCompiler, GrammarState
from epslots.generation.grammar_queue import GrammarQueue, compiler_for
from epslots.generation.requests import Grammar, Request
from tests.support.hand_executor import HandExecutor
from tests.support.tokenizers import byte_level

COMPILER = GrammarCompiler(byte_level(), 260)


def request(id: str, pattern: str = "ab", resumed: bytes = b"") -> Request:
    return Request(id, (5, 6, *resumed), 9, grammar=Grammar("regex", pattern), resumed=len(resumed))


def queue_by_hand() -> tuple[GrammarQueue[str], HandExecutor]:
    executor = HandExecutor()
    return GrammarQueue(lambda: COMPILER, executor), executor


def test_a_slow_grammar_holds_up_no_other():
    queue, executor = queue_by_hand()
    for name in "abc":
        queue.put(name, request(name))
    assert queue.take() == [] and len(queue) == 3
    executor.run(2)
    executor.run(1)
    assert [name for name, _ in queue.take()] == ["b", "c"], "in the order of put"
    assert queue.take() == [] and len(queue) == 1
    executor.run(0)
    ((name, state),) = queue.take()
    assert name == "a" and isinstance(state, GrammarState)
    assert len(queue) == 0


def test_a_wrong_grammar_is_an_answer():
    queue, executor = queue_by_hand()
    queue.put("a", request("a", "("))
    executor.run(0)
    ((_, error),) = queue.take()
    assert isinstance(error, ConfigError)


def test_a_bug_is_raised_where_steps_are_made():
    def fail() -> GrammarCompiler:
        raise AssertionError("a bug")

    executor = HandExecutor()
    queue = GrammarQueue[str](fail, executor)
    queue.put("a", request("a"))
    executor.run(0)
    with pytest.raises(AssertionError, match="a bug"):
        queue.take()


def test_a_moved_request_goes_on_after_its_tokens():
    queue, executor = queue_by_hand()
    queue.put("a", request("a", "abc", resumed=b"ab"))
    executor.run(0)
    ((_, state),) = queue.take()
    assert isinstance(state, GrammarState) and not state.finished
    state.accept(ord("c"))
    assert state.finished


def test_the_compiler_is_opened_once_and_late():
    opened = []

    def open_compiler() -> GrammarCompiler:
        opened.append(None)
        return COMPILER

    executor = HandExecutor()
    queue = GrammarQueue[str](open_compiler, executor)
    queue.put("a", request("a"))
    queue.put("b", request("b"))
    assert not opened
    executor.run(1)
    executor.run(0)
    assert len(opened) == 1 and len(queue.take()) == 2


def test_threads_of_its_own_do_the_work():
    queue = GrammarQueue[int](lambda: COMPILER)
    for number in range(40):
        queue.put(number, request(str(number), "a" * (number % 5 + 1)))
    found: list[int] = []
    while len(queue):
        queue.wait(10)
        found += [number for number, _ in queue.take()]
    assert sorted(found) == list(range(40))
    queue.close()


def test_close_drops_what_waits():
    queue, executor = queue_by_hand()
    queue.put("a", request("a"))
    queue.close()
    assert len(queue) == 0 and executor.jobs[0][0].cancelled()
    GrammarQueue[str](lambda: COMPILER).close()  # no thread was started


def test_a_model_without_a_tokenizer_says_so(tmp_path: Path):
    text = SimpleNamespace(vocab_size=8)
    model: Any = SimpleNamespace(name_or_path=str(tmp_path), config=SimpleNamespace(get_text_config=lambda: text))
    with pytest.raises(ConfigError, match=r"a request with a grammar can't be served: .* has no tokenizer"):
        compiler_for(model)
