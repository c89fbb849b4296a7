"""Response templates, by which transformers finds tool calls and reasoning in a model's text.

A tokenizer's own comes first. For families whose tokenizers have none yet, those of ``response_templates.json``, which are
transformers' own (its module ``cli.serving.utils``, Apache License 2.0).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from epslots.errors import ConfigError
from epslots.given_files import read_given

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from transformers.utils.chat_parsing.response_templates import ResponseTemplate

logger = logging.getLogger("epslots.serve")
_FILE = Path(__file__).with_name("response_templates.json")
_MOST_BYTES = 1024**2


def response_template_of(
    tokenizer: PreTrainedTokenizerBase, model_type: str, given: Mapping[str, Any] | None = None
) -> ResponseTemplate | None:
    """The response template of a model; None if none is known.

    Args:
        tokenizer: the checkpoint's.
        model_type: the checkpoint's, as transformers calls it.
        given: in place of all others.

    Raises:
        ConfigError: the given one is none.
    """
    if given is not None:
        return check_response_template(given)
    own = getattr(tokenizer, "response_template", None)
    if isinstance(own, Mapping):
        try:
            return check_response_template(own)
        except ConfigError as error:
            logger.warning("the tokenizer's own response template is left out: %s", error)
    for family in msgspec.json.decode(_FILE.read_bytes()):
        if model_type in family["model_types"]:
            return check_response_template(family["response_template"])
    return None


def check_response_template(given: Mapping[str, Any]) -> ResponseTemplate:
    """A response template, read.

    Raises:
        ConfigError: it isn't one.
    """
    from transformers.utils.chat_parsing.response_templates import load_response_template

    try:
        return load_response_template(dict(given))
    except Exception as error:  # transformers checks by many kinds of errors
        raise ConfigError(f"a response template that isn't one: {type(error).__name__}: {str(error)[:300]}") from error


def read_response_template(file: str) -> dict[str, Any]:
    """A response template in a file of JSON.

    Raises:
        ConfigError: it can't be read, or isn't one.
    """
    try:
        found = msgspec.json.decode(read_given(file, _MOST_BYTES), type=dict[str, Any])
    except OSError as error:
        raise ConfigError(f"--response-template {file}: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise ConfigError(f"--response-template {file}: {error}") from error
    check_response_template(found)
    return found
