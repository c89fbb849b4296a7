"""Whether a quantised checkpoint's experts stay packed in slots: decided from headers, the device and the user's setting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from transformers import PreTrainedModel

from epslots.config import LoadConfig
from epslots.errors import ConfigError
from epslots.formats.quantise import quantised_form
from epslots.formats.usual_forms import USUAL_FORMS
from epslots.layout import LayerSpec
from epslots.models.checkpoint import Checkpoint
from epslots.models.expert_reader import form_layers, pack_layers
from epslots.moe.packed_gemm import REFERENCE, without_kernel


@dataclass(frozen=True)
class SlotFormat:
    """The content of slots.

    Attributes:
        layers: the MoE layers with the layouts of their records, which are those of their slots.
        note: of a quantised checkpoint, how its experts are kept and why; else empty.
    """

    layers: tuple[LayerSpec, ...]
    note: str


def choose_slot_format(
    config: LoadConfig, checkpoint: Checkpoint, skeleton: PreTrainedModel, layers: Sequence[LayerSpec], device: str
) -> SlotFormat:
    """The layouts of a checkpoint's slots.

    Args:
        config: its ``slot_format`` and ``expert_format``.
        checkpoint: the open checkpoint.
        skeleton: the model's structure, on the meta device.
        layers: the MoE layers, from the skeleton.
        device: kind of device that computes, ``"cpu"`` or ``"cuda"``.

    Raises:
        ConfigError: slots are to be packed, and nothing computes from them on this kind of device; or experts are to be
            quantised that are quantised already.
        CheckpointError: keys of some expert of a quantised checkpoint are missing, by name.
    """
    plain = tuple(layers)
    if config.expert_format is not None:
        if getattr(skeleton.config, "quantization_config", None) is not None:
            raise ConfigError(
                f"expert_format={config.expert_format!r}: {checkpoint.name} is quantised already; allowed for it: None"
            )
        slots = quantised_slots(config.expert_format, skeleton, layers)
        if device not in REFERENCE and (missing := without_kernel(slots.layers, device)):
            raise ConfigError(f"expert_format={config.expert_format!r}: {_no_kernel(missing, device)}; allowed there: None")
        return slots
    packed = pack_layers(checkpoint, skeleton, layers)
    forms = _forms(packed)
    if not forms:
        quantised = getattr(skeleton.config, "quantization_config", None) is not None
        return SlotFormat(plain, "unpacked: experts are made from the stored ones by more than joining rows" * quantised)
    if config.slot_format == "unpacked":
        return SlotFormat(plain, "unpacked, as asked for")
    missing = without_kernel(packed, device)
    if missing and config.slot_format == "auto":
        otherwise = "; slot_format packed unpacks them at each use" if device in REFERENCE else ""
        return SlotFormat(plain, f"unpacked: {_no_kernel(missing, device)}{otherwise}")
    if missing and device not in REFERENCE:
        raise ConfigError(f"slot_format='packed': {_no_kernel(missing, device)}; allowed there: auto, unpacked")
    return SlotFormat(packed, f"packed as stored: {forms}")


def quantised_slots(expert_format: str, skeleton: PreTrainedModel, layers: Sequence[LayerSpec]) -> SlotFormat:
    """Slots of experts that are quantised while the store is built."""
    packed = form_layers(skeleton, layers, partial(quantised_form, expert_format))
    return SlotFormat(packed, f"quantised while loading, which changes outputs: {_forms(packed)}")


def stored_slots(stored_format: str, skeleton: PreTrainedModel, layers: Sequence[LayerSpec]) -> SlotFormat:
    """Slots of a checkpoint that isn't here, as one of a format mostly is.

    Raises:
        ConfigError: no such format.
    """
    if stored_format not in USUAL_FORMS:
        raise ConfigError(f"stored_format={stored_format!r}: allowed: {', '.join(USUAL_FORMS)}")
    packed = form_layers(skeleton, layers, USUAL_FORMS[stored_format])
    return SlotFormat(packed, f"packed as {stored_format} checkpoints mostly are: {_forms(packed)}")


def _forms(layers: Sequence[LayerSpec]) -> str:
    """The forms of packed layers in words; empty if none is packed."""
    packed = (layer.packed for layer in layers if layer.packed is not None)
    return ", ".join(dict.fromkeys(str(form) for each in packed for matrix in each.matrices for form in matrix.forms))


def _no_kernel(kinds: Sequence[str], device: str) -> str:
    return f"no kernel computes from {', '.join(kinds)} slots on {device}"
