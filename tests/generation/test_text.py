"""Text that comes in pieces is the text of all tokens, never with half a character, and ends before a stop string."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from epslots.errors import ConfigError
from epslots.example import example_model
from epslots.generation.text import TextStream, encode_prompt, load_tokenizer, stop_strings
from tests.support.tokenizers import TOKENIZERS, byte_level

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"  # one picture of five code points


BYTE_LEVEL = TOKENIZERS["bytes"]
EVERY = pytest.mark.parametrize("name", TOKENIZERS)


def decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    text = tokenizer.decode(list(tokens), skip_special_tokens=True)
    assert isinstance(text, str)
    return text


def split(tokens: Sequence[int], cuts: Sequence[int]) -> list[list[int]]:
    """Consecutive parts, some of them empty."""
    edges = [0, *sorted(min(cut, len(tokens)) for cut in cuts), len(tokens)]
    return [list(tokens[a:b]) for a, b in pairwise(edges)]


def pieces_of(stream: TextStream, parts: Sequence[Sequence[int]]) -> list[str]:
    return [*(stream.push(part) for part in parts), stream.finish()]


def tokens_of(data: st.DataObject, tokenizer: PreTrainedTokenizerBase, most: int = 40) -> list[int]:
    """Any tokens, those of a text, or a mixture."""
    anything = st.lists(st.integers(0, len(tokenizer) - 1), max_size=most)
    sense = st.text(st.sampled_from("ab \n.e\u00e9\u6587\U0001f642" + FAMILY), max_size=10)
    texts = sense.map(lambda text: tokenizer(text)["input_ids"] if text else [])
    drawn = data.draw(st.lists(st.one_of(anything, texts), max_size=3))
    return [token for part in drawn for token in part][:most]


cuts = st.lists(st.integers(0, 40), max_size=8)


# --- decoding ----------------------------------------------------------------------------------------------------------------


@EVERY
@settings(max_examples=150, deadline=None)
@given(data=st.data(), at=cuts)
def test_all_pieces_are_the_whole(name: str, data: st.DataObject, at: list[int]):
    tokenizer = TOKENIZERS[name]
    tokens = tokens_of(data, tokenizer)
    stream = TextStream(tokenizer)
    pieces = pieces_of(stream, split(tokens, at))
    assert "".join(pieces) == decode(tokenizer, tokens), "so no piece has half a character"
    assert not stream.stopped
    assert stream.stopped_after is None


@settings(max_examples=50, deadline=None)
@given(tokens=st.lists(st.integers(95, 105) | st.integers(255, 262), max_size=12))
def test_special_tokens_are_text_where_they_are_asked_for(tokens: list[int]):
    """Also those whose names no byte-level vocabulary could write."""
    tokenizer = byte_level(["the", "\u00e9"], special=("<end>", "<\uff5cbegin\u2581of\uff5c>"), plain=("<think>",))
    for special in (True, False):
        stream = TextStream(tokenizer, special_tokens=special)
        assert stream._words is not None
        whole = tokenizer.decode(tokens, skip_special_tokens=not special)
        assert "".join(pieces_of(stream, [[token] for token in tokens])) == whole


@pytest.mark.parametrize("name", ["bytes", "sentencepiece"])
@pytest.mark.parametrize("character", ["\u00e9", "\u6587", "\U0001f642", FAMILY])
def test_a_character_comes_whole(name: str, character: str):
    tokenizer = TOKENIZERS[name]
    tokens = tokenizer("a" + character + "b")["input_ids"]
    assert len(tokens) > 3, "its bytes are tokens"
    stream = TextStream(tokenizer)
    pieces = [stream.push([token]) for token in tokens]
    assert [piece for piece in pieces if piece] in (["a", *character, "b"], ["a", character, "b"], ["a", character + "b"])
    assert stream.finish() == ""


def test_an_unfinished_character_comes_at_the_end():
    tokens = BYTE_LEVEL("a\U0001f642")["input_ids"]
    stream = TextStream(BYTE_LEVEL)
    assert stream.push(tokens[:-1]) == "a"
    assert stream.finish() == decode(BYTE_LEVEL, tokens[:-1])[1:] != ""
    assert stream.finish() == "", "handed out once"


def test_text_comes_at_once():
    stream = TextStream(BYTE_LEVEL)
    for token in BYTE_LEVEL("def add(a, b):\n    return a + b")["input_ids"]:
        assert stream.push([token]) == decode(BYTE_LEVEL, [token]) != ""


def test_special_and_unknown_tokens_have_no_text():
    tokenizer = TOKENIZERS["sentencepiece"]
    bos, the, end, line = tokenizer.convert_tokens_to_ids(["<s>", "\u2581the", "\u2581end", "<0x0A>"])
    stream = TextStream(tokenizer)
    beyond = len(tokenizer) + 5
    for token, piece in ((the, "the"), (end, " end"), (line, ""), (the, "\n the")):
        assert [stream.push([t]) for t in (bos, beyond, token, bos, beyond)] == ["", "", piece, "", ""]
    assert stream.finish() == ""


def test_the_window_stays_small(monkeypatch: pytest.MonkeyPatch):
    """Also for bytes that never make a character, and when nothing but special tokens comes."""
    seen = []
    stream = TextStream(BYTE_LEVEL, ["never"])
    inner = stream._decode
    monkeypatch.setattr(stream, "_decode", lambda tokens: seen.append(len(tokens)) or inner(tokens))
    (broken,) = BYTE_LEVEL.convert_tokens_to_ids(["\u0122"])
    assert decode(BYTE_LEVEL, [broken]) == UNFINISHED
    words = BYTE_LEVEL("import numpy as np\n" * 200)["input_ids"]
    text = stream.push(words)
    assert max(seen) <= 2
    stream.push(BYTE_LEVEL.all_special_ids * 1000)
    assert max(seen) <= 2
    text += stream.push([broken] * 1000) + stream.push(words) + stream.finish()
    assert max(seen) <= 2 * 65
    assert text == decode(BYTE_LEVEL, [*words, *[broken] * 1000, *words])


# --- stop strings ------------------------------------------------------------------------------------------------------------


def expected_stop(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], stops: Sequence[str], least: int
) -> tuple[str, int | None]:
    """Token by token over the whole text: the text, and how many tokens it took."""
    exempt = len(decode(tokenizer, tokens[:least]).rstrip(UNFINISHED)) if least else 0
    for count in range(least + 1, len(tokens) + 1):
        text = decode(tokenizer, tokens[:count]).rstrip(UNFINISHED)
        for end in range(exempt + 1, len(text) + 1):
            starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
            if starts:
                return text[: min(starts)], count
    return decode(tokenizer, tokens), None


@EVERY
@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    at=cuts,
    least=st.just(0) | st.integers(0, 8),
    stops=st.lists(
        st.text(st.sampled_from("ab \n.e\u00e9\u6587\U0001f642thnd"), min_size=1, max_size=5), min_size=1, max_size=3
    ),
)
def test_the_text_ends_before_a_stop_string(name: str, data: st.DataObject, at: list[int], least: int, stops: list[str]):
    """One that isn't complete within the first ``min_tokens``."""
    tokenizer = TOKENIZERS[name]
    tokens = tokens_of(data, tokenizer)
    if (whole := decode(tokenizer, tokens).replace(UNFINISHED, "")) and data.draw(st.booleans()):
        start = data.draw(st.integers(0, len(whole) - 1))
        stops.append(whole[start : start + data.draw(st.integers(1, 5))])
    stream = TextStream(tokenizer, stops, least)
    text, count = expected_stop(tokenizer, tokens, stops, least)
    assert "".join(pieces_of(stream, split(tokens, at))) == text
    assert stream.stopped_after == count
    assert stream.stopped == (count is not None)


