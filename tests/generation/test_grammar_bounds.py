"""Grammars that are wrong or too much are refused by name, in little time, wherever they come in."""

from __future__ import annotations

import json
import random
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest

from epslots.errors import ConfigError
from epslots.generation.grammar import MOST_GRAMMAR_BYTES, GrammarCompiler, GrammarState, check_grammar
from epslots.generation.requests import Grammar, GrammarKind
from tests.support.tokenizers import TOKENIZERS

MOST_CPU_S = 1.0
COMPILER = GrammarCompiler(TOKENIZERS["bytes"], len(TOKENIZERS["bytes"]))


def nested(depth: int) -> str:
    return depth * '{"type": "array", "items": ' + "{}" + depth * "}"


def linked(count: int) -> str:
    """Definitions that each refer to the next."""
    chain = {f"d{n}": {"type": "array", "items": {"$ref": f"#/$defs/d{n + 1}"}} for n in range(count)}
    return json.dumps({"$defs": chain | {f"d{count}": {"type": "null"}}, "$ref": "#/$defs/d0"})


REFUSED: list[tuple[GrammarKind, str, str]] = [
    ("json_schema", '{"type": "objec"}', "json_schema: .*objec"),
    ("json_schema", '{"type": "string", "not": {}}', "json_schema: .*not"),
    ("json_schema", '{"properties": {"a": {"uniqueItems": true}}}', "json_schema: .*uniqueItems"),
    ("json_schema", '{"type": "string", "format": "no such"}', "json_schema: .*no such"),
    ("json_schema", '{"type": "string", "pattern": "("}', "json_schema: "),
    ("json_schema", '{"$ref": "https://example.org/schema"}', "json_schema: "),
    ("json_schema", '{"$ref": "#/$defs/missing"}', "json_schema: "),
    ("json_schema", '{"allOf": [{"type": "string"}, {"type": "number"}]}', "json_schema: .*"),
    ("json_schema", '{"oneOf": [{"type": "number"}, {"type": "integer"}]}', "json_schema: .*oneOf"),
    ("json_schema", '{"x-guidance": {"lenient": true}}', "json_schema: x-guidance sets options of the library; leave it out"),
    ("json_schema", '{"minimum": NaN}', "NaN isn't JSON; allowed: a JSON object"),
    ("json_schema", "[1]", "json_schema='\\[1\\]'; allowed: a JSON object"),
    ("json_schema", "true", "json_schema='true'; allowed: a JSON object"),
    ("json_schema", '{"a"', "Expecting ':' delimiter.*; allowed: a JSON object"),
    ("json_schema", nested(1000), "json_schema"),
    ("json_schema", nested(100_000)[:MOST_GRAMMAR_BYTES], "json_schema"),
    ("json_schema", " " * MOST_GRAMMAR_BYTES + "{}", "allowed: text of at most 65,536 bytes"),
    ("regex", "é" * MOST_GRAMMAR_BYTES, "allowed: text of at most 65,536 bytes"),
    ("regex", "(", "regex: unclosed group$"),
    ("regex", "", "regex=''; allowed: an expression that isn't empty, without a backslash at its end"),
    ("regex", "a\\\\\\", "without a backslash at its end"),
    ("regex", "(?=a)b", "regex: .*look-around"),
    ("regex", r"(a)\1", "regex: .*backreferences"),
    ("regex", "a" + 2000 * "(" + "b" + 2000 * ")", "regex: .*nest"),
    ("regex", "\udc00", "character 0 is half of a pair"),
    ("lark", "start: a\na: missing", 'grammar: at 2\\(4\\): unknown name: "missing"$'),
    ("lark", "a: b", "grammar: .*start"),
    ("lark", "start: <|im_end|>", 'grammar: at 1\\(8\\): unknown special token: "<|im_end|>"'),
    ("lark", '%llguidance {"no_forcing": false}\nstart: "a"', "grammar: %llguidance sets options"),
    ("lark", "start: " + 10_000 * "(" + '"a"' + 10_000 * ")", "grammar: .*nested"),
    ("lark", '{"grammars": [{"json_schema": {}}]}', "grammar: "),
]


@pytest.mark.parametrize(("kind", "text", "message"), REFUSED)
def test_wrong_grammars_are_refused_by_name(kind: GrammarKind, text: str, message: str):
    began = time.process_time()
    with pytest.raises(ConfigError, match=message) as error:
        prepare(kind, text)
    assert len(str(error.value)) < 600
    assert time.process_time() - began < MOST_CPU_S


def prepare(kind: GrammarKind, text: str) -> GrammarState:
    """As the caller and then the rank do it."""
    check_grammar(kind, text)
    return COMPILER.start(Grammar(kind, text), frozenset())


