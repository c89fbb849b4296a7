"""The limits of a request: ids of the vocabulary, and a number of tokens.

The model's context and a rank's cache bound the tokens. Pure.

``RequestChecker`` and the service check prompts by them, and ``Batcher`` the requests that reach its rank. ``epslots
generate`` chooses the size of its cache by them.
"""

from __future__ import annotations

from collections.abc import Collection

import msgspec

from epslots.errors import ConfigError, shown


class ModelLimits(msgspec.Struct, frozen=True, kw_only=True):
    """The requests that a model and its cache can serve.

    Attributes:
        capacity: tokens that the cache can hold of one request.
        vocabulary: number of token ids.
        context: tokens of the model's context; None if the model states none.
        end_tokens: end tokens of the generation configuration.
    """

    capacity: int
    vocabulary: int
    context: int | None
    end_tokens: tuple[int, ...]

    @property
    def most_tokens(self) -> int:
        """The most tokens of a prompt and its new ones together."""
        most = tokens_that_fit(self.context, self.capacity)
        assert most is not None
        return most


def cached_tokens(prompt: int, new: int) -> int:
    """Tokens of a request that a cache has to hold: the last new one is returned, and never computed with."""
    return prompt + new - 1


def tokens_that_fit(context: int | None, capacity: int | None) -> int | None:
    """The most tokens of a prompt and its new ones together, by context and cache; None = either is unbounded."""
    limits = (context, None if capacity is None else capacity + 1)  # more than are cached, by ``cached_tokens``
    return min((limit for limit in limits if limit is not None), default=None)


def check_context(prompt: int, new: int, context: int | None, size: str) -> None:
    """Refuse a prompt that the model's context doesn't hold together with its new tokens.

    Args:
        context: in tokens; None if the model states none.
        size: the given numbers, in words.

    Raises:
        ConfigError: they exceed the context.
    """
    if context is not None and prompt + new > context:
        raise ConfigError(f"{size}, but the model's context holds {context}")


def foreign_token(tokens: Collection[int], vocabulary: int) -> str | None:
    """The first id outside of the vocabulary and what is allowed, as a message's end; None if all are inside."""
    if not tokens or (min(tokens) >= 0 and max(tokens) < vocabulary):
        return None
    wrong = next(token for token in tokens if not 0 <= token < vocabulary)
    return f"token {shown(wrong)}; allowed: 0 to {vocabulary - 1}"
