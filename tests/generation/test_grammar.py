"""Masks are exact: for finite languages, the tokens and the ends that they allow are those found by trying every text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from epslots.generation.grammar import GrammarCompiler, GrammarState, bits_of
from epslots.generation.requests import Grammar, GrammarKind
from tests.support.tokenizers import byte_level, sentencepiece, unigram

WORDS = ["ab", "ba", "aab", "bbb", "é", "aé", 'a"', '":', '{"a', "tru", "true", "1,", "]}", " a", "  "]
SPECIAL = ("<end>", "<other>", "<pad>")
PADDING = 7


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer, and the bytes of its tokens written down by hand.

    Attributes:
        first: bytes of tokens that add others at the beginning of a text.
        ends: two tokens that end texts.
    """

    compiler: GrammarCompiler
    words: dict[int, bytes]
    first: dict[int, bytes]
    ends: tuple[int, int]
    size: int


def vocabulary_of_bytes() -> Vocabulary:
    tokenizer = byte_level(WORDS, SPECIAL, plain=["<think>"])
    words = dict(enumerate([*(bytes([byte]) for byte in range(256)), *(word.encode() for word in WORDS), b"<think>"]))
    ends = (len(words), len(words) + 1)
    size = len(words) + len(SPECIAL) + PADDING
    return Vocabulary(GrammarCompiler(tokenizer, size, ends[:1]), words, {}, ends, size)


def vocabulary_of_pieces() -> Vocabulary:
    words = {3 + byte: bytes([byte]) for byte in range(256)}
    words |= dict(enumerate([b" ", b" the", b" end", b"a", b"b", b".", b" a", b"e"], 259))
    first = {3 + 0x20: b"", 259: b"", 260: b"the", 261: b"end", 265: b"a"}
    return Vocabulary(GrammarCompiler(sentencepiece(), 267 + PADDING, [2]), words, first, (2, 1), 267 + PADDING)


def vocabulary_of_unigrams() -> Vocabulary:
    words = {2 + byte: bytes([byte]) for byte in range(256)}
    words |= dict(enumerate([b" ", b" a", b"  b", b"a", b"b", b"ab", "é".encode()], 258))
    return Vocabulary(GrammarCompiler(unigram(), 265, [1]), words, {258: b"", 259: b"a", 260: b"b"}, (1, 0), 265)


VOCABULARIES = {"bytes": vocabulary_of_bytes(), "pieces": vocabulary_of_pieces(), "unigrams": vocabulary_of_unigrams()}


