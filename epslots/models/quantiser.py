"""One quantiser for all formats, registered with transformers: it dequantises a checkpoint's dense part while it is loaded.

transformers has a quantiser for each method, which needs the method's own library, replaces modules, or loads experts wrongly
without a word. This one does one thing: it collects the tensors of each quantised matrix under the names of its format, and
gives the model the matrix's weights. ``expert_reader.py`` runs the same operation on the tensors of a single expert.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightRenaming, build_glob_alternation
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from epslots.formats.known_formats import FORMATS
from epslots.formats.matrix import Matrix, StoredParts
from epslots.formats.stored_format import Settings, StoredFormat

METHOD = "epslots"

_failure: ContextVar[str | None] = ContextVar("_failure", default=None)

Values = dict[str, list[torch.Tensor] | torch.Tensor]


def stated(settings: Settings) -> dict[str, Any]:
    """A ``quantization_config`` that lets transformers load by this quantiser; ``settings`` are the checkpoint's own."""
    return {"quant_method": METHOD, "stated": dict(settings), "dequantize": True}


@register_quantization_config(METHOD)
class StoredQuantisation(QuantizationConfigMixin):
    """The settings of a quantised checkpoint, as transformers carries them."""

    def __init__(self, stated: dict[str, Any], **_: Any) -> None:
        self.quant_method = METHOD
        self.stated = stated
        self.dequantize = True

    @property
    def format(self) -> StoredFormat:
        """The format that they name."""
        return FORMATS[self.stated["quant_method"]]


class Dequantise(ConversionOps):
    """The first operation of a conversion: the stored tensors of matrices in, their weights out.

    Attributes:
        format, settings: of the checkpoint.
    """

    def __init__(self, hf_quantizer: StoredQuantiser) -> None:
        self.hf_quantizer = hf_quantizer
        self.format = hf_quantizer.quantization_config.format
        self.settings: Settings = hf_quantizer.quantization_config.stated

    def convert(self, input_dict: Values, full_layer_name: str = "", model: PreTrainedModel | None = None, **_: Any) -> Values:
        """The weights under the patterns that the conversion had before it was told of quantised tensors.

        Args:
            input_dict: by source pattern, a tensor, or one for each expert.
            full_layer_name: the model's tensor that is made.
        """
        assert model is not None
        dtype = _dtype_of(model, full_layer_name)
        listed = {pattern: given if isinstance(given, list) else [given] for pattern, given in input_dict.items()}
        result: Values = {}
        for head, names in by_matrix(listed).items():
            where = module_path(full_layer_name, head)
            count = max(len(listed[pattern]) for pattern in names.values())
            try:
                weights = [
                    self._weights({name: listed[pattern][number] for name, pattern in names.items()}, where).to(dtype)
                    for number in range(count)
                ]
            except ValueError as error:
                _failure.set(f"{where}: {error}")
                raise
            if head:
                result[f"{head}.weight"] = weights
            else:
                result[full_layer_name] = weights[0]
        return result

    def matrix(self, parts: Mapping[str, torch.Tensor], where: str) -> Matrix:
        """The matrix of some tensors, by the ends of their names.

        Raises:
            ValueError: they don't fit together.
        """
        return self.format.read(StoredParts(parts, where), self.settings)

    def _weights(self, parts: dict[str, torch.Tensor], where: str) -> torch.Tensor:
        if not parts.keys() & set(self.format.scales):
            return parts["weight"]
        if not self.format.fused:
            return self.matrix(parts, where).weights()
        experts = len(next(iter(parts.values())))
        each = ({name: tensor[expert] for name, tensor in parts.items()} for expert in range(experts))
        return torch.stack([self.matrix(one, where).weights().t() for one in each])


@register_quantizer(METHOD)
class StoredQuantiser(HfQuantizer):
    """Dequantises while loading; modules stay as they are."""

    requires_calibration = True
    quantization_config: StoredQuantisation

    @property
    def serialized_names(self) -> dict[str, list[str]]:
        return {parameter: list(names) for parameter, names in self.quantization_config.format.names.items()}

    def get_load_operations(self) -> dict[str, type]:
        return {"dequantize": Dequantise}

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        own = [name for name, _ in model.named_parameters()]
        renamings = [
            WeightRenaming(source_patterns=but_for(pattern, own), target_patterns=replacement)
            for pattern, replacement in self.quantization_config.format.renames
        ]
        return renamings + list(super().update_weight_conversions(weight_conversions, model))

    @property
    def is_trainable(self) -> bool:
        return False

    def is_serializable(self, *_: Any) -> bool:
        return False


def take_failure() -> str | None:
    """Why this thread's last dequantisation failed, once: transformers' error only says that some conversion did."""
    failure = _failure.get()
    _failure.set(None)
    return failure


def but_for(pattern: str, names: Iterable[str]) -> str:
    """A pattern of names that leaves these names out. A name is left out by its module and tensor, as ``router.scale``."""
    ends = sorted({".".join(name.split(".")[-2:]) for name in names if re.search(pattern, name)})
    return rf"^(?!(?:.*\.)?(?:{'|'.join(map(re.escape, ends))})$){pattern.removeprefix('^')}" if ends else pattern


def by_matrix(patterns: Iterable[str]) -> dict[str, dict[str, str]]:
    """Source patterns by the module that they end in, and there by the end of their names."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for pattern in patterns:
        head, _, name = pattern.rpartition(".")
        found[head][name] = pattern
    return dict(found)


def module_path(target: str, head: str) -> str:
    """The path of a module of the checkpoint: of expert 0 where there are several.

    Args:
        target: the model's tensor that is made from it.
        head: what the conversion's pattern begins with; empty = the module is the target's own.
    """
    if not head:
        return target.rpartition(".")[0]
    return target.partition(head.partition(".*")[0])[0] + head.replace("*", "0")


def _dtype_of(model: PreTrainedModel, name: str) -> torch.dtype:
    """The dtype that transformers gives a tensor: its parameter's, or float32 where the class keeps it so."""
    path, _, attribute = name.rpartition(".")
    dtype: torch.dtype = getattr(model.get_submodule(path), attribute).dtype
    kept = model._get_dtype_plan(dtype)
    return torch.float32 if kept and build_glob_alternation([*kept])[0].search(name) else dtype
