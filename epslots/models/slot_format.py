"""Whether a quantised checkpoint's experts stay packed in slots: decided from headers, the device and the user's setting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from epslots.errors import ConfigError
from epslots.layout import LayerSpec
from epslots.models.checkpoint import Checkpoint
from epslots.models.expert_reader import pack_layers
from epslots.moe.packed_gemm import REFERENCE, without_kernel


@dataclass(frozen=True)
class SlotFormat:
    """What slots hold.

    Attributes:
        layers: the MoE layers with the layouts of their records, which are those of their slots.
        note: of a quantised checkpoint, how its experts are kept and why; else empty.
    """

    layers: tuple[LayerSpec, ...]
    note: str


def choose_slot_format(
    setting: str, checkpoint: Checkpoint, skeleton: PreTrainedModel, layers: Sequence[LayerSpec], device: str
) -> SlotFormat:
    """The layouts of a checkpoint's slots.

    Args:
        setting: ``LoadConfig.slot_format``.
        checkpoint, skeleton, layers: as for ``pack_layers``.
        device: kind of device that computes, ``"cpu"`` or ``"cuda"``.

    Raises:
        ConfigError: slots are to be packed, and nothing computes from them on this kind of device.
        CheckpointError: keys of some expert of a quantised checkpoint are missing, by name.
    """
    plain = tuple(layers)
    if getattr(skeleton.config, "quantization_config", None) is None:
        return SlotFormat(plain, "")
    packed = pack_layers(checkpoint, skeleton, layers)
    forms = {str(form): None for layer in packed if layer.packed for matrix in layer.packed.matrices for form in matrix.forms}
    if not forms:
        return SlotFormat(plain, "unpacked: the model's experts are made from the stored ones by more than joining rows")
    if setting == "unpacked":
        return SlotFormat(plain, "unpacked, as asked for")
    missing = without_kernel(packed, device)
    reason = f"no kernel computes from {', '.join(missing)} slots on {device}"
    if missing and setting == "auto":
        return SlotFormat(plain, f"unpacked: {reason}")
    if missing and device not in REFERENCE:
        raise ConfigError(f"slot_format={setting!r}: {reason}; allowed there: auto, unpacked")
    return SlotFormat(packed, f"packed as stored: {', '.join(forms)}")
