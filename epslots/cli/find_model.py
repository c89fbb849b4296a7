"""The model that ``epslots plan`` is about: a checkpoint's folder or a known name, without its weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from epslots.config import LoadConfig
from epslots.errors import ConfigError
from epslots.models.known_shapes import KNOWN_SHAPES, known_model
from epslots.models.model_shape import ModelShape
from epslots.private_files import default_cache_dir


@dataclass(frozen=True)
class FoundModel:
    """A model's contributions to its plan.

    Attributes:
        checkpoint_bytes: of its weight files; None for a known model.
        predictor_bytes: of its predictor.
        read_speed: bytes a second that its host store is read with; None while there is none.
    """

    shape: ModelShape
    checkpoint_bytes: int | None = None
    predictor_bytes: int = 0
    read_speed: float | None = None


def find_model(model: str | None, device: str, config: LoadConfig, stored_format: str | None = None) -> FoundModel:
    """A model by its name or folder, without its weights.

    If ``model`` is both, the folder is taken and not the known model.

    Args:
        device: ``"cuda"`` or ``"cpu"``, on which the model is to run.
        config: dtype, attention, cache, formats of slots and experts, and the host's memory.
        stored_format: of a known model, the format of its checkpoint (``formats/usual_forms.py``); None = unquantised.

    Raises:
        ConfigError: neither a folder nor a known name, no such dtype, attention or format, or formats that the device can't
            compute with.
        CheckpointError: the folder's files are missing, cut short, or their headers contradict each other.
        UnsupportedModelError: the model's experts can't be run from slots, or its requests can't be kept so.
    """
    if model is not None and not Path(model).is_dir():
        # Without a fitted predictor, the next layer's router predicts; on a GPU it is the model's own, so it takes no memory.
        return FoundModel(_known_shape(model, config, stored_format))
    if stored_format is not None:
        raise ConfigError(f"stored_format={stored_format!r}: a folder's own headers say how it is stored; leave it out")
    import torch

    from epslots.cache.node_store import store_path
    from epslots.cache.record_reader import measure_read_speed
    from epslots.example import example_model
    from epslots.load_plan import measure, store_manifest
    from epslots.models.opening import open_model
    from epslots.models.slot_format import choose_slot_format
    from epslots.prefetch.setup import planned_bytes

    # Opening a safetensors file checks that its header accounts for every byte of it. No tensor is read.
    opened = open_model(example_model() if model is None else model, config.dtype, config.attn_implementation)
    checkpoint, skeleton = opened.checkpoint, opened.skeleton
    weight_bytes = sum((checkpoint.folder / name).stat().st_size for name in checkpoint.files.names)
    slots = choose_slot_format(config, checkpoint, skeleton, opened.layers, device)
    opened = replace(opened, layers=slots.layers)
    predictor_bytes = planned_bytes(
        skeleton,
        checkpoint.content,
        checkpoint.folder,
        device=torch.device(device),
        dtype=opened.dtype,
        fetches=config.has_link(device),
        predictor=None,
        execute_predicted=False,
    )
    read_speed = None
    if config.host_memory is not None:
        read_speed = measure_read_speed(store_path(store_manifest(opened, config.expert_format), default_cache_dir()))
    shape = measure(opened, engine=config.engine, batch_invariant=False, slot_note=slots.note)
    return FoundModel(shape, weight_bytes, predictor_bytes, read_speed)


def _known_shape(model: str, config: LoadConfig, stored_format: str | None) -> ModelShape:
    if model not in KNOWN_SHAPES:
        raise ConfigError(
            f"model={model!r} is neither a checkpoint folder nor a known model ({', '.join(KNOWN_SHAPES)}). A model "
            f"of the hub is planned once it is downloaded"
        )
    dtype = {} if config.dtype == "auto" else {"dtype": config.dtype}
    shape, skeleton = known_model(model, **dtype, attention=config.attn_implementation)
    # Torch's imports take seconds; other commands do without them.
    from epslots.generation.planned_cache import with_cache
    from epslots.models.slot_format import quantised_slots, stored_slots

    if config.expert_format is not None and stored_format is not None:
        raise ConfigError(f"stored_format={stored_format!r} is quantised already: allowed with expert_format: None")
    slots = None
    if config.expert_format is not None:
        slots = quantised_slots(config.expert_format, skeleton, shape.layers)
    elif stored_format is not None:
        slots = stored_slots(stored_format, skeleton, shape.layers)
    if slots is not None:
        shape = msgspec.structs.replace(shape, layers=slots.layers, slot_note=slots.note)
    return with_cache(shape, skeleton, config.engine)
