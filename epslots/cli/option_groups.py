"""Options in groups: dataclasses with one option a field, for commands that would have many parameters."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, get_type_hints

from epslots.cli.options import CacheDirOption, DeviceOption, DtypeOption, ModelOption, SlotsOption

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def takes_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Give the command one parameter for each field of its dataclass parameters, for typer to read.

    A group's ``PANEL`` is the heading of its options in the help; an option's own heading goes before it.

    Example:
        @dataclass(frozen=True)
        class Shape:
            PANEL: ClassVar[str] = "Shape"
            ranks: Annotated[int, typer.Option(help="Ranks.")] = 8

        @takes_groups
        def show(file: Annotated[Path, typer.Argument()], shape: Shape) -> None: ...
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint) and isinstance(hint, type)}
    parameters: list[Parameter] = []
    for name, parameter in signature(command).parameters.items():
        if name not in groups:
            parameters.append(parameter.replace(kind=Parameter.KEYWORD_ONLY, annotation=hints[name]))
            continue
        kinds = get_type_hints(groups[name], include_extras=True)
        for field in fields(groups[name]):
            default = Parameter.empty if field.default is MISSING else field.default
            kind = _under(kinds[field.name], groups[name].PANEL)
            parameters.append(Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=kind))

    @wraps(command)
    def run(**given: Any) -> None:
        made = {name: group(**{one.name: given.pop(one.name) for one in fields(group)}) for name, group in groups.items()}
        command(**given, **made)

    run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _under(kind: Any, panel: str) -> Any:
    """An option's annotation, with its place in the help. The option itself may stand in other commands as well."""
    plain, option = kind.__origin__, copy(kind.__metadata__[0])
    option.rich_help_panel = option.rich_help_panel or panel
    return Annotated[plain, option]


@dataclass(frozen=True)
class LoadOptions:
    """The model of a command that loads one."""

    PANEL: ClassVar[str] = "The model"

    model: ModelOption = None
    slots: SlotsOption = "auto"
    device: DeviceOption = None
    dtype: DtypeOption = "auto"
    cache_dir: CacheDirOption = None

    @property
    def source(self) -> str | Path:
        """The checkpoint; the shipped model by default."""
        from epslots.example import example_model

        return example_model() if self.model is None else self.model

    def load(self) -> PreTrainedModel:
        """Load the model; the errors are those of ``epslots.load``."""
        import epslots

        return epslots.load(self.source, slots=self.slots, device=self.device, dtype=self.dtype, cache_dir=self.cache_dir)
