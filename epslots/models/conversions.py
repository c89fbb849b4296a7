"""transformers' conversions of a checkpoint: the model's tensor that each of its tensors becomes.

transformers' own loading, the reading of single experts (``expert_reader.py``) and the check before either
(``tensor_check.py``) follow the same rules, from here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)

from epslots.models.config_check import refusing
from epslots.models.experts_interface import rebuilt_conversions
from epslots.models.quantiser import Dequantise, StoredQuantisation, StoredQuantiser


@dataclass(frozen=True)
class MatchedKey:
    """One tensor of a checkpoint, and the model's tensors that it becomes.

    Attributes:
        key: its name in the checkpoint.
        renamed: that name after the model's renamings, in which converters' patterns are written.
        pattern: the converter's source pattern that it matches; the key itself without a converter.
        converter: makes the model's tensors from it and others; None where it is taken as it is.
        targets: names of these in the model; most converters make one.
    """

    key: str
    renamed: str
    pattern: str
    converter: WeightConverter | None
    targets: tuple[str, ...]


@dataclass
class TensorSource:
    """A tensor of the model, and the checkpoint's keys that it is made from.

    Attributes:
        target: the tensor's name in the model.
        converter: transformers' conversion; None = the checkpoint's tensor is taken as it is.
        keys: by the converter's source pattern, in expert order; a single key where the checkpoint is fused.
        renamed: the same keys after the model's renamings.
        part, parts: a converter may deal one list of experts out to several tensors, in equal runs (ernie4_5_vl_moe: first the
            text experts, then the vision experts); this one takes run ``part`` of ``parts``.
    """

    target: str
    converter: WeightConverter | None = None
    keys: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    renamed: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    part: int = 0
    parts: int = 1

    def take_part(self, found: MatchedKey, part: int) -> None:
        """Enter one more key, of which the tensor takes one of the converter's results."""
        self.add(found)
        self.converter, self.part, self.parts = found.converter, part, len(found.targets)

    def add(self, found: MatchedKey) -> None:
        """Enter one more key."""
        self.keys[found.pattern].append(found.key)
        self.renamed[found.pattern].append(found.renamed)


def conversions_of(skeleton: PreTrainedModel, *, rebuilt: bool = True) -> list[Any]:
    """The conversions of a checkpoint into a model.

    Args:
        skeleton: the model's structure; its configuration states the checkpoint's quantisation (``pretrained.read_config``).
        rebuilt: those of rebuilt experts too, which transformers itself doesn't load by (``experts_interface.py``).
    """
    quantisation = getattr(skeleton.config, "quantization_config", None)
    quantizer = None if quantisation is None else StoredQuantiser(StoredQuantisation(**quantisation))
    with refusing("config.json"):
        found = _of_rebuilt(skeleton, quantizer) if rebuilt else []
        return found + list(get_model_conversion_mapping(skeleton, None, quantizer))


def loaded_conversions(model: PreTrainedModel) -> list[Any]:
    """The conversions of a loaded model."""
    own = list(model._weight_conversions)
    operations = [operation for converter in own for operation in getattr(converter, "operations", ())]
    quantizers = (operation.hf_quantizer for operation in operations if isinstance(operation, Dequantise))
    return _of_rebuilt(model, next(quantizers, None)) + own


def _of_rebuilt(model: PreTrainedModel, quantizer: StoredQuantiser | None) -> list[Any]:
    found = rebuilt_conversions(model)
    if quantizer is None or not found:
        return list(found)
    return [c for c in quantizer.update_weight_conversions(found, model) if isinstance(c, WeightConverter)]


def match_keys(
    keys: Iterable[str], conversions: Sequence[Any], base_model_prefix: str, wanted: dict[str, Any]
) -> Iterator[MatchedKey]:
    """Every key of a checkpoint with the model's tensors that it becomes in transformers' loading.

    Args:
        keys: the checkpoint's.
        conversions: the model's.
        base_model_prefix: the model's; it is added or dropped where that leads to a wanted name.
        wanted: the model's tensors, by name.
    """
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    for key in sorted(keys, key=dot_natural_key):
        renamed = apply_renamings(key, renamings)
        target, pattern = rename_source_key(key, renamings, converters, base_model_prefix, wanted)
        if target not in wanted and key in wanted:
            target, pattern = rename_source_key(key, [], [], base_model_prefix, wanted)
        converter = by_pattern[pattern] if pattern else None
        fragments = converter.target_patterns if converter else [target]
        targets = tuple(target.replace(fragments[0], fragment) for fragment in fragments)
        yield MatchedKey(key, renamed, pattern or key, converter, targets)
