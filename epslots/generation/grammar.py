"""Which tokens may follow, so that a request's text belongs to its grammar. In reading order:

    check_grammar     the caller's side: refuses a grammar that is wrong or too large, before it is sent anywhere
    GrammarCompiler   a model's: compiles grammars for its vocabulary
    GrammarState      a request's: the tokens allowed next, by the tokens accepted so far

States are prepared beside the steps (grammar_queue.py).

llguidance decides (https://github.com/guidance-ai/llguidance): an Earley parser over derivatives of regular expressions,
walked along a trie of the vocabulary. Masks are exact: a token is allowed if some text of the grammar continues with its
bytes, however else these could be cut into tokens.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, regex_to_lark
from numpy.typing import NDArray

from epslots.errors import ConfigError, shown
from epslots.generation.requests import Grammar, GrammarKind
from epslots.generation.token_bytes import token_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_GRAMMAR_BYTES = 2**16
_ERROR_CHARACTERS = 300
_SETTINGS = {"json_schema": "json_schema", "json_object": "json_schema", "regex": "regex", "lark": "grammar"}
"""The user's name for each kind of grammar."""
_DEAD_END = "no token of the vocabulary continues the text as its grammar wants it"

# As in llama.cpp's JSON grammars: unbounded, a model could go on with blanks for ever.
_WHITESPACE = r"\x20|\x0A{1,2}[\x20\x09]{0,40}"
# Masks allow every way of cutting a text into tokens, not only the tokenizer's own: that is exact, and never calls Python.
_EXACT = '\n%llguidance {"no_forcing": true}\n'

# The work for one token: some 50 ms at the very most, with 130,000 tokens. Expressions such as (?:[a-z]{1,50} ?){1,200} need
# more than llguidance's default of 200,000.
_TOKEN_FUEL = 1_000_000
# The states of one request's expressions: tens of MB at the most.
_MOST_STATES = 250_000
# Ambiguous rules take a time that grows with the square of the items. A JSON schema has up to four for an optional property.
_LARK_ITEMS, _JSON_ITEMS = 400, 2000
# llguidance recurses along rules, up to 3 KiB for eight bytes of a grammar: this is twice what the largest one can need.
_STACK_BYTES = 2**27

IntMask = NDArray[np.int32]
T = TypeVar("T")


def check_grammar(kind: GrammarKind, text: str) -> None:
    """Refuse a grammar that can't be compiled for any vocabulary. Takes about a millisecond.

    Raises:
        ConfigError: says why.
    """
    translated = _translated(kind, text)
    _refuse(kind, _on_deep_stack(lambda: LLMatcher.validate_grammar(translated, limits=_limits(kind))))


def _refuse(kind: GrammarKind, error: str) -> None:
    """Raise ConfigError for an error of llguidance's."""
    if error:
        raise ConfigError(f"{_SETTINGS[kind]}: {_reason(error)}")


def _reason(error: str) -> str:
    """An error of llguidance's in one line, without the parser's state and the text around the place."""
    error = re.split(r"<backtrace>|<non-verbose/>|\n +\d+ \| ", error, maxsplit=1)[0]
    by_regex = re.search(r"^error: (.*)", error, re.MULTILINE)
    return " ".join((by_regex[1] if by_regex else error).split())[:_ERROR_CHARACTERS]


def _limits(kind: GrammarKind) -> LLParserLimits:
    items = _LARK_ITEMS if kind == "lark" else _JSON_ITEMS
    return LLParserLimits(
        verbose_errors=False, step_lexer_fuel=_TOKEN_FUEL, max_lexer_states=_MOST_STATES, max_items_in_row=items
    )


_starting = threading.Lock()


def _on_deep_stack(work: Callable[[], T]) -> T:
    """The result of ``work``, from a thread whose stack no grammar exceeds: that would end the process."""
    with ThreadPoolExecutor(1) as thread:
        with _starting:  # the size is that of all threads that are started meanwhile
            before = threading.stack_size(_STACK_BYTES)
            try:
                future = thread.submit(work)
            except RuntimeError as error:  # of memory or processes, there is none left
                raise ConfigError(f"no thread can be started to compile a grammar: {error}") from error
            finally:
                threading.stack_size(before)
        return future.result()


