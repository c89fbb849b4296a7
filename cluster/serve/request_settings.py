"""From the fields of an API's request to settings of ``GenerationSettings``. Pure decisions."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.serve.errors import refused, too_long
from cluster.serve.schema import CommonRequest
from epslots.errors import shown
from epslots.generation.request_limits import ModelLimits

MOST_GRAMMAR_CHARS = 64 * 1024
API_NAMES = {
    "logit_bias": "logit_bias",
    "stop": "stop",
    "stop_tokens": "stop_token_ids",
    "min_tokens": "min_tokens",
    "n": "n",
}
"""The API's names of settings, by those that the cluster's messages begin with."""
GRAMMARS = ("json_schema", "regex", "grammar")
"""The settings that are a grammar."""

_TOKEN = re.compile(r"0|-?[1-9][0-9]{0,18}")


@dataclass(frozen=True)
class Room:
    """Tokens that a model has room for.

    Attributes:
        most: of a prompt and its new tokens together.
        limit: what limits it, for people.
    """

    most: int
    limit: str

    @classmethod
    def of(cls, limits: ModelLimits) -> Room:
        most = limits.most_tokens
        return cls(most, "the model's context" if most == limits.context else "a rank's cache")

    def new_tokens(self, prompt: int, wanted: int | None, *, name: str, clamp: bool, field: str) -> int:
        """New tokens that a prompt may have.

        Args:
            prompt: the prompt's tokens.
            wanted: as many as asked for; None = all that fit.
            name: the field that asks for them.
            clamp: whether fewer are all right.
            field: the field of the prompt.

        Raises:
            ApiError: they don't fit.
        """
        left = self.most - prompt
        if left < 1:
            raise too_long(
                f"{field}: {self.limit} holds {self.most:,} tokens, and the prompt has {prompt:,}; at least one is new", field
            )
        if wanted is None or (clamp and wanted > left):
            return left
        if wanted > left:
            raise too_long(
                f"{name}={wanted}: {self.limit} holds {self.most:,} tokens, and the prompt has {prompt:,}; allowed: up to "
                f"{left}",
                name,
            )
        return wanted


def common_settings(body: CommonRequest, end_tokens: frozenset[int], drawn_seed: int) -> dict[str, Any]:
    """The settings of ``GenerationSettings`` that both endpoints share.

    Args:
        body: the request.
        end_tokens: the model's.
        drawn_seed: for a request without a seed.

    Raises:
        ApiError: a field isn't allowed.
    """
    settings: dict[str, Any] = {
        "n": body.choices,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "top_k": max(0, body.top_k or 0),
        "min_p": body.min_p or 0.0,
        "seed": (drawn_seed if body.seed is None else body.seed) % 2**63,
        "stop": _stops(body.stop),
        "presence_penalty": body.presence_penalty or 0.0,
        "frequency_penalty": body.frequency_penalty or 0.0,
        "repetition_penalty": 1.0 if body.repetition_penalty is None else body.repetition_penalty,
        "min_tokens": body.min_tokens or 0,
        "ignore_eos": bool(body.ignore_eos),
        "priority": body.priority or 0,
    }
    if body.prompt_logprobs is not None:
        settings["prompt_logprobs"] = body.prompt_logprobs
    if body.logit_bias:
        settings["logit_bias"] = _biases(body.logit_bias)
    if body.stop_token_ids:
        ends = frozenset() if body.ignore_eos else end_tokens
        settings["stop_tokens"] = tuple(sorted(ends | set(body.stop_token_ids)))
    return settings | grammar_of(body)


def check_min_tokens(settings: Mapping[str, Any], most: int, name: str) -> None:
    """Refuse more new tokens at least than at most."""
    if settings["min_tokens"] > most:
        raise refused(f"min_tokens={settings['min_tokens']}; allowed: up to {name}, which is {most}", "min_tokens")


def _stops(given: str | list[str] | None) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given or ())


def _biases(given: Mapping[str, float]) -> dict[int, float]:
    # int() also takes " 5", "+5", "1_0" and "05": two names of one token, of which one would count.
    if not all(_TOKEN.fullmatch(token) for token in given):
        raise refused(f"logit_bias: its names must be token ids (given: {shown(sorted(given)[:3])})", "logit_bias")
    return {int(token): bias for token, bias in given.items()}


def api_names(body: CommonRequest) -> dict[str, str]:
    """``API_NAMES``, and those of a request's grammar: the field that holds it."""
    fields = list(_grammars(body)) or ["tools"]
    return API_NAMES | dict.fromkeys(GRAMMARS, fields[0])


def grammar_of(body: CommonRequest) -> dict[str, Any]:
    """The grammar that a request names, as a setting; empty without one.

    Raises:
        ApiError: it names several, or one that is too long.
    """
    wanted = _grammars(body)
    if len(wanted) > 1:
        raise refused(f"{' and '.join(wanted)}: a text has one grammar at most", next(iter(wanted)))
    for name, setting in wanted.items():
        if any(len(_text(value)) > MOST_GRAMMAR_CHARS for value in setting.values()):
            raise refused(f"{name}: allowed: up to {MOST_GRAMMAR_CHARS:,} characters", name)
        return setting
    return {}


def _grammars(body: CommonRequest) -> dict[str, dict[str, Any]]:
    """The settings of the grammars that a request names, by its fields."""
    wanted: dict[str, dict[str, Any]] = {}
    for name in ("guided_json", "guided_regex", "guided_choice", "guided_grammar"):
        if (value := getattr(body, name)) is not None:
            wanted[name] = _grammar(name.removeprefix("guided_"), value)
    if body.structured_outputs is not None:
        ((kind, value),) = body.structured_outputs.given.items()
        wanted["structured_outputs"] = _grammar(kind, value)
    if (form := getattr(body, "response_format", None)) is not None and form.type != "text":
        schema = True if form.json_schema is None or form.json_schema.schema_ is None else form.json_schema.schema_
        wanted["response_format"] = {"json_schema": schema}
    return {name: setting for name, setting in wanted.items() if setting}


def _grammar(kind: str, value: Any) -> dict[str, Any]:
    match kind:
        case "json":
            return {"json_schema": value}
        case "json_object":
            return {"json_schema": True} if value else {}
        case "choice":
            # One terminal: as a rule for each, a few hundred would be too many.
            choices = " | ".join(map(json.dumps, value))
            return {"grammar": f"start: CHOICE\nCHOICE: {choices}"}
        case _:
            return {kind: value}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
