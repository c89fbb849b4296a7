"""Texts of random tokens that grammars allow, held to ``jsonschema`` and ``re``; and documents, valid and not."""

from __future__ import annotations

import json
import random
import re
from datetime import date
from typing import Any

import pytest
from jsonschema import Draft202012Validator, FormatChecker
from transformers import PreTrainedTokenizerBase

from epslots.generation.grammar import GrammarCompiler
from epslots.generation.requests import Grammar
from tests.support.tokenizers import TOKENIZERS, unigram

# They write every text: each byte is a token.
VOCABULARIES = {"bytes": TOKENIZERS["bytes"], "sentencepiece": TOKENIZERS["sentencepiece"], "unigram": unigram()}
COMPILERS = {
    name: GrammarCompiler(tokenizer, len(tokenizer) + 9, [tokenizer.eos_token_id]) for name, tokenizer in VOCABULARIES.items()
}

FORMATS = FormatChecker(["uuid", "ipv4", "ipv6", "email"])


@FORMATS.checks("date", raises=ValueError)
def is_date(value: object) -> bool:
    """llguidance knows the lengths of months, but no leap years: its February has 29 days."""
    return not isinstance(value, str) or bool(re.match("[0-9]{4}-", value) and date.fromisoformat("2024" + value[4:]))


