"""Attaching prefetchers to a loaded model: which predictor it has, and whether predictions are fetched or executed.

``loading.py`` calls ``planned_bytes`` before it reads weights, and ``attach_prefetchers`` when the model is complete.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import torch
import xxhash
from transformers import PreTrainedModel

from epslots.errors import ConfigError
from epslots.moe.moe_layer import MoELayer
from epslots.moe.prefetcher import PrefetchConfig, Prefetcher
from epslots.prefetch.predictor import Predictor
from epslots.prefetch.predictor_file import (
    PREDICTOR_FILE_NAME,
    file_bytes,
    load_predictor,
    router_predictor,
    router_predictor_bytes,
)
from epslots.units import PrefetchSetting

logger = logging.getLogger(__name__)


def attach_prefetchers(
    model: PreTrainedModel,
    runners: Sequence[MoELayer],
    folder: Path,
    *,
    prefetch: PrefetchSetting,
    predictor: str | os.PathLike[str] | None,
    execute_predicted: bool,
) -> tuple[PrefetchConfig, Predictor | None]:
    """Give each layer a ``Prefetcher`` of the next; returns the resulting configuration, and the predictor if one is used.

    Args:
        folder: the checkpoint's; a predictor there is used unless another is named.
        predictor: a file written by ``epslots predict fit``.
        execute_predicted: whether layers execute predicted experts instead of those that their routers choose.

    Raises:
        ConfigError: the file isn't a predictor, or one of another checkpoint; or predictions are to be executed and no layer
            can be predicted.
    """
    fetches = prefetch.on and any(runner.cache.fetches_meanwhile for runner in runners)
    path = Path(predictor) if predictor is not None else folder / PREDICTOR_FILE_NAME
    fitted = _read(model, path, named=True) if predictor is not None else None
    if not execute_predicted and not fetches:
        if prefetch.bytes_per_step is not None or predictor is not None:
            logger.warning(
                "nothing is fetched ahead on %s, where fetches take place at once, or with prefetch off", model.device
            )
        return PrefetchConfig(), None
    if predictor is None and path.is_file():
        fitted = _read(model, path, named=False)
    used = router_predictor(model) if fitted is None else fitted
    unpredicted = []
    for runner, following in pairwise(runners):
        if used.predicts(runner.index):
            runner.prefetch_by(
                Prefetcher(runner.index, following.prefetch_target, used, approximate=execute_predicted, fetches=fetches)
            )
        else:
            unpredicted.append(following.index)
    if fetches and len(runners) > 1 and used.predicts(runners[-1].index):  # the first layer, in the next step
        runners[-1].prefetch_by(Prefetcher(runners[-1].index, runners[0].prefetch_target, used))
    if execute_predicted and len(runners) == 1:
        logger.warning("execute_predicted does nothing: the model has one MoE layer, and none before it to predict it from")
    elif execute_predicted and len(unpredicted) == len(runners) - 1:
        raise ConfigError("execute_predicted: no layer of this model can be predicted; fit a predictor: epslots predict fit")
    if unpredicted:
        logger.info("MoE layers %s aren't predicted", unpredicted)
    kind = "routers" if fitted is None else f"predictor {_digest(path)}"
    uses = [word for word, does in (("executed", execute_predicted), ("fetched ahead", fetches)) if does]
    bound = "" if prefetch.bytes_per_step is None else f", up to {prefetch.bytes_per_step} bytes a step"
    return PrefetchConfig(f"{' and '.join(uses)} by {kind}{bound}", prefetch.bytes_per_step), used


def planned_bytes(
    skeleton: PreTrainedModel,
    content: str,
    folder: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    fetches: bool,
    predictor: str | os.PathLike[str] | None,
    execute_predicted: bool,
) -> int:
    """Device bytes of the predictor that ``attach_prefetchers`` will use, before anything is loaded.

    Args:
        skeleton: the model, on the meta device.
        content: digest of the checkpoint's content, ``Checkpoint.content``.
        folder: the checkpoint's; a predictor there is used unless another is named.
        dtype: the model's.
        fetches: whether anything is fetched ahead: prefetch is on, and copies run beside computing.
        predictor: a file written by ``epslots predict fit``.
        execute_predicted: whether layers execute predicted experts.

    Raises:
        ConfigError: the file isn't a predictor.
    """
    if not fetches and not execute_predicted:
        return 0
    if predictor is not None:
        return file_bytes(predictor, device, dtype)[0]
    if (folder / PREDICTOR_FILE_NAME).is_file():
        with suppress(ConfigError):  # attach_prefetchers will skip it with a warning
            nbytes, about = file_bytes(folder / PREDICTOR_FILE_NAME, device, dtype)
            if about.checkpoint == content:
                return nbytes
    return router_predictor_bytes(skeleton, device, dtype)


def _read(model: PreTrainedModel, path: Path, *, named: bool) -> Predictor | None:
    """The predictor in a file. One that doesn't fit is skipped with a warning, unless the user named it."""
    try:
        return load_predictor(path, model)
    except ConfigError as error:
        if named:
            raise
        logger.warning("%s is not used: %s", path, error)
        return None


def _digest(path: Path) -> str:
    return xxhash.xxh3_64_hexdigest(path.read_bytes())
