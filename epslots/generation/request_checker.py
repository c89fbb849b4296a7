"""``RequestChecker``: from a prompt and its settings to an engine's requests, or a ConfigError.

Python, jobs, the command line and the service all make their requests here, on one rank and on many.
"""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

from epslots.errors import ConfigError, shown
from epslots.generation.chat_template import Chat
from epslots.generation.end_tokens import end_tokens, tokenizer_end_tokens
from epslots.generation.request_limits import ModelLimits, cached_tokens, check_context, foreign_token
from epslots.generation.requests import Request
from epslots.generation.sampling import choice_seed
from epslots.generation.settings import GenerationSettings
from epslots.generation.text import encode_chat, encode_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def model_limits(model: PreTrainedModel, capacity: int) -> ModelLimits:
    """A model's limits, with a cache that can hold ``capacity`` tokens of one request."""
    config = model.config.get_text_config()
    return ModelLimits(
        capacity=capacity,
        vocabulary=int(config.vocab_size),
        context=getattr(config, "max_position_embeddings", None),
        end_tokens=tuple(sorted(end_tokens(model, ignore_tokenizer_eos=True))),
    )


class RequestChecker:
    """Turns prompts into requests, and refuses wrong ones, in a time that grows only with their size. For any thread.

    Args:
        limits: the model's.
        tokenizer: the checkpoint's, if it can be loaded.
        problem: why it can't.
    """

    def __init__(self, limits: ModelLimits, tokenizer: PreTrainedTokenizerBase | None, problem: str = "") -> None:
        self.limits, self._problem = limits, f" ({problem})" if problem else ""
        self._numbers = itertools.count()
        # Tokenizers in Rust serve several threads at once, unless one sets padding or truncation meanwhile: the copy belongs
        # to this object alone. Tokenizers in Python keep a state while they work.
        in_rust = getattr(tokenizer, "is_fast", False)
        self._tokenizer = copy.deepcopy(tokenizer) if in_rust else tokenizer
        self._tokenizing: AbstractContextManager[object] = nullcontext() if in_rust else threading.Lock()
        self._tokenizer_ends = tokenizer_end_tokens(tokenizer, limits.vocabulary)

    def requests(self, prompt: str | Sequence[int], settings: GenerationSettings) -> list[Request]:
        """A prompt's requests, one for each of its ``n`` choices. A prompt that is too long is refused before it is read.

        Args:
            prompt: text or token ids.
            settings: the prompt's, from ``read_settings``.

        Raises:
            ConfigError: the prompt or a setting isn't allowed; the message says what was given and what is allowed.
        """
        self._check_settings(settings)
        tokens = self._tokens(prompt, settings)
        first = Request(
            id=str(next(self._numbers)),
            prompt=tuple(tokens),
            max_new_tokens=settings.max_new_tokens,
            stop_tokens=self._ends(settings),
            sampling=settings.sampling,
            grammar=settings.text_grammar,
            logprobs=settings.logprobs,
            prompt_logprobs=settings.prompt_logprobs,
            priority=settings.priority,
        )
        return [first, *(self._choice(first, choice) for choice in range(1, settings.n))]

    def _choice(self, first: Request, choice: int) -> Request:
        """A further choice of a request's prompt. The prompt's log-probabilities come only with the first one."""
        sampling = replace(first.sampling, seed=choice_seed(first.sampling.seed, choice))
        return replace(first, id=str(next(self._numbers)), sampling=sampling, prompt_logprobs=None)

    def _check_settings(self, settings: GenerationSettings) -> None:
        """Refuse settings that this model or its checkpoint can't follow."""
        if self._tokenizer is None:
            if settings.stops:
                raise ConfigError(f"stop: the checkpoint has no tokenizer; use stop_tokens{self._problem}")
            if settings.text_grammar is not None:
                raise ConfigError(
                    f"json_schema, regex and grammar need the tokens' text, but the checkpoint has no tokenizer{self._problem}"
                )
        for name in ("stop_tokens", "logit_bias"):
            if wrong := foreign_token(getattr(settings, name) or (), self.limits.vocabulary):
                raise ConfigError(f"{name} has {wrong}")

    def _tokens(self, prompt: str | Sequence[int], settings: GenerationSettings) -> Sequence[int]:
        if isinstance(prompt, str):
            tokens = self._encode(prompt, settings)
        else:
            self._check_length(prompt, settings.max_new_tokens)
            tokens = _token_ids(prompt)
            if settings.chat:
                raise ConfigError("chat=True with a prompt of token ids; allowed: False or None, or a prompt of text")
        self._check_length(tokens, settings.max_new_tokens)
        if wrong := foreign_token(tokens, self.limits.vocabulary):
            raise ConfigError(f"the prompt has {wrong}")
        return tokens

    def _check_length(self, prompt: object, new: int) -> None:
        length = len(prompt) if isinstance(prompt, Sequence) else 0
        size = f"the prompt has {length} tokens and max_new_tokens is {new}"
        check_context(length, new, self.limits.context, size)
        if cached_tokens(length, new) > self.limits.capacity:
            raise ConfigError(
                f"{size}, but a rank's cache holds {self.limits.capacity}; shorten one of them, or raise kv_tokens "
                f"(--kv-tokens)"
            )

    def _encode(self, text: str, settings: GenerationSettings) -> Sequence[int]:
        if self._tokenizer is None:
            raise ConfigError(f"the checkpoint has no tokenizer; give prompts as token ids{self._problem}")
        most = self.limits.most_tokens - settings.max_new_tokens
        with self._tokenizing:
            return encode_prompt(self._tokenizer, text, chat=settings.chat, most_tokens=most)

    def encode(self, prompt: str | Chat, *, special_tokens: bool = True, most_tokens: int | None = None) -> list[int]:
        """A prompt's tokens.

        Args:
            prompt: text, or a chat for the chat template.
            special_tokens: add the tokenizer's special tokens to text; in a chat, they are the template's.
            most_tokens: tokens that fit, None for any. Text that certainly has more is refused early; somewhat more than fit
                may be returned.

        Raises:
            ConfigError: the prompt isn't allowed, or there is no tokenizer.
        """
        if self._tokenizer is None:
            raise ConfigError(f"the checkpoint has no tokenizer; give prompts as token ids{self._problem}")
        with self._tokenizing:
            if isinstance(prompt, Chat):
                return encode_chat(self._tokenizer, prompt, most_tokens=most_tokens)
            return encode_prompt(self._tokenizer, prompt, chat=False, most_tokens=most_tokens, special_tokens=special_tokens)

    @property
    def end_tokens(self) -> frozenset[int]:
        """The tokens that end a text by default."""
        return self._stated_ends | self._tokenizer_ends

    @property
    def _stated_ends(self) -> frozenset[int]:
        return frozenset(token for token in self.limits.end_tokens if token < self.limits.vocabulary)

    def _ends(self, settings: GenerationSettings) -> frozenset[int]:
        if settings.stop_tokens is not None:
            return frozenset(settings.stop_tokens)
        if settings.ignore_eos:
            return frozenset()
        return self._stated_ends if settings.ignore_tokenizer_eos else self.end_tokens


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
