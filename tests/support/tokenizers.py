"""Tokenizers of three kinds: bytes, sentencepiece with byte fallback, wordpiece."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
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


TOKENIZERS = {"bytes": load_tokenizer(example_model()), "sentencepiece": sentencepiece(), "wordpiece": wordpiece()}
