"""Grammars that are wrong or too much are refused by name, in little time, wherever they come in."""

from __future__ import annotations

import json
import time
from contextlib import suppress

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
    ("json_schema", '{"type": "object", "foo": 1}', "json_schema: .*foo"),
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
    ("regex", "(", "regex: .*unclosed group"),
    ("regex", "", "regex=''; allowed: an expression that isn't empty, without a backslash at its end"),
    ("regex", "a\\\\\\", "without a backslash at its end"),
    ("regex", "(?=a)b", "regex: .*look-around"),
    ("regex", r"(a)\1", "regex: .*backreferences"),
    ("regex", "a" + 2000 * "(" + "b" + 2000 * ")", "regex: .*nest"),
    ("regex", "[a-z&&[0-9]]", "regex: "),
    ("lark", "start: missing", "grammar: .*missing"),
    ("lark", "a: b", "grammar: .*start"),
    ("lark", "start: <|im_end|>", "grammar: .*im_end"),
    ("lark", '%llguidance {"no_forcing": false}\nstart: "a"', "grammar: %llguidance sets options"),
    ("lark", "start: " + 10_000 * "(" + '"a"' + 10_000 * ")", "grammar: .*nested"),
    ("lark", '{"grammars": [{"json_schema": {}}]}', "grammar: "),
]


@pytest.mark.parametrize(("kind", "text", "message"), REFUSED)
def test_wrong_grammars_are_refused_by_name(kind: GrammarKind, text: str, message: str):
    began = time.thread_time()
    with pytest.raises(ConfigError, match=message) as error:
        prepare(kind, text)
    assert len(str(error.value)) < 600
    assert time.thread_time() - began < MOST_CPU_S


def prepare(kind: GrammarKind, text: str) -> GrammarState:
    """As the caller and then the rank do it."""
    check_grammar(kind, text)
    return COMPILER.start(Grammar(kind, text), frozenset())


HEAVY: list[tuple[GrammarKind, str]] = [
    ("regex", "(?:a{1000}){1000}"),
    ("regex", "(?:(?:a{0,100}){0,100}){0,100}"),
    ("regex", "(?:(?:(?:a*)*)*)*b"),
    ("regex", "[ab]*a[ab]{200}"),
    ("regex", r"(?:\w+\s?)*x\p{L}{500}"),
    ("regex", ".{0,60000}x"),
    ("regex", "|".join(f"{n:x}" for n in range(10_000))),
    ("json_schema", linked(1000)),
    ("json_schema", json.dumps({"anyOf": [{"type": "string", "maxLength": n} for n in range(1000)]})),
    ("json_schema", json.dumps({"type": "string", "pattern": "(a|b)*a(a|b){100}", "maxLength": 100_000})),
    ("json_schema", json.dumps({"type": "array", "items": {"type": "string"}, "minItems": 10_000_000})),
    ("json_schema", json.dumps({"allOf": [{"anyOf": [{"required": [f"a{n}{m}"]} for m in range(9)]} for n in range(40)]})),
    ("json_schema", json.dumps({"properties": {f"p{n}": {"type": "integer"} for n in range(2000)}})),
    ("lark", "start: r0\n" + "".join(f"r{n}: r{n + 1}\n" for n in range(5000)) + 'r5000: "a"'),
    ("lark", "start: start start | start start start |"),
]


@pytest.mark.parametrize(("kind", "text"), HEAVY)
def test_heavy_grammars_take_little_time(kind: GrammarKind, text: str):
    """They are compiled, or refused: in either case soon."""
    began = time.thread_time()
    with suppress(ConfigError):
        prepare(kind, text)
    assert time.thread_time() - began < MOST_CPU_S