def groups(depth: int) -> str:
    """Rules of brackets in brackets, as many as a grammar may have: each recurses into the next."""
    rule = "r{0}:" + depth * "(" + "r{1}" + depth * ")" + "\n"
    text, count = "start: r0\n", 0
    while len(text) + len(rule) + 20 < MOST_GRAMMAR_BYTES:
        text, count = text + rule.format(count, count + 1), count + 1
    return text + f'r{count}: "a"'


HEAVY: dict[str, tuple[GrammarKind, str]] = {
    "repeats": ("regex", "(?:a{1000}){1000}"),
    "bounds in bounds": ("regex", "(?:(?:[ab]{0,100}){0,100}){0,100}"),
    "stars in stars": ("regex", "(?:(?:(?:a*)*)*)*b"),
    "many states": ("regex", "[ab]*a[ab]{200}"),
    "classes": ("regex", r"(?:(?:\w{1,30}[ab]){1,30}\s{0,9}){1,300}"),
    "long": ("regex", ".{0,60000}x"),
    "alternatives": ("regex", "|".join(f"{n:x}" for n in range(10_000))),
    "references": ("json_schema", linked(1000)),
    "alike alternatives": ("json_schema", json.dumps({"anyOf": [{"type": "string", "maxLength": n} for n in range(1000)]})),
    "pattern": ("json_schema", json.dumps({"type": "string", "pattern": "(a|b)*a(a|b){100}", "maxLength": 100_000})),
    "items": ("json_schema", json.dumps({"type": "array", "items": {"type": "string"}, "minItems": 10_000_000})),
    "products": (
        "json_schema",
        json.dumps({"allOf": [{"anyOf": [{"required": [f"a{n}{m}"]} for m in range(9)]} for n in range(40)]}),
    ),
    "properties": ("json_schema", json.dumps({"properties": {f"p{n}": {"type": "integer"} for n in range(1000)}})),
    "rules": ("lark", "start: r0\n" + "".join(f"r{n}: r{n + 1}\n" for n in range(5000)) + 'r5000: "a"'),
    "groups": ("lark", groups(1)),
    "groups in groups": ("lark", groups(28)),
    "ambiguous rules": ("lark", 'start: e+\ne: "a" | e e | e e e'),
    "empty rules": ("lark", "start: start start | start start start |"),
}
MOST_TOKEN_CPU_S = 0.3


@pytest.mark.parametrize("name", HEAVY)
def test_heavy_grammars_take_little_time(name: str):
    """They are compiled or refused soon, and then they go on or end with an error: no token takes long."""
    began, state = time.process_time(), None
    with suppress(ConfigError):
        state = prepare(*HEAVY[name])
    assert time.process_time() - began < MOST_CPU_S
    rng = random.Random(0)
    for _ in range(60):
        if state is None or state.finished or state.error:
            break
        bits = np.flatnonzero(np.unpackbits(state.allowed().view(np.uint8), bitorder="little"))
        began = time.process_time()
        state.accept(int(rng.choice(bits)))
        state.allowed()
        assert time.process_time() - began < MOST_TOKEN_CPU_S


@pytest.mark.parametrize("name", ["bounds in bounds", "ambiguous rules"])
def test_a_text_that_takes_too_much_work_is_an_error(name: str):
    state, rng = prepare(*HEAVY[name]), random.Random(0)
    for _ in range(300):
        bits = np.flatnonzero(np.unpackbits(state.allowed().view(np.uint8), bitorder="little"))
        assert len(bits), "a token can always be chosen"
        if state.error:
            break
        state.accept(int(rng.choice(bits)))
    assert state.error is not None and not state.finished
    assert re.search("too many expressions|row has .* items", state.error)


def test_a_request_pays_for_its_own_text_alone(monkeypatch: pytest.MonkeyPatch):
    """However much others with the same grammar have written, it may use as many states."""
    monkeypatch.setattr("epslots.generation.grammar._MOST_STATES", 1000)
    a, b = (TOKENIZERS["bytes"](letter)["input_ids"][0] for letter in "ab")

    def tokens_until_error() -> int:
        state, rng = prepare("regex", "[ab]*a[ab]{12}"), random.Random(0)
        for count in range(10_000):
            state.allowed()
            if state.error:
                return count
            state.accept(rng.choice((a, b)))
        raise AssertionError("more states than allowed")

    assert tokens_until_error() == tokens_until_error() > 10


def test_no_grammar_of_the_allowed_size_exceeds_the_stack():
    """In a thread with a small one; it would end the process."""
    before = threading.stack_size(2**20)
    try:
        with ThreadPoolExecutor(1) as thread:
            found = thread.submit(prepare, *HEAVY["groups in groups"]).result()
    finally:
        threading.stack_size(before)
    assert found.error is None


def test_a_language_without_texts_is_an_error():
    assert prepare("regex", "[a-z&&[0-9]]").error