def _translated(kind: GrammarKind, text: str) -> str:
    """The grammar in llguidance's notation: a JSON list of grammars, the first of which is the start."""
    name = _SETTINGS[kind]
    try:
        fits = isinstance(text, str) and len(text) <= MOST_GRAMMAR_BYTES and len(text.encode()) <= MOST_GRAMMAR_BYTES
    except UnicodeEncodeError as error:
        raise ConfigError(f"{name}={shown(text)}: character {error.start} is half of a pair, which no text has") from error
    if not fits:
        raise ConfigError(f"{name}={shown(text)}; allowed: text of at most {MOST_GRAMMAR_BYTES:,} bytes")
    match kind:
        case "json_schema" | "json_object":
            schema = {"type": "object"} if kind == "json_object" else _schema(text)
            options = {"whitespace_pattern": _WHITESPACE}
            start, others = "start: @json", [{"name": "json", "json_schema": {**schema, "x-guidance": options}}]
        case "regex":
            start, others = _regex_rule(text), []
        case "lark":
            if "%llguidance" in text:
                raise ConfigError("grammar: %llguidance sets options of the library; leave it out")
            start, others = text, []
    return json.dumps({"grammars": [{"name": "start", "lark_grammar": start + _EXACT}, *others]})


def _schema(text: str) -> dict[str, Any]:
    """A JSON schema as an object.

    Raises:
        ConfigError: it isn't JSON, or no object.
    """

    def refuse(name: str) -> None:
        raise ValueError(f"{name} isn't JSON")

    try:
        schema = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"json_schema={shown(text)}: {error}; allowed: a JSON object") from error
    if not isinstance(schema, dict):
        raise ConfigError(f"json_schema={shown(text)}; allowed: a JSON object")
    if "x-guidance" in schema:
        raise ConfigError("json_schema: x-guidance sets options of the library; leave it out")
    return schema


def _regex_rule(text: str) -> str:
    """A rule of Lark that matches a regular expression."""
    backslashes = len(text) - len(text.rstrip("\\"))
    if not text or backslashes % 2:
        raise ConfigError(f"regex={shown(text)}; allowed: an expression that isn't empty, without a backslash at its end")
    return f"start: /{regex_to_lark(text, '')}/"


