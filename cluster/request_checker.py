"""``RequestChecker``: from a user's prompt and settings to the engine's ``Request``, or a ConfigError."""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

from transformers import PreTrainedTokenizerBase

from cluster.generation import GenerationSettings, Prompt, read_settings
from cluster.messages.rank import Loaded
from epslots.errors import ConfigError, shown
from epslots.generation.end_tokens import tokenizer_end_tokens
from epslots.generation.requests import Request
from epslots.generation.text import encode_prompt


class RequestChecker:
    """Turns prompts into requests, and refuses wrong ones. For any thread.

    Args:
        loaded: a rank's report of the model and its limits.
        tokenizer: the checkpoint's, if it can be loaded.
        problem: why it can't.
    """

    def __init__(self, loaded: Loaded, tokenizer: PreTrainedTokenizerBase | None, problem: str = "") -> None:
        self._loaded, self._problem = loaded, f" ({problem})" if problem else ""
        self._numbers = itertools.count()
        # Tokenizers in Rust serve several threads at once, unless one sets padding or truncation meanwhile: the copy belongs
        # to this object alone. Tokenizers in Python keep a state while they work.
        in_rust = getattr(tokenizer, "is_fast", False)
        self._tokenizer = copy.deepcopy(tokenizer) if in_rust else tokenizer
        self._tokenizing: AbstractContextManager[object] = nullcontext() if in_rust else threading.Lock()
        self._tokenizer_ends = tokenizer_end_tokens(tokenizer, loaded.vocabulary)

    def request(self, prompt: Prompt, settings: GenerationSettings) -> tuple[Request, GenerationSettings]:
        """The request for a prompt, and its settings. A prompt that is too long is refused before it is read.

        Args:
            settings: for a prompt without settings of its own.

        Raises:
            ConfigError: the prompt or a setting isn't allowed; the message says what was given and what is allowed.
        """
        if isinstance(prompt, Mapping):
            own = dict(prompt)
            if "prompt" not in own:
                raise ConfigError(f'a prompt with settings needs "prompt", but has only {shown(sorted(own, key=str))}')
            prompt = own.pop("prompt")
            settings = read_settings(own, settings)
        if settings.stops and self._tokenizer is None:
            raise ConfigError(f"stop: the checkpoint has no tokenizer; use stop_tokens{self._problem}")
        loaded, new = self._loaded, settings.max_new_tokens
        if isinstance(prompt, str):
            tokens = self._encode(prompt, settings)
        else:
            self._check_length(prompt, new)
            tokens = _token_ids(prompt)
        self._check_length(tokens, new)
        wrong = next((token for token in tokens if not 0 <= token < loaded.vocabulary), None)
        if wrong is not None:
            raise ConfigError(f"the prompt has token {shown(wrong)}; allowed: 0 to {loaded.vocabulary - 1}")
        ends = self._ends(settings)
        return Request(str(next(self._numbers)), tuple(tokens), new, ends, settings.sampling), settings

    def _check_length(self, prompt: object, new: int) -> None:
        length = len(prompt) if isinstance(prompt, Sequence) else 0
        size = f"the prompt has {length} tokens and max_new_tokens is {new}"
        loaded = self._loaded
        if loaded.context is not None and length + new > loaded.context:
            raise ConfigError(f"{size}, but the model's context holds {loaded.context}")
        if length + new - 1 > loaded.capacity:
            raise ConfigError(
                f"{size}, but a rank's cache holds {loaded.capacity}; shorten one of them, or give the cluster a larger "
                f"kv_tokens"
            )

    def _encode(self, text: str, settings: GenerationSettings) -> Sequence[int]:
        if self._tokenizer is None:
            raise ConfigError(f"the checkpoint has no tokenizer; give prompts as token ids{self._problem}")
        loaded = self._loaded
        limit = loaded.capacity + 1 if loaded.context is None else min(loaded.context, loaded.capacity + 1)
        with self._tokenizing:
            return encode_prompt(self._tokenizer, text, chat=settings.chat, most_tokens=limit - settings.max_new_tokens)

    def _ends(self, settings: GenerationSettings) -> frozenset[int]:
        vocabulary = self._loaded.vocabulary
        if settings.stop_tokens is None:
            stated = frozenset(token for token in self._loaded.end_tokens if token < vocabulary)
            return stated if settings.ignore_tokenizer_eos else stated | self._tokenizer_ends
        for token in settings.stop_tokens:
            if not 0 <= token < vocabulary:
                raise ConfigError(f"stop_tokens has {shown(token)}; allowed: 0 to {vocabulary - 1}")
        return frozenset(settings.stop_tokens)


def _token_ids(prompt: object) -> list[int]:
    """The token ids of a prompt that isn't text.

    Raises:
        ConfigError: it isn't a list of token ids, or is empty.
    """
    tokens = list(prompt) if isinstance(prompt, Sequence) and not isinstance(prompt, bytes | bytearray) else None
    if tokens is None or not all(isinstance(token, int) and not isinstance(token, bool) for token in tokens):
        raise ConfigError(f"a prompt of {shown(prompt)}; allowed: text, or a list of token ids")
    if not tokens:
        raise ConfigError("an empty prompt; at least one token is needed")
    return tokens
