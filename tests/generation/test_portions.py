"""Portions of a request: a stop string cuts tokens, log-probabilities and text alike, however the outputs are cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epslots.generation.portions import Portion, PortionMaker, push_until_stop
from epslots.generation.requests import Output, TokenLogprobs
from epslots.generation.text import TextStream
from tests.support.tokenizers import TOKENIZERS

TEXT = "one two three two four"


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
def test_a_stop_string_cuts_all_alike(name: str, data: st.DataObject):
    tokenizer = TOKENIZERS[name]
    vocabulary = len(tokenizer)
    tokens = data.draw(st.lists(st.integers(0, vocabulary - 1), min_size=1, max_size=12), label="tokens")
    whole = str(tokenizer.decode(tokens, skip_special_tokens=True))
    start = data.draw(st.integers(0, max(0, len(whole) - 1)), label="start")
    stop = [text for text in (whole[start : start + 2],) if text and data.draw(st.booleans(), label="stop")]
    least = data.draw(st.integers(0, len(tokens)), label="min_tokens")
    cuts = sorted(data.draw(st.sets(st.integers(1, len(tokens) - 1)), label="cuts") if len(tokens) > 1 else [])

    once = TextStream(tokenizer, stop, least)
    text = once.push(tokens)
    text += once.finish()
    kept = len(tokens) if once.stopped_after is None else once.stopped_after
    assert once.tokens == kept

    maker, found = PortionMaker(tokenizer, stop, least), list[Portion]()
    bounds = [0, *cuts, len(tokens)]
    for begin, end in pairwise(bounds):
        part, last = tuple(tokens[begin:end]), end == len(tokens)
        logprobs = tuple(TokenLogprobs(token, -1.0) for token in part)
        found.append(maker.take(Output("a", part, last, "length" if last else None, logprobs=logprobs)))
        if found[-1].reason is not None:
            break
    assert sum((portion.tokens for portion in found), ()) == tuple(tokens[:kept])
    assert sum((portion.logprobs for portion in found), ()) == tuple(TokenLogprobs(token, -1.0) for token in tokens[:kept])
    assert "".join(str(portion.text) for portion in found) == text
    assert [portion.reason for portion in found[:-1]] == [None] * (len(found) - 1)
    assert found[-1].reason == ("length" if once.stopped_after is None else "stop")


def test_an_output_ends_where_a_stop_string_is_complete():
    tokenizer = TOKENIZERS["bytes"]
    tokens = tuple(tokenizer.encode(TEXT, add_special_tokens=False))
    logprobs = tuple(TokenLogprobs(token, -1.0) for token in tokens)
    stream = TextStream(tokenizer, ["three"])
    text, output = push_until_stop(stream, Output("a", tokens, True, "error", "too late", logprobs))
    assert text == "one two "
    assert stream.stopped_after is not None
    kept = stream.stopped_after
    assert output == Output("a", tokens[:kept], True, "stop", None, logprobs[:kept])
    assert tokenizer.decode(output.tokens).endswith("three")


def test_without_a_tokenizer_a_portion_has_no_text():
    output = Output("a", (5,), True, "length")
    assert PortionMaker(None, (), 0).take(output) == Portion((5,), None, reason="length")
