"""``GenerationSettings``: how a prompt is continued. Declared, explained and checked here, once.

Python's keywords (``Cluster.generate``), a job's lines (``prompt_line.py``) and the command line's options
(``cli/text_options.py``) are made of its fields. The service has OpenAI's fields, which its ``request_settings.py`` turns into
these. ``request_checker.py`` makes requests of a prompt and its settings.

To add a setting, touch two files: this one, and the module that uses it. For the service, also touch its ``schema.py`` and
``request_settings.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import msgspec

from epslots.errors import ConfigError, shown
from epslots.generation.requests import MOST_LOGPROBS, Grammar, GrammarKind
from epslots.generation.sampling import Sampling
from epslots.generation.text import stop_strings

MOST_CHOICES = 128
MOST_STOP_TOKENS = 1024
_ALL_TOKENS = 2**31  # more than any vocabulary has, and still a number that messages carry
_MOST_INT = 2**63 - 1  # that messages carry
_GRAMMARS: dict[str, GrammarKind] = {"json_schema": "json_schema", "regex": "regex", "grammar": "lark"}
"""Settings that hold the text to a grammar, with its notation."""

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text; or token ids; or a mapping with one of these as "prompt", and settings of its own."""


class GenerationSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """How a prompt is continued. ``epslots.generation.sampling.Sampling`` says exactly what the sampling's numbers do.

    Attributes:
        max_new_tokens: stop after this many new tokens.
        min_tokens: the text doesn't end, by end tokens or stop strings, before this many new tokens.
        n: continue the prompt this many times, up to 128. Choice 0 has the seed itself, the others have seeds derived from it.
        stop: strings that end the text, and aren't part of it; up to 64.
        stop_tokens: token ids that end the text, up to 1,024, in place of the end tokens: those of the checkpoint's generation
            configuration, and the tokenizer's.
        ignore_eos: end tokens don't end the text; ``stop``, ``stop_tokens`` and ``max_new_tokens`` still do.
        ignore_tokenizer_eos: the tokenizer's end token doesn't end the text, as in transformers' ``generate``.
        priority: of the requests that wait, those with the lowest number are served first, equal ones in the order of arrival.
            A running request isn't stopped for another one; but where the cache is full, the highest number gives up its place
            first. A request waits for as long as there are lower numbers.
        chat: wrap text in the checkpoint's chat template; on the command line by default if it has one (in Python: ``None``).
        temperature: 0 takes the likeliest token; a higher value samples more evenly.
        top_k: sample from this many likeliest tokens; 0 = all.
        top_p: sample from the likeliest tokens with this probability mass together.
        min_p: sample from the tokens at least this share as likely as the likeliest.
        seed: the seed of the random numbers. They depend only on the seed and the token's position.
        presence_penalty: lowers the logits of tokens that the new text has.
        frequency_penalty: lowers the logits of tokens for each time that the new text has them.
        repetition_penalty: lowers the logits of tokens in prompt and new text; 1 = doesn't.
        logit_bias: number that is added to a token's logit, by token; up to 1,024 tokens.
        json_schema: the text is JSON by this schema, an object or its text; "true" = any JSON object.
        regex: the text matches this regular expression as a whole.
        grammar: the text belongs to this grammar, in the notation of Lark.
        logprobs: return the log-probability of each new token, and of this many likeliest ones (up to 20).
        prompt_logprobs: the same for the prompt's tokens, but for the first; once, with choice 0.
    """

    max_new_tokens: int = 128
    min_tokens: int = 0
    n: int = 1
    stop: str | tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] | None = None
    ignore_eos: bool = False
    ignore_tokenizer_eos: bool = False
    priority: int = 0
    chat: bool | None = False
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    json_schema: str | bool | dict[str, Any] | None = None
    regex: str | None = None
    grammar: str | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else self.stop

    @property
    def sampling(self) -> Sampling:
        """How the tokens of choice 0 are chosen.

        Raises:
            ConfigError: a number is not one of those allowed.
        """
        return Sampling(
            temperature=self.temperature,
            top_k=min(self.top_k, _ALL_TOKENS),
            top_p=self.top_p,
            seed=self.seed,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=tuple(sorted((self.logit_bias or {}).items())),
            min_tokens=self.min_tokens,
        )

    @property
    def text_grammar(self) -> Grammar | None:
        """The grammar that the text is held to.

        Raises:
            ConfigError: there are several, or one is empty or not JSON where it must be.
        """
        given = [name for name in _GRAMMARS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)}: a text has one grammar at most; give one of {', '.join(_GRAMMARS)}")
        if not given:
            return None
        if self.json_schema is not None:
            return _json_grammar(self.json_schema)
        return _plain_grammar(given[0], getattr(self, given[0]))

    def keywords(self) -> dict[str, Any]:
        """The fields as keywords of ``Cluster.generate``."""
        return msgspec.structs.asdict(self)