@EVERY
@settings(max_examples=60, deadline=None)
@given(data=st.data(), stops=st.lists(st.text("abe. tnd", min_size=1, max_size=4), min_size=1, max_size=3))
def test_no_more_is_held_back_than_may_be_a_stop_string(name: str, data: st.DataObject, stops: list[str]):
    tokenizer = TOKENIZERS[name]
    plain, stream = TextStream(tokenizer, ["\U0010ffff"]), TextStream(tokenizer, stops)  # the first one holds nothing back
    certain = given_out = ""
    for token in tokens_of(data, tokenizer):
        certain += plain.push([token])
        given_out += stream.push([token])
        if stream.stopped:
            break
        held = certain[len(given_out) :]
        assert certain.startswith(given_out)
        begins = [certain[-length:] for length in range(1, 4) if any(stop.startswith(certain[-length:]) for stop in stops)]
        assert held == max(begins, key=len, default="")


def characters(text: str) -> list[list[int]]:
    """Tokens of one character each."""
    parts = [BYTE_LEVEL(character)["input_ids"] for character in text]
    assert all(len(part) == 1 for part in parts)
    return parts


@pytest.mark.parametrize(
    ("text", "stops", "pieces", "after"),
    [
        ("abcd", ["c"], ["a", "b", "", "", ""], 3),
        ("abcd", ["bc"], ["a", "", "", "", ""], 3),
        ("abcd", ["bx"], ["a", "", "bc", "d", ""], None),
        ("aabab", ["ab"], ["", "a", "", "", "", ""], 3),
        ("aaab", ["aab"], ["", "", "a", "", ""], 4),
        ("abcd", ["abcx", "bc"], ["", "", "a", "", ""], 3),
        ("abcd", ["bc", "abc", "c"], ["", "", "", "", ""], 3),
        ("abcd", ["abcd", "bc"], ["", "", "a", "", ""], 3),
        ("abab", ["abac"], ["", "", "", "ab", "ab"], None),
        ("xab", ["abc"], ["x", "", "", "ab"], None),
    ],
)
def test_stop_strings_over_several_tokens(text: str, stops: list[str], pieces: list[str], after: int | None):
    stream = TextStream(BYTE_LEVEL, stops)
    assert pieces_of(stream, characters(text)) == pieces
    assert stream.stopped_after == after


