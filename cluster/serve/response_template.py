"""Response templates, by which transformers finds tool calls and reasoning in a model's text.

A tokenizer's own comes first. For families whose tokenizers have none yet, those of ``response_templates.json``, which are
transformers' own (its ``cli/serving/utils.py``, Apache License 2.0).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_parsing import ResponseParser

from epslots.errors import ConfigError
from epslots.given_files import read_given

_FILE = Path(__file__).with_name("response_templates.json")
_MOST_BYTES = 1024**2


def response_template_of(tokenizer: PreTrainedTokenizerBase, model_type: str) -> Mapping[str, Any] | None:
    """The response template of a model; None if none is known.

    Args:
        tokenizer: the checkpoint's.
        model_type: the checkpoint's, as transformers calls it.
    """
    own = getattr(tokenizer, "response_template", None)
    if isinstance(own, Mapping):
        return own
    for family in msgspec.json.decode(_FILE.read_bytes()):
        if model_type in family["model_types"]:
            found: dict[str, Any] = family["response_template"]
            return found
    return None


def read_response_template(file: str) -> dict[str, Any]:
    """A response template in a file of JSON.

    Raises:
        ConfigError: it can't be read, or isn't one.
    """
    try:
        found = msgspec.json.decode(read_given(file, _MOST_BYTES), type=dict[str, Any])
        ResponseParser(found, prefix="")
    except OSError as error:
        raise ConfigError(f"--response-template {file}: {error.strerror}") from error
    except Exception as error:  # transformers checks by many kinds of errors
        raise ConfigError(f"--response-template {file} is none: {type(error).__name__}: {str(error)[:300]}") from error
    return found
