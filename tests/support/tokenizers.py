"""Tokenizers: bytes, sentencepiece with byte fallback, wordpiece; and small ones whose tokens are chosen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from epslots.example import example_model
from epslots.generation.text import load_tokenizer

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def sentencepiece() -> PreTrainedTokenizerBase:
    """As Llama's and Mixtral's: spaces begin words, and characters without a token are bytes."""
    words = ["<unk>", "<s>", "</s>", *BYTES, "\u2581", "\u2581the", "\u2581end", "a", "b", ".", "\u2581a", "e"]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def wordpiece() -> PreTrainedTokenizerBase:
    """As Bert's: a space before each token that continues no word."""
    words = ["[UNK]", "[PAD]", "the", "end", "##ing", "##s", "a", "##b", "\u00e9t\u00e9", "##\u6587"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece("##", cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]")


def byte_level(
    words: Iterable[str] = (), special: Sequence[str] = ("<end>",), plain: Iterable[str] = ()
) -> PreTrainedTokenizerBase:
    """As GPT-2's: token b is byte b; then ``words``, added tokens that are text, and special ones, the first of them EOS."""
    names = [*ALPHABET, *("".join(ALPHABET[byte] for byte in word.encode()) for word in words)]
    tokenizer = Tokenizer(models.BPE({name: id for id, name in enumerate(names)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(name, special=False) for name in plain])
    tokenizer.add_tokens([AddedToken(name, special=True) for name in special])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0])


# The character of each byte in GPT-2's vocabulary.
ALPHABET = [
    *map(chr, (*range(0x100, 0x121), *range(0x21, 0x7F), *range(0x121, 0x143), *range(0xA1, 0xAD), 0x143, *range(0xAE, 0x100)))
]


def unigram() -> PreTrainedTokenizerBase:
    """As T5's, with bytes: its decoder drops all spaces of a text's first token."""
    words = ["<unk>", "</s>", *BYTES, "\u2581", "\u2581a", "\u2581\u2581b", "a", "b", "ab", "\u00e9"]
    tokenizer = Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=0, byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {"bytes": load_tokenizer(example_model()), "sentencepiece": sentencepiece(), "wordpiece": wordpiece()}
