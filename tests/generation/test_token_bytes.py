"""The bytes of tokens, for each kind of vocabulary: by hand, and as the tokenizer decodes them."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from epslots.errors import ConfigError
from epslots.generation.token_bytes import token_bytes
from tests.support.tokenizers import TOKENIZERS, byte_level, sentencepiece, unigram, wordpiece


def test_byte_level_tokens_are_their_bytes():
    tokenizer = byte_level(["the", " é", "\n\n"], special=("<end>", "<pad>"), plain=("<think>", "a b"))
    expected = [bytes([byte]) for byte in range(256)] + [b"the", " é".encode(), b"\n\n", b"<think>", b"a b", b"", b""]
    found = token_bytes(tokenizer, len(expected))
    assert list(found.words) == expected
    assert found.first == {}


def test_sentencepiece_tokens_drop_a_space_at_first():
    found = token_bytes(sentencepiece(), 267)
    assert found.words[:3] == (b"", b"", b"")  # special
    assert list(found.words[3:259]) == [bytes([byte]) for byte in range(256)]
    assert found.words[259:] == (b" ", b" the", b" end", b"a", b"b", b".", b" a", b"e")
    assert found.first == {3 + 0x20: b"", 259: b"", 260: b"the", 261: b"end", 265: b"a"}


def test_metaspace_drops_all_spaces_of_a_first_token():
    found = token_bytes(unigram(), 265)
    assert found.words[258:] == (b" ", b" a", b"  b", b"a", b"b", b"ab", "é".encode())
    assert found.first == {258: b"", 259: b"a", 260: b"b"}


def test_ids_without_a_token_have_no_bytes():
    assert token_bytes(byte_level(), 300).words[256:] == (b"",) * 44
    assert token_bytes(byte_level(["the"]), 100).words == tuple(bytes([byte]) for byte in range(100))


@pytest.mark.parametrize("name", ["bytes", "sentencepiece"])
def test_bytes_are_what_a_text_decodes_to(name: str):
    """Of real text, so that tokens of characters in parts come together."""
    tokenizer = TOKENIZERS[name]
    found = token_bytes(tokenizer, len(tokenizer))
    tokens = tokenizer('def f(x):\n    return {"é": "文", 1: 😀}\n', add_special_tokens=False)["input_ids"]
    first, *rest = tokens
    data = found.first.get(first, found.words[first]) + b"".join(found.words[token] for token in rest)
    assert data.decode() == tokenizer.decode(tokens, skip_special_tokens=True)


def test_vocabularies_without_bytes_are_refused():
    with pytest.raises(ConfigError, match=r"decoder \['WordPiece'\] has no bytes of each token; allowed: byte-level"):
        token_bytes(wordpiece(), 10)
    with pytest.raises(ConfigError, match="object doesn't say which bytes its tokens stand for"):
        token_bytes(object(), 10)  # type: ignore[arg-type]


def test_a_decoder_that_does_more_is_refused():
    """Its text would be another one than the grammar's."""
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "Ġ": 2}, []))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("b", "c"), decoders.ByteLevel()])
    with pytest.raises(ConfigError, match="decodes token 1 \\('b'\\), behind 'a', as 'ac' and not as 'ab'"):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=tokenizer), 3)


def test_a_vocabulary_without_letters_is_refused():
    tokenizer = Tokenizer(models.BPE({"1": 0, "2": 1}, []))
    tokenizer.decoder = decoders.ByteLevel()
    with pytest.raises(ConfigError, match="no token of the tokenizer is a word in ASCII letters"):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=tokenizer), 2)
