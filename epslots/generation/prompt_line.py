"""A prompt as a JSON line, in the files of jobs and of ``epslots generate``.

{"prompt": "text"}
{"prompt": [5, 6, 7], "id": "a-1", "max_new_tokens": 64, "temperature": 0.7, "logit_bias": {"198": -100}}
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import UNSET, UnsetType

from epslots import json_lines
from epslots.generation.settings import GenerationSettings
from epslots.json_lines import Line

_EXAMPLE = '{"prompt": "text"}'


class _PromptFields(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The fields of a line that are no settings.

    Attributes:
        prompt: text or token ids.
        id: comes back with the result.
    """

    prompt: str | tuple[int, ...]
    id: str | int | None = None

    def request(self) -> dict[str, Any]:
        """The prompt and its settings, as a mapping for a cluster's ``generate``."""
        given = msgspec.structs.asdict(self)
        return {name: value for name, value in given.items() if value is not UNSET and name != "id"}


if TYPE_CHECKING:
    PromptLine = _PromptFields
else:
    PromptLine = msgspec.defstruct(
        "PromptLine",
        [(field.name, field.type | UnsetType, UNSET) for field in msgspec.structs.fields(GenerationSettings)],
        bases=(_PromptFields,),
        module=__name__,
        frozen=True,
        kw_only=True,
        forbid_unknown_fields=True,
    )
    """A line's object: the fields above, and each of ``GenerationSettings``, unset by default."""

_decoder = msgspec.json.Decoder(PromptLine)


def decode_prompt(line: Line) -> PromptLine:
    """The prompt of a line.

    Raises:
        ConfigError: the line holds no prompt; with what is allowed.
    """
    return json_lines.decode_line(line, _decoder, example=_EXAMPLE, needed={"prompt": "text or a list of token ids"})