_POINT = {"type": "object", "properties": {"x": {"type": "number"}, "y": {"type": "number"}}, "required": ["x"]}
SCHEMAS: dict[str, dict[str, Any]] = {
    "optional": {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "ok": {"type": "boolean"}},
        "required": ["age"],
        "additionalProperties": False,
    },
    "enums": {
        "type": "object",
        "properties": {"a": {"enum": ["b", 1, None, [2, "é"]]}, "c": {"const": "d"}},
        "required": ["a", "c"],
    },
    "bounded arrays": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 4},
    "tuples": {
        "type": "array",
        "prefixItems": [{"type": "string"}, {"type": "null"}],
        "items": {"type": "boolean"},
        "minItems": 2,
    },
    "bounded numbers": {
        "type": "object",
        "properties": {
            "a": {"type": "integer", "minimum": -12, "maximum": 130},
            "b": {"type": "number", "exclusiveMinimum": 0, "maximum": 2.5},
            "c": {"type": "integer", "multipleOf": 7},
        },
        "required": ["a", "b", "c"],
        "additionalProperties": False,
    },
    "nested": {
        "type": "object",
        "properties": {"p": {"type": "array", "items": _POINT, "maxItems": 3}, "q": _POINT},
        "required": ["p", "q"],
    },
    "recursive": {
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {"v": {"type": "integer"}, "c": {"type": "array", "items": {"$ref": "#/$defs/tree"}}},
                "required": ["v", "c"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/tree",
    },
    "alternatives": {"anyOf": [{"type": "string", "maxLength": 3}, {"type": "array", "items": {"type": "null"}}, _POINT]},
    "exclusive alternatives": {"oneOf": [{"type": "integer"}, {"type": "string", "minLength": 2}]},
    "patterns": {
        "type": "object",
        "properties": {
            "id": {"type": "string", "pattern": "^[A-F]{2}-[0-9]+$"},
            "part": {"type": "string", "pattern": "b{2}"},
        },
        "required": ["id", "part"],
        "additionalProperties": False,
    },
    "formats": {
        "type": "array",
        "prefixItems": [{"type": "string", "format": name} for name in ("date", "uuid", "ipv4", "ipv6", "email")],
        "minItems": 5,
        "items": False,
    },
    "maps": {"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 1},
    "pattern maps": {"type": "object", "patternProperties": {"^n_": {"type": "number"}}, "additionalProperties": False},
    "joined": {"allOf": [_POINT, {"type": "object", "properties": {"z": {"type": "integer"}}, "required": ["z"]}]},
    "any": {},
}
REGEXES = [
    "[a-c]+[0-9]{2}",
    "(?:foo|bar){1,3}baz?",
    "[^a-z]{3}x",
    "[0-9]{4}-(?:0[1-9]|1[0-2])",
    ".{2}é+",
    r"a/b\\+\n",
    "(?i:yes|no)",
]


def walk(name: str, grammar: Grammar, seed: int, most: int = 3000) -> list[int]:
    """Tokens chosen at random, up to an end; after some, often those that close what is open."""
    tokenizer, rng = VOCABULARIES[name], random.Random(seed)
    state = COMPILERS[name].start(grammar, frozenset([tokenizer.eos_token_id]))
    tokens: list[int] = []
    while not state.finished and len(tokens) < most and tokens[-1:] != [tokenizer.eos_token_id]:
        words = [int(word) for word in state.allowed()]
        allowed = [token for token in range(32 * len(words)) if words[token // 32] >> token % 32 & 1]
        closing = (
            [token for token in allowed if token in _CLOSING[name]]
            if len(tokens) > rng.randrange(60) and rng.randrange(2)
            else []
        )
        tokens.append(rng.choice(closing or allowed))
        if tokens[-1] != tokenizer.eos_token_id:
            state.accept(tokens[-1])
        assert state.error is None
    assert len(tokens) < most, f"not at an end: {tokenizer.decode(tokens)!r}"
    return tokens


def _closing(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The end of texts, tokens that end strings, lists and objects, and letters that some strings must have."""
    texts = {token: tokenizer.decode([token]) for token in range(len(tokenizer))}
    return {token for token, text in texts.items() if text and set(text) <= set('"]}b@')} | {tokenizer.eos_token_id}


_CLOSING = {name: _closing(tokenizer) for name, tokenizer in VOCABULARIES.items()}


@pytest.mark.parametrize("name", VOCABULARIES)
@pytest.mark.parametrize("schema", SCHEMAS)
def test_any_allowed_text_is_valid_by_its_schema(schema: str, name: str):
    """As the user sees it: decoded, without special tokens."""
    validator = Draft202012Validator(SCHEMAS[schema], format_checker=FORMATS)
    for seed in range(6):
        tokens = walk(name, Grammar("json_schema", json.dumps(SCHEMAS[schema])), seed)
        text = VOCABULARIES[name].decode(tokens, skip_special_tokens=True)
        validator.validate(json.loads(text))


@pytest.mark.parametrize("name", VOCABULARIES)
def test_any_allowed_text_of_json_is_an_object(name: str):
    for seed in range(6):
        tokens = walk(name, Grammar("json_object", ""), seed)
        assert isinstance(json.loads(VOCABULARIES[name].decode(tokens, skip_special_tokens=True)), dict)


@pytest.mark.parametrize("name", VOCABULARIES)
@pytest.mark.parametrize("pattern", REGEXES)
def test_any_allowed_text_matches_its_expression(pattern: str, name: str):
    for seed in range(6):
        tokens = walk(name, Grammar("regex", pattern), seed)
        text = VOCABULARIES[name].decode(tokens, skip_special_tokens=True)
        assert re.fullmatch(pattern, text)


DOCUMENTS = [
    ("optional", '{"name": "Ada Lovelace, née Byron 😀", "age": 36}', True),
    ("optional", '{"age":-1,"ok":true}', True),
    ("optional", '{\n  "name": "a\\n\\"",\n  "age": 0\n}', True),
    ("optional", '{"name": "Ada"}', False),
    ("optional", '{"age": 1.5}', False),
    ("optional", '{"age": 1, "b": 2}', False),
    ("bounded arrays", "[1,2]", True),
    ("bounded arrays", "[ 1, 2, 3, 4 ]", True),
    ("bounded arrays", "[1]", False),
    ("bounded arrays", "[1,2,3,4,5]", False),
    ("bounded numbers", '{"a": 130, "b": 2.5, "c": 49}', True),
    ("bounded numbers", '{"a": -12, "b": 0.001, "c": -7}', True),
    ("bounded numbers", '{"a": 131, "b": 1, "c": 0}', False),
    ("bounded numbers", '{"a": 0, "b": 0, "c": 0}', False),
    ("bounded numbers", '{"a": 0, "b": 1, "c": 8}', False),
    ("recursive", '{"v":1,"c":[{"v":2,"c":[]},{"v":3,"c":[{"v":4,"c":[]}]}]}', True),
    ("recursive", '{"v":1,"c":[{"v":2}]}', False),
    ("alternatives", '"abc"', True),
    ("alternatives", "[null, null]", True),
    ("alternatives", '"abcd"', False),
    ("patterns", '{"id": "AF-12", "part": "abbc"}', True),
    ("patterns", '{"id": "AG-12", "part": "bb"}', False),
    ("formats", '["2024-02-29","123e4567-e89b-12d3-a456-426614174000","1.2.3.4","::1","a@b.org"]', True),
    ("formats", '["2024-13-01","123e4567-e89b-12d3-a456-426614174000","1.2.3.4","::1","a@b.org"]', False),
    ("joined", '{"x": 1, "z": 2}', True),
    ("joined", '{"x": 1, "z": "2"}', False),
    ("any", '[{"a": [1e5, -0.5, "\\\\ \\n"]}, null]', True),
    ("any", "[1,]", False),
]


@pytest.mark.parametrize("name", ["bytes", "sentencepiece"])
@pytest.mark.parametrize(("schema", "document", "valid"), DOCUMENTS)
def test_documents_are_allowed_if_they_are_valid(schema: str, document: str, valid: bool, name: str):
    """Cut into tokens as the tokenizer does it."""
    assert valid == _is_valid(SCHEMAS[schema], document), "the test is right"
    tokens = VOCABULARIES[name](document, add_special_tokens=False)["input_ids"]
    end = VOCABULARIES[name].eos_token_id
    state = COMPILERS[name].start(Grammar("json_schema", json.dumps(SCHEMAS[schema])), frozenset([end]), tokens)
    at_end = state.finished or bool(int(state.allowed()[end // 32]) >> end % 32 & 1)
    assert (state.error is None and at_end) == valid, state.error


def _is_valid(schema: dict[str, Any], document: str) -> bool:
    try:
        value = json.loads(document)
    except ValueError:
        return False
    return Draft202012Validator(schema, format_checker=FORMATS).is_valid(value)


def test_blanks_of_json_are_bounded():
    """A model could else write blanks for ever."""
    compiler = COMPILERS["bytes"]
    for blanks, allowed in (
        ("", True),
        (" ", True),
        ("\n\n" + 40 * " ", True),
        ("\n\n\n", False),
        (41 * " ", False),
        ("\t", False),
    ):
        tokens = VOCABULARIES["bytes"]("[" + blanks + "1]", add_special_tokens=False)["input_ids"]
        state = compiler.start(Grammar("json_schema", '{"type": "array"}'), frozenset(), tokens)
        assert (state.error is None) == allowed, repr(blanks)
