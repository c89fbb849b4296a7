"""Grammars: opening a vocabulary, compiling a schema of 2 KB, and the cost of a row's mask for each token."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from epslots.bench.report import MS, US, Tables, median
from epslots.example import example_model
from epslots.example_text import library_texts
from epslots.generation.grammar import GrammarCompiler, GrammarState, check_grammar
from epslots.generation.requests import Grammar
from epslots.generation.text import load_tokenizer
from epslots.progress import Advance

ROWS = 16
LARGE_VOCABULARY = 2**17
GRAMMAR_ROWS = 2

_ADDRESS = {
    "type": "object",
    "properties": {
        "street": {"type": "string", "minLength": 1, "maxLength": 80},
        "city": {"type": "string", "minLength": 1, "maxLength": 60},
        "postal_code": {"type": "string", "pattern": "^[0-9A-Z -]{3,10}$"},
        "country": {
            "type": "string",
            "enum": ["AT", "BE", "CH", "DE", "DK", "ES", "FI", "FR", "GB", "IE", "IT", "NL", "NO", "SE"],
        },
    },
    "required": ["street", "city", "country"],
    "additionalProperties": False,
}
_LINE = {
    "type": "object",
    "properties": {
        "sku": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4,8}$"},
        "title": {"type": "string", "maxLength": 120},
        "quantity": {"type": "integer", "minimum": 1, "maximum": 9999},
        "unit_price": {"type": "number", "minimum": 0},
        "discount": {"anyOf": [{"type": "null"}, {"type": "number", "minimum": 0, "maximum": 1}]},
        "tags": {
            "type": "array",
            "items": {"type": "string", "enum": ["new", "fragile", "gift", "digital", "sale"]},
            "maxItems": 5,
        },
    },
    "required": ["sku", "quantity", "unit_price", "tags"],
    "additionalProperties": False,
}
SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "Order",
    "description": "An order of a shop, as a service would ask a model to extract it from an email.",
    "type": "object",
    "$defs": {"address": _ADDRESS, "line": _LINE},
    "properties": {
        "id": {"type": "string", "format": "uuid"},
        "placed": {"type": "string", "format": "date-time"},
        "status": {"type": "string", "enum": ["draft", "placed", "paid", "shipped", "delivered", "cancelled", "returned"]},
        "customer": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "minLength": 1, "maxLength": 100},
                "email": {"type": "string", "format": "email"},
                "age": {"type": "integer", "minimum": 0, "maximum": 150},
                "addresses": {"type": "array", "items": {"$ref": "#/$defs/address"}, "minItems": 1, "maxItems": 4},
            },
            "required": ["name", "email", "addresses"],
            "additionalProperties": False,
        },
        "lines": {"type": "array", "items": {"$ref": "#/$defs/line"}, "minItems": 1},
        "notes": {"type": "string"},
        "gift": {"type": "boolean"},
    },
    "required": ["id", "placed", "status", "customer", "lines"],
    "additionalProperties": False,
}
_STREETS = [{"street": "12 Analytical Row", "city": "Zürich", "postal_code": "8001", "country": "CH"}]
_LINES = [
    {
        "sku": "ABC-12345",
        "title": "Slots, a box of",
        "quantity": 3,
        "unit_price": 19.5,
        "discount": None,
        "tags": ["new", "gift"],
    },
    {"sku": "XYZ-9876", "quantity": 120, "unit_price": 0.25, "discount": 0.1, "tags": []},
]
DOCUMENT = {
    "id": "123e4567-e89b-12d3-a456-426614174000",
    "placed": "2024-02-29T10:20:30Z",
    "status": "paid",
    "customer": {"name": "Ada Lovelace, née Byron 😀", "email": "ada@example.org", "age": 36, "addresses": _STREETS},
    "lines": _LINES,
    "notes": "Please ring twice, and leave the box with the neighbour downstairs if nobody opens.",
    "gift": False,
}
"""Valid by ``SCHEMA``, in the order of its properties."""


def measure_grammars(cache_dir: Path, rounds: int, advance: Advance) -> Tables:
    """Times of the example model's tokenizer, and of one as large as those of current models."""
    found = []
    for name, tokenizer in (("example model", load_tokenizer(example_model())), ("large", train_tokenizer())):
        found.append({"tokenizer": name, "tokens": len(tokenizer)} | measure_grammar(tokenizer, rounds))
        advance(1)
    schema = json.dumps(SCHEMA)
    return {f"grammar of a JSON schema of {len(schema):,} bytes; a mask is computed, and a token accepted, {ROWS} rows": found}


def train_tokenizer(vocabulary: int = LARGE_VOCABULARY) -> PreTrainedTokenizerBase:
    """A byte-level tokenizer of the standard library's text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=1,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(library_texts(held_out=False), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def measure_grammar(tokenizer: PreTrainedTokenizerBase, rounds: int) -> dict[str, float]:
    """Times of a grammar, by where they are spent.

    Milliseconds of the work for a model and for a request; microseconds of the work for each row's token.

    Every request's grammar is compiled, so each row pays for its own; the first mask is part of that.
    """
    grammar, end = Grammar("json_schema", json.dumps(SCHEMA)), frozenset([int(tokenizer.eos_token_id)])
    tokens = tokenizer(json.dumps(DOCUMENT, ensure_ascii=False), add_special_tokens=False)["input_ids"]
    opening, checking, compiling, masking = [], [], [], []
    for _ in range(rounds):
        began = time.perf_counter()
        compiler = GrammarCompiler(tokenizer, len(tokenizer), end)
        opened = time.perf_counter()
        check_grammar(grammar.kind, grammar.text)
        opening.append(opened - began)
        checking.append(time.perf_counter() - opened)
    for _ in range(ROWS):
        began = time.perf_counter()
        state = compiler.start(grammar, end)
        compiling.append(time.perf_counter() - began)
        masking.append(_token_seconds(state, tokens))
    token_s = np.concatenate(masking)
    return {
        "open ms": MS * median(opening),
        "check ms": MS * median(checking),
        "compile ms": MS * median(compiling),
        "us a token and row": US * float(token_s.mean()),
        "median us": US * float(np.median(token_s)),
        "P99 us": US * float(np.percentile(token_s, 99)),
    }


def _token_seconds(state: GrammarState, tokens: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Seconds of each token of a row: its mask, and its acceptance."""
    found = []
    for token in tokens:
        began = time.perf_counter()
        state.allowed()
        state.accept(token)
        found.append(time.perf_counter() - began)
    assert state.finished and state.error is None, "the document is valid"
    return np.array(found)