def tokens_of(mask: np.ndarray, vocabulary: Vocabulary) -> set[int]:
    """The set bits, one by one; there is none beyond the vocabulary."""
    assert mask.dtype == np.int32 and len(mask) == -(-vocabulary.size // 32)
    found = {token for token in range(32 * len(mask)) if int(mask[token // 32]) >> token % 32 & 1}
    assert all(token < vocabulary.size for token in found)
    return found


def expected(vocabulary: Vocabulary, language: set[bytes], so_far: bytes, *, beginning: bool) -> tuple[set[int], set[int]]:
    """The tokens that some text of the language goes on with after ``so_far``, and the ends if ``so_far`` is such a text."""
    prefixes = {text[:n] for text in language for n in range(len(text) + 1)}
    words = vocabulary.words | (vocabulary.first if beginning else {})
    going_on = {token for token, word in words.items() if so_far + word in prefixes}
    return going_on, set(vocabulary.ends) if so_far in language else set()


def paths(vocabulary: Vocabulary, language: set[bytes]) -> Iterator[tuple[list[int], bytes]]:
    """For each beginning of a text that tokens can write, some tokens that do, and the text."""
    seen, waiting = {(True, b"")}, [([], b"")]
    while waiting:
        path, so_far = waiting.pop()
        yield path, so_far
        words = vocabulary.words | ({} if path else vocabulary.first)
        for token in sorted(expected(vocabulary, language, so_far, beginning=not path)[0]):
            reached = so_far + words[token]
            if (False, reached) not in seen:
                seen.add((False, reached))
                waiting.append(([*path, token], reached))


def check_exact(vocabulary: Vocabulary, kind: GrammarKind, text: str, language: Iterable[str]) -> None:
    texts = {word.encode() for word in language}
    for path, so_far in paths(vocabulary, texts):
        state = vocabulary.compiler.start(Grammar(kind, text), frozenset(vocabulary.ends), path)
        going_on, ends = expected(vocabulary, texts, so_far, beginning=not path)
        assert state.error is None
        assert state.finished == (not going_on), (path, so_far)
        assert tokens_of(state.allowed(), vocabulary) == going_on | ends, (path, so_far)


def matching(pattern: str, alphabet: str, longest: int) -> set[str]:
    """All texts of these characters that Python's ``re`` matches."""
    texts = ("".join(text) for length in range(longest + 1) for text in product(alphabet, repeat=length))
    return {text for text in texts if re.fullmatch(pattern, text)}


REGEXES = {
    "a(b|a)?b{0,2}": ("ab", 5),
    "(ab|ba){1,2}": ("ab", 5),
    "[ab]{2}|aab": ("ab", 4),
    "(?:aé|é)b?": ("abé", 4),
    'a"?': ('a"', 3),
    " ?a": (" a", 3),
    " {0,2}[ab]": (" ab", 4),
    r"\.?[^\W\d_c-zA-Z\u0080-\U0010ffff]": ("ab.c", 3),
    "a/b|a\\/a": ("ab/", 4),
    r"a\\?": ("a\\", 3),
}


@pytest.mark.parametrize("name", VOCABULARIES)
@pytest.mark.parametrize("pattern", REGEXES)
def test_masks_of_expressions_are_exact(pattern: str, name: str):
    check_exact(VOCABULARIES[name], "regex", pattern, matching(pattern, *REGEXES[pattern]))


@st.composite
def finite_expressions(draw: st.DrawFn, depth: int = 3) -> tuple[str, frozenset[str]]:
    """An expression, and its language by the definition of each operator."""
    if depth == 0 or draw(st.integers(0, 3)) == 0:
        letter = draw(st.sampled_from(["a", "b", "é", '"', " ", "[ab]"]))
        return letter, frozenset(letter.strip("[]"))
    one, texts = draw(finite_expressions(depth - 1))
    kind = draw(st.sampled_from(["concat", "either", "repeat"]))
    if kind == "repeat":
        least = draw(st.integers(0, 2))
        most = draw(st.integers(max(least, 1), 2))
        repeats = [frozenset("".join(parts) for parts in product(texts, repeat=n)) for n in range(least, most + 1)]
        return f"(?:{one}){{{least},{most}}}", frozenset().union(*repeats)
    other, others = draw(finite_expressions(depth - 1))
    if kind == "either":
        return f"(?:{one}|{other})", texts | others
    return one + other, frozenset(a + b for a, b in product(texts, others))


@settings(max_examples=40)
@given(expression=finite_expressions(), name=st.sampled_from(list(VOCABULARIES)))
def test_masks_of_random_expressions_are_exact(expression: tuple[str, frozenset[str]], name: str):
    pattern, language = expression
    assume(0 < sum(map(len, language)) < 150)
    assert all(re.fullmatch(pattern, text) for text in language)
    check_exact(VOCABULARIES[name], "regex", pattern, language)


@pytest.mark.parametrize("name", VOCABULARIES)
def test_masks_of_schemas_are_exact(name: str):
    values = '{"enum": ["a", "aab", true, 1, null, "\\u00e9"]}'
    check_exact(VOCABULARIES[name], "json_schema", values, ['"a"', '"aab"', "true", "1", "null", '"é"'])


def test_masks_of_lark_grammars_are_exact():
    grammar = 'start: pair ("a" | "é")\npair: "a" WORD?\nWORD: /b{1,2}/'
    check_exact(VOCABULARIES["bytes"], "lark", grammar, ["aa", "aé", "aba", "abé", "abba", "abbé"])


def test_special_and_missing_tokens_are_never_allowed():
    """Not even where the grammar names all ids."""
    vocabulary = VOCABULARIES["bytes"]
    state = vocabulary.compiler.start(Grammar("lark", f"start: <[0-{vocabulary.size - 1}]>"), frozenset(vocabulary.ends))
    assert tokens_of(state.allowed(), vocabulary) == vocabulary.words.keys() - {0xFF}, "no text has that byte"


def state_of(pattern: str, stops: Iterable[int], tokens: Iterable[int] = ()) -> GrammarState:
    return VOCABULARIES["bytes"].compiler.start(Grammar("regex", pattern), frozenset(stops), tokens)


def test_only_the_requests_own_stop_tokens_end_a_text():
    vocabulary = VOCABULARIES["bytes"]
    one, other = vocabulary.ends
    assert tokens_of(state_of("a?", [one]).allowed(), vocabulary) == {ord("a"), one}
    assert tokens_of(state_of("a?", [other]).allowed(), vocabulary) == {ord("a"), other}
    assert tokens_of(state_of("a?", []).allowed(), vocabulary) == {ord("a")}


def test_a_stop_token_with_text_is_allowed_as_text_alone():
    """Behind a whole text, its own text would be too much."""
    vocabulary = VOCABULARIES["bytes"]
    assert tokens_of(state_of("ab?", [ord("b"), ord("c")], [ord("a")]).allowed(), vocabulary) == {ord("b")}


def test_an_end_token_with_text_is_no_part_of_one():
    """Some chat models' ends of turns aren't special tokens by their tokenizers."""
    tokenizer = byte_level(plain=["<turn>"])
    (turn,) = tokenizer.convert_tokens_to_ids(["<turn>"])
    for ends, allowed in (([], {ord("<"), turn}), ([turn], {ord("<")})):
        state = GrammarCompiler(tokenizer, 258, ends).start(Grammar("regex", "<turn>"), frozenset([turn]))
        assert tokens_of(state.allowed(), replace(VOCABULARIES["bytes"], size=258)) == allowed


def test_a_complete_text_is_finished_with_and_without_ends():
    for stops in ([], VOCABULARIES["bytes"].ends):
        state = state_of("ab", stops)
        assert state.accept(ord("a")) and not state.finished
        assert state.accept(ord("b")) and state.finished and state.error is None
        assert not state.accept(ord("b")), "no part of the text"
        assert state.finished and state.error is None


def test_an_end_token_finishes_a_text_that_could_go_on():
    end = VOCABULARIES["bytes"].ends[1]
    state = state_of("a*", [end], [ord("a")])
    assert not state.finished
    assert state.accept(end) and state.finished


def test_a_text_that_could_go_on_is_not_finished():
    state = state_of("ab?", VOCABULARIES["bytes"].ends)
    state.accept(ord("a"))
    assert not state.finished


def test_a_mask_is_never_empty():
    """A token is chosen by it, also if none will be taken."""
    state = state_of("ab", [], b"ab")
    assert state.finished and state.allowed().any()


def test_states_move_by_accepted_tokens_alone():
    """So a step that is made again finds the same mask, and its state needs no rollback."""
    vocabulary = VOCABULARIES["bytes"]
    state = state_of("(ab|ba){3}", vocabulary.ends)
    for token in b"abba":
        before = state.allowed().copy()
        for _ in range(3):
            assert (state.allowed() == before).all()
        state.accept(token)
    replayed = state_of("(ab|ba){3}", vocabulary.ends, b"abba")
    assert (state.allowed() == replayed.allowed()).all()
    assert tokens_of(state.allowed(), vocabulary) == {ord("a"), ord("b"), 256, 257}


def test_a_state_writes_into_one_buffer():
    state = state_of("[ab]*", [])
    address = state.allowed().ctypes.data
    for token in b"abab":
        state.accept(token)
        assert state.allowed().ctypes.data == address


def test_states_of_one_grammar_are_apart():
    one, other = state_of("a+b", []), state_of("a+b", [])
    one.accept(ord("a"))
    assert tokens_of(other.allowed(), VOCABULARIES["bytes"]) == {ord("a"), 256, 258}
    assert ord("b") in tokens_of(one.allowed(), VOCABULARIES["bytes"])


def test_a_text_that_no_token_continues_is_an_error():
    """The vocabulary lacks a letter: the request ends with an error, and not with half a text."""
    compiler = GrammarCompiler(byte_level(), 100)  # bytes below 100 alone
    state = compiler.start(Grammar("regex", "ad?|bde"), frozenset())
    state.accept(ord("a"))
    assert not state.error
    state = compiler.start(Grammar("regex", "ad?|bde"), frozenset(), b"b")
    assert state.error == "regex: no token of the vocabulary continues the text as its grammar wants it" and not state.finished
    assert state.allowed().any() and not state.accept(ord("b"))


@pytest.mark.parametrize("token", [ord("c"), 258, VOCABULARIES["bytes"].ends[0], VOCABULARIES["bytes"].size - 1])
def test_a_token_that_is_not_allowed_is_an_error(token: int):
    assert state_of("ab", [], [ord("a"), token]).error


@pytest.mark.parametrize("size", [1, 31, 32, 33, 64, 1000])
def test_bits_of_tokens_are_where_the_mask_has_them(size: int):
    tokens = set(np.random.default_rng(size).choice(size, max(1, size // 3)).tolist())
    mask = bits_of(tokens, size)
    assert mask.dtype == np.int32 and mask.shape == (-(-size // 32),)
    assert {token for token in range(32 * len(mask)) if int(mask[token // 32]) >> token % 32 & 1} == tokens
