"""Tokens that end a text by a checkpoint: those of its generation configuration, and its tokenizer's end token.

Chat models often name the end of a turn in only one of the two. transformers' ``generate`` uses the first. vLLM ends a text at
either, and so does epslots.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from epslots.errors import ConfigError
from epslots.generation.text import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def end_tokens(model: PreTrainedModel, *, ignore_tokenizer_eos: bool = False) -> frozenset[int]:
    """The tokens that end the model's texts.

    Args:
        model: its generation configuration and its checkpoint's tokenizer are read.
        ignore_tokenizer_eos: leave the tokenizer out, as transformers' ``generate`` does. It isn't loaded then.
    """
    stated = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = stated if isinstance(stated, list | tuple | set) else [stated]
    vocabulary = model.config.get_text_config().vocab_size
    found = frozenset(token for token in listed if isinstance(token, int) and 0 <= token < vocabulary)  # -1 stands for none
    if ignore_tokenizer_eos:
        return found
    try:
        return found | tokenizer_end_tokens(load_tokenizer(model.name_or_path), vocabulary)
    except ConfigError:  # a model without a tokenizer is served by token ids
        return found


def tokenizer_end_tokens(tokenizer: PreTrainedTokenizerBase | None, vocabulary: int) -> frozenset[int]:
    """The tokenizer's end token, as a set; empty if there is none, or the model has no such token.

    Args:
        tokenizer: the checkpoint's, None without one.
        vocabulary: number of the model's token ids.
    """
    token = getattr(tokenizer, "eos_token_id", None)
    if tokenizer is None or token is None or not 0 <= token < vocabulary:
        return frozenset()
    # A name that isn't in the vocabulary has the id of the unknown token, which ends nothing.
    return frozenset({token} if tokenizer.convert_ids_to_tokens(token) == str(tokenizer.eos_token) else ())