class _Vocabulary:
    """A model's tokens as llguidance wants them, and as bits.

    llguidance knows ids beyond the model's: one that stands for the text's end, and one for each token that adds other bytes
    at the beginning of a text.

    Attributes:
        tokenizer: llguidance's.
        size: the model's token ids, V.
        words_W: bits of the tokens that may be part of a text, int32 [ceil(V / 32)].
        buffer_words: int32 words of llguidance's masks.
        first: the further id of each token that adds other bytes at the beginning; -1 if it adds none there.
    """

    def __init__(self, words: list[bytes], first: Mapping[int, bytes]) -> None:
        self.size = len(words)
        self.first = dict.fromkeys(first, -1)
        extra = [id for id, word in first.items() if word]
        self.first.update((id, self.size + 1 + n) for n, id in enumerate(extra))
        # Without any special token, llguidance panics where a grammar names one.
        tokens = [*words, b"", *(first[id] for id in extra), b"\xff<none>"]
        self.buffer_words = -(-len(tokens) // 32)
        self.words_W = bits_of((id for id, word in enumerate(words) if word), self.size)
        self.tokenizer = LLTokenizer(_TokenList(tokens, end=self.size))  # type: ignore[arg-type]

    def allow_first(self, buffer: IntMask, *, may_go_on: bool) -> None:
        """Set the bits of tokens at the beginning of a text, in a mask of llguidance's, by those of their further ids."""
        bits = np.unpackbits(buffer.view(np.uint8), bitorder="little")
        for token, further in self.first.items():
            bits[token] = may_go_on if further < 0 else bits[further]
        buffer.view(np.uint8)[:] = np.packbits(bits, bitorder="little")


class _TokenList:
    """The interface that ``LLTokenizer`` asks of a tokenizer."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    special_token_ids: tuple[int, ...] = ()

    def __init__(self, tokens: list[bytes], end: int) -> None:
        self.tokens, self.eos_token_id = tokens, end

    def __call__(self, text: bytes) -> list[int]:
        """Cut a text into tokens. Not called: nothing is forced."""
        return []


def bits_of(tokens: Iterable[int], vocabulary: int) -> IntMask:
    """A bitmask of tokens: bit ``token % 32`` of word ``token // 32``; int32 [ceil(vocabulary / 32)]."""
    bits = np.zeros(-(-vocabulary // 32) * 32, bool)
    bits[list(tokens)] = True
    return np.packbits(bits, bitorder="little").view(np.int32)


class GrammarCompiler:
    """Compiles grammars for one model. For use by several threads at once.

    Args:
        tokenizer: the checkpoint's.
        vocabulary: number of the model's token ids. Ids beyond the tokenizer's are never allowed.
        end_tokens: tokens that end the model's texts, and so are no part of one.

    Raises:
        ConfigError: the bytes of the tokenizer's tokens aren't known.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, end_tokens: Iterable[int] = ()) -> None:
        found, ends = token_bytes(tokenizer, vocabulary), frozenset(end_tokens)
        # No text in UTF-8 has the byte 0xFF; llguidance marks special tokens with it.
        no_words = {id for id, word in enumerate(found.words) if id in ends or word[:1] == b"\xff"}
        words = [b"" if id in no_words else word for id, word in enumerate(found.words)]
        self._vocabulary = _Vocabulary(words, {id: word for id, word in found.first.items() if id not in no_words})

    def start(self, grammar: Grammar, stop_tokens: frozenset[int], tokens: Iterable[int] = ()) -> GrammarState:
        """Compile a request's grammar: its state after ``tokens``, with its first mask computed.

        Every request has a grammar of its own, although it takes milliseconds to compile one. Copies of one share the states
        of its expressions, and the limits on these: a request could fail because of what others had written.

        Args:
            grammar: the request's.
            stop_tokens: tokens that end the request's output. Those that are no part of a text are allowed where it may end.
            tokens: new tokens of the request so far.

        Raises:
            ConfigError: the grammar is wrong or too large.
        """
        kind, translated = grammar.kind, _translated(grammar.kind, grammar.text)
        tokenizer = self._vocabulary.tokenizer
        matcher = _on_deep_stack(lambda: LLMatcher(tokenizer, translated, log_level=0, limits=_limits(kind)))
        _refuse(kind, matcher.get_error())
        return GrammarState(matcher, self._vocabulary, stop_tokens, tokens, setting=_SETTINGS[kind])


class GrammarState:
    """How far a request's text has come in its grammar. Not for use by several threads at once.

    It advances only by ``accept``: a step that failed, or is repeated, leaves it as it was, and finds the same mask again.

    Attributes:
        finished: the text is complete, and nothing may follow but an end token.
        error: why the text can't be continued, although it isn't complete: the grammar took too much work at some token, or no
            token of the vocabulary has the bytes that must follow. It begins with the setting. None without an error.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        vocabulary: _Vocabulary,
        stop_tokens: frozenset[int],
        tokens: Iterable[int],
        *,
        setting: str,
    ) -> None:
        self._setting = setting
        self.finished = False
        self.error: str | None = None
        self._matcher, self._vocabulary = matcher, vocabulary
        self._buffer = np.zeros(vocabulary.buffer_words, np.int32)  # llguidance writes into it
        self._address = self._buffer.ctypes.data
        self._allowed_W = self._buffer[: len(vocabulary.words_W)]
        self._ends = frozenset(
            token for token in stop_tokens if token < vocabulary.size and not vocabulary.words_W[token // 32] >> token % 32 & 1
        )
        self._ends_W = bits_of(self._ends, vocabulary.size)
        self._beginning = bool(vocabulary.first)
        self._computed = False
        for token in tokens:
            self.accept(token)
        self.allowed()

    def allowed(self) -> IntMask:
        """The tokens that may come next, as bits: int32 [ceil(V / 32)]; see ``bits_of``. Valid until the next ``accept``.

        At least one bit is set, so that a token can be chosen: where ``finished`` or ``error`` is found out here, ``accept``
        doesn't take that token.
        """
        if not self._computed:
            self._compute()
            self._computed = True
        return self._allowed_W

    def _compute(self) -> None:
        vocabulary, allowed_W = self._vocabulary, self._allowed_W
        self._matcher.unsafe_compute_mask_ptr(self._address, self._buffer.nbytes)
        if self._matcher.is_error():
            self.error = self.error or self._in_words()
        may_end = bool(self._buffer[vocabulary.size // 32] >> vocabulary.size % 32 & 1)
        if self._beginning:
            vocabulary.allow_first(self._buffer, may_go_on=not self._matcher.is_stopped())
        np.bitwise_and(allowed_W, vocabulary.words_W, out=allowed_W)
        if not allowed_W.any() and self.error is None:
            self.finished = may_end
            self.error = None if may_end else f"{self._setting}: {_DEAD_END}"
        if may_end and self._ends:
            np.bitwise_or(allowed_W, self._ends_W, out=allowed_W)
        elif self.finished or self.error:
            allowed_W[:] = vocabulary.words_W

    def accept(self, token: int) -> bool:
        """Advance by the chosen token. False if it is no part of the output, because no token can follow the text so far."""
        if self.finished or self.error:
            return False
        self._computed = False
        if token in self._ends:
            self.finished = True
            return True
        if self._beginning:
            self._beginning = False
            token = self._vocabulary.first.get(token, token)
            if token < 0:  # it adds nothing here
                return True
        if self._matcher.consume_token(token):
            self.finished = self._matcher.is_stopped()
        else:
            self.error = self._in_words()
        return True

    def _in_words(self) -> str:
        """llguidance's error."""
        reason = _reason(self._matcher.get_error())
        return f"{self._setting}: {_DEAD_END if reason == 'NoExtensionBias' else reason}"