def read_settings(given: Mapping[str, Any], defaults: GenerationSettings | None = None) -> GenerationSettings:
    """Settings from names and values; unnamed ones are those of ``defaults``.

    Raises:
        ConfigError: a name is unknown, or a value isn't allowed.
    """
    names = GenerationSettings.__struct_fields__
    if unknown := sorted(set(given) - set(names), key=str):
        raise ConfigError(f"{', '.join(map(shown, unknown[:3]))}: no such setting; allowed: {', '.join(names)}")
    base = {} if defaults is None else defaults.keywords()
    try:  # a mapping read from JSON has text where logit_bias has tokens
        settings = msgspec.convert({**base, **given}, GenerationSettings, str_keys=True)
    except msgspec.ValidationError as error:
        raise ConfigError(f"settings {shown(dict(given))}: {error}") from error
    _check(settings)
    return settings


def with_own_settings(prompt: Prompt, settings: GenerationSettings) -> tuple[str | Sequence[int], GenerationSettings]:
    """A prompt without the settings that it may bring, and all of its settings.

    Args:
        settings: where the prompt has none of its own.

    Raises:
        ConfigError: the prompt is a mapping without "prompt", or with a wrong setting.
    """
    if not isinstance(prompt, Mapping):
        return prompt, settings
    own = dict(prompt)
    if "prompt" not in own:
        raise ConfigError(f'a prompt with settings needs "prompt", but has only {shown(sorted(own, key=str))}')
    bare = own.pop("prompt")
    return bare, read_settings(own, settings) if own else settings


def _check(settings: GenerationSettings) -> None:
    _check_int("max_new_tokens", settings.max_new_tokens, 1, _MOST_INT, "2**63 - 1")
    if not -_MOST_INT <= settings.priority <= _MOST_INT:
        raise ConfigError(f"priority={shown(settings.priority)}; allowed: -(2**63 - 1) to 2**63 - 1")
    _check_int("n", settings.n, 1, MOST_CHOICES)
    for name in ("logprobs", "prompt_logprobs"):
        if getattr(settings, name) is not None:
            _check_int(name, getattr(settings, name), 0, MOST_LOGPROBS)
    if len(settings.stop_tokens or ()) > MOST_STOP_TOKENS:
        raise ConfigError(f"stop_tokens has {len(settings.stop_tokens or ()):,}; allowed: at most {MOST_STOP_TOKENS:,}")
    stop_strings(settings.stops)
    _ = settings.sampling  # checks its own values
    if settings.min_tokens > settings.max_new_tokens:
        raise ConfigError(
            f"min_tokens={shown(settings.min_tokens)}; allowed: up to max_new_tokens, which is {settings.max_new_tokens}"
        )
    if (grammar := settings.text_grammar) is not None:
        _check_grammar(grammar)


def _check_int(name: str, given: int, least: int, most: int, words: str = "") -> None:
    if not least <= given <= most:
        raise ConfigError(f"{name}={shown(given)}; allowed: at least {least}, up to {words or most}")


def _json_grammar(given: str | bool | dict[str, Any]) -> Grammar:
    """The grammar of a JSON schema, which is an object, its text, or True."""
    wrong = f"json_schema={shown(given)}; allowed: a JSON schema, as an object or its text; or True for any JSON object"
    try:
        schema = msgspec.json.decode(given) if isinstance(given, str) else given
        text = given if isinstance(given, str) else msgspec.json.encode(given).decode()
    except (msgspec.DecodeError, TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{wrong} ({type(error).__name__}: {str(error)[:200]})") from error
    if schema is True:
        return Grammar("json_object", "")
    if not isinstance(schema, dict):
        raise ConfigError(wrong)
    return Grammar("json_schema", text)


def _plain_grammar(name: str, text: str) -> Grammar:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{name}={shown(text)}: character {error.start} is half of a pair, which no text has") from error
    if not text:
        raise ConfigError(f"{name}={text!r}; allowed: at least one character")
    return Grammar(_GRAMMARS[name], text)


@lru_cache(maxsize=64)
def _check_grammar(grammar: Grammar) -> None:
    """Refuse a grammar that can't be followed; once, though all lines of a job may have it."""
    from epslots.generation.grammar import check_grammar  # with a library that takes its time to import

    check_grammar(grammar.kind, grammar.text)
