"""The bytes that each token adds to a text. Grammars are matched against them, and texts are streamed by them.

A token's name isn't its text. Byte-level vocabularies (GPT-2's, and most since) write each byte as a character.
SentencePiece's write a space as U+2581, and a byte that is no whole character as ``<0x0A>``. The rules are those of the
decoders in Hugging Face's tokenizers. ``token_bytes`` compares their results with the tokenizer's own ``decode``, token by
token: a tokenizer that follows other rules is refused, because a grammar would be matched against another text than the user
sees.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from epslots.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_ALLOWED = "allowed: byte-level ones (as GPT-2's), and SentencePiece's, as Hugging Face's tokenizers decode them"


@dataclass(frozen=True)
class TokenBytes:
    """The bytes that a vocabulary's tokens add to a text.

    Attributes:
        words: by token id; empty for a special token, and for an id without a token.
        first: of those tokens that add other bytes at the beginning of a text: SentencePiece's decoders drop a space there.
    """

    words: tuple[bytes, ...]
    first: Mapping[int, bytes]


def token_bytes(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> TokenBytes:
    """The bytes of the tokens of a model.

    Args:
        tokenizer: the checkpoint's.
        vocabulary: number of the model's token ids; it may be more than the tokenizer has, or fewer.

    Raises:
        ConfigError: the tokenizer isn't one of Hugging Face's tokenizers, or tokens' bytes aren't known.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "decode_batch"):
        raise ConfigError(f"{type(tokenizer).__name__} doesn't say which bytes its tokens stand for; {_ALLOWED}")
    special = {id for id, added in backend.get_added_tokens_decoder().items() if added.special}
    names = [None if id in special else backend.id_to_token(id) for id in range(vocabulary)]
    bytes_of = _decoder_rule(backend)
    words = tuple(b"" if name is None else bytes_of(name) for name in names)
    return TokenBytes(words, _first_words(backend, names, words))


@dataclass(frozen=True)
class ByteVocabulary:
    """A vocabulary whose texts are their tokens' bytes in a row, as UTF-8 with U+FFFD for what is none.

    Attributes:
        said: bytes by token id, of texts without special tokens.
        all: bytes by token id, of texts with them.
    """

    said: tuple[bytes, ...]
    all: tuple[bytes, ...]


@lru_cache(maxsize=4)
def byte_vocabulary(tokenizer: PreTrainedTokenizerBase) -> ByteVocabulary | None:
    """A tokenizer's vocabulary if it is byte-level and nothing else; None for another. Takes a moment, once a tokenizer."""
    if getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return None
    try:
        found = token_bytes(tokenizer, len(tokenizer))
    except ConfigError:
        return None
    backend: Any = tokenizer.backend_tokenizer
    if [step["type"] for step in _decoder_steps(backend)] != ["ByteLevel"] or found.first:
        return None
    words = list(found.words)
    for id in backend.get_added_tokens_decoder():
        if id < len(words) and not words[id]:
            words[id] = _byte_level(backend.id_to_token(id))
            if tokenizer.decode([id], skip_special_tokens=False) != _text(words[id]):
                return None
    return ByteVocabulary(found.words, tuple(words))


def _decoder_steps(backend: Any) -> list[dict[str, Any]]:
    decoder = None if backend.decoder is None else json.loads(backend.decoder.__getstate__())
    return decoder["decoders"] if decoder and decoder["type"] == "Sequence" else [decoder] if decoder else []


def _decoder_rule(backend: Any) -> Callable[[str], bytes]:
    """The bytes of a token by its name, by the type of the tokenizer's decoder."""
    steps = _decoder_steps(backend)
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds:
        return _byte_level
    spaces = [(step["pattern"].get("String"), step["content"]) for step in steps if step["type"] == "Replace"]
    spaces += [(step["replacement"], " ") for step in steps if step["type"] == "Metaspace"]
    if not spaces or any(pattern is None for pattern, _ in spaces):
        raise ConfigError(f"a tokenizer with the decoder {sorted(kinds)} has no bytes of each token; {_ALLOWED}")

    def sentencepiece(name: str) -> bytes:
        byte = _BYTE.fullmatch(name) if "ByteFallback" in kinds else None
        if byte:
            return bytes([int(byte[1], 16)])
        for pattern, content in spaces:
            name = name.replace(pattern, content)
        return name.encode()

    return sentencepiece


def _byte_level(name: str) -> bytes:
    """The decoder's rule: a name with a character that stands for no byte is text already."""
    try:
        return bytes([_BYTE_OF[character] for character in name])
    except KeyError:
        return name.encode()


def _byte_characters() -> dict[str, int]:
    """GPT-2's table: bytes that are printable in Latin-1 stand for themselves, the others for characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_characters()


def _first_words(backend: Any, names: Sequence[str | None], words: Sequence[bytes]) -> dict[int, bytes]:
    """The bytes of tokens that add others at a text's beginning; checks all bytes by decoding each token behind another one.

    Raises:
        ConfigError: the tokenizer decodes a token to other bytes.
    """
    ids = [id for id, word in enumerate(words) if word]
    letters = [id for id in ids if (name := names[id]) and name.isascii() and name.isalpha()]
    if not letters:
        raise ConfigError(f"no token of the tokenizer is a word in ASCII letters, so its bytes can't be checked; {_ALLOWED}")
    before = letters[0]
    behind = backend.decode_batch([[before, id] for id in ids])
    for id, text in zip(ids, behind, strict=True):
        if text != _text(words[before] + words[id]):
            raise ConfigError(
                f"the tokenizer decodes token {id} ({names[id]!r}), behind {names[before]!r}, as {text!r} and not as "
                f"{_text(words[before] + words[id])!r}; {_ALLOWED}"
            )
    alone = backend.decode_batch([[id] for id in ids])
    return {id: text.encode() for id, text in zip(ids, alone, strict=True) if text != _text(words[id])}


def _text(data: bytes) -> str:
    return data.decode(errors="replace")