@pytest.mark.parametrize(
    ("text", "least", "pieces", "after"),
    [
        ("abab", 1, ["", "", "", "", ""], 2),
        ("abab", 2, ["", "", "ab", "", ""], 4),
        ("abab", 3, ["", "", "ab", "", ""], 4),
        ("abab", 4, ["", "", "ab", "", "ab"], None),
        ("abcabcd", 3, ["", "", "", "", "abc", "", "", ""], 5),
    ],
)
def test_the_first_tokens_complete_no_stop_string(text: str, least: int, pieces: list[str], after: int | None):
    """Also where they are held back, because a longer one may begin there."""
    stream = TextStream(BYTE_LEVEL, ["ab", "abcabcx", "abcd"], least)
    assert pieces_of(stream, characters(text)) == pieces
    assert stream.stopped_after == after


def test_of_stop_strings_in_one_token_the_first_to_end_wins():
    (token,) = BYTE_LEVEL("return")["input_ids"]
    for stops, text in (
        (["turn", "et"], "r"),
        (["r"], ""),
        (["urn", "etur"], "r"),
        (["n", "retur"], ""),
        (["eturn", "t"], "re"),
    ):
        stream = TextStream(BYTE_LEVEL, stops)
        assert stream.push([token, token]) == text
        assert stream.stopped_after == 1


def test_a_stop_string_of_bytes_ends_with_its_last_one():
    """Though the text of bytes is certain only with the token after them."""
    tokenizer = TOKENIZERS["sentencepiece"]
    tokens = tokenizer.convert_tokens_to_ids(["a", "<0x0A>", "<0x0A>", "b"])
    plain, stopping = TextStream(tokenizer), TextStream(tokenizer, ["\n\n"])
    assert [plain.push([token]) for token in tokens] == ["a", "", "", "\n\nb"]
    assert [stopping.push([token]) for token in tokens] == ["a", "", "", ""]
    assert stopping.stopped_after == 3


def test_half_a_character_is_no_stop_string():
    stream = TextStream(BYTE_LEVEL, [UNFINISHED])
    assert "".join(pieces_of(stream, [BYTE_LEVEL("a\U0001f642b")["input_ids"]])) == "a\U0001f642b"
    assert not stream.stopped


def test_tokens_after_the_stop_have_no_effect():
    stream = TextStream(BYTE_LEVEL, ["b"])
    assert stream.push([token for part in characters("abab") for token in part]) == "a"
    assert stream.push(characters("c")[0]) == stream.finish() == ""
    assert stream.stopped_after == 2


@pytest.mark.parametrize("stop", ["", "abc", [""], ["a", ""], [1], 3, None, [b"a"]])
def test_bad_stop_strings(stop: Any):
    with pytest.raises(ConfigError, match=r"stop=.*; allowed: strings of at least one character"):
        TextStream(BYTE_LEVEL, stop)
    assert stop_strings(["a", "bc"]) == ("a", "bc")


# --- prompts -----------------------------------------------------------------------------------------------------------------


def test_prompts():
    assert encode_prompt(BYTE_LEVEL, "def f(") == encode_prompt(BYTE_LEVEL, "def f(", chat=False)
    assert decode(BYTE_LEVEL, encode_prompt(BYTE_LEVEL, "def f(")) == "def f("
    with pytest.raises(ConfigError, match=r"chat=True: this tokenizer has no chat template"):
        encode_prompt(BYTE_LEVEL, "a", chat=True)
    text: Any
    for text in ("", None, 5, b"a", ["a"]):
        with pytest.raises(ConfigError, match="allowed: text that isn't empty"):
            encode_prompt(BYTE_LEVEL, text)
    with pytest.raises(ConfigError, match="character 1 is half of a pair"):
        encode_prompt(BYTE_LEVEL, "a\ud83d")
    with pytest.raises(ConfigError, match="has no tokens"):
        encode_prompt(TOKENIZERS["wordpiece"], " \n")


def test_prompts_in_a_chat_template():
    tokenizer = load_tokenizer(example_model())
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('never') }}{% endif %}"
        "{{ m.role }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}answer:{% endif %}"
    )
    assert decode(tokenizer, encode_prompt(tokenizer, "hi")) == "user:hi;answer:"
    assert encode_prompt(tokenizer, "hi", chat=True) == encode_prompt(tokenizer, "hi")
    assert decode(tokenizer, encode_prompt(tokenizer, "hi", chat=False)) == "hi"
    with pytest.raises(ConfigError, match="template refuses the prompt: never"):
        encode_prompt(tokenizer, "no")


def test_a_folder_without_a_tokenizer(tmp_path: Any):
    with pytest.raises(ConfigError, match="has no tokenizer"):
        load_tokenizer(tmp_path)


def test_a_long_text_in_random_parts():
    rng = random.Random(3)
    tokens = BYTE_LEVEL("".join(rng.choice("ab \n\u00e9\u6587\U0001f642") for _ in range(2000)))["input_ids"]
    parts = split(tokens, [rng.randrange(len(tokens)) for _ in range(300)])
    assert "".join(pieces_of(TextStream(BYTE_LEVEL), parts)) == decode(BYTE_LEVEL, tokens)
