"""What a loaded model does with predictions: which predictor it has, what it may fetch ahead, and whether it executes them."""

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
from epslots.prefetch.predictor_file import FILE_NAME, file_bytes, load_predictor, naive_bytes, naive_predictor
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
    """Give each layer a view to the next; returns what comes of it, and what the layers ask, if they ask anything.

    Args:
        folder: the checkpoint's; a predictor that lies there is used unless another is named.
        predictor: a file written by ``epslots predict fit``.

    Raises:
        ConfigError: the file isn't one, or for another checkpoint; or predictions are to be executed and there is none.
    """
    fetches = prefetch.on and any(runner.cache.fetches_meanwhile for runner in runners)
    path = Path(predictor) if predictor is not None else folder / FILE_NAME
    fitted = _read(model, path, named=True) if predictor is not None else None
    if not execute_predicted and not fetches:
        if prefetch.bytes_per_step is not None or predictor is not None:
            logger.warning(
                "nothing is fetched ahead on %s, where fetches take place at once, or with prefetch off", model.device
            )
        return PrefetchConfig(), None
    if predictor is None and path.is_file():
        fitted = _read(model, path, named=False)
    told = naive_predictor(model) if fitted is None else fitted
    blind = []
    for runner, following in pairwise(runners):
        if told.predicts(runner.index):
            runner.prefetch_by(
                Prefetcher(runner.index, following.prefetch_target, told, approximate=execute_predicted, fetches=fetches)
            )
        else:
            blind.append(following.index)
    if fetches and len(runners) > 1 and told.predicts(runners[-1].index):  # of the first layer, in the next step
        runners[-1].prefetch_by(Prefetcher(runners[-1].index, runners[0].prefetch_target, told))
    if execute_predicted and len(runners) == 1:
        logger.warning("execute_predicted does nothing: the model's only MoE layer has none before it that could tell of it")
    elif execute_predicted and len(blind) == len(runners) - 1:
        raise ConfigError("execute_predicted: nothing can be predicted of this model; fit a predictor: epslots predict fit")
    if blind:
        logger.info("nothing is predicted of MoE layers %s", blind)
    kind = "routers" if fitted is None else f"predictor {_digest(path)}"
    what = [word for word, does in (("executed", execute_predicted), ("fetched ahead", fetches)) if does]
    bound = "" if prefetch.bytes_per_step is None else f", up to {prefetch.bytes_per_step} bytes a step"
    return PrefetchConfig(f"{' and '.join(what)} by {kind}{bound}", prefetch.bytes_per_step), told


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
    """What the predictor that ``attach_prefetchers`` will find takes on the device, before anything is loaded.

    Args:
        skeleton: the model, on the meta device.
        content: ``Checkpoint.content``.
        dtype: the model's.
        fetches: whether anything is fetched ahead: prefetch is on, and a link carries it.
        folder, predictor, execute_predicted: as ``attach_prefetchers`` has them.

    Raises:
        ConfigError: ``predictor`` isn't one.
    """
    if not fetches and not execute_predicted:
        return 0
    if predictor is not None:
        return file_bytes(predictor, device, dtype)[0]
    if (folder / FILE_NAME).is_file():
        with suppress(ConfigError):  # is passed over, and that will be said
            nbytes, about = file_bytes(folder / FILE_NAME, device, dtype)
            if about.checkpoint == content:
                return nbytes
    return naive_bytes(skeleton, device, dtype)


def _read(model: PreTrainedModel, path: Path, *, named: bool) -> Predictor | None:
    """The predictor in a file; one that wasn't asked for by name and doesn't fit is passed over, and that is said."""
    try:
        return load_predictor(path, model)
    except ConfigError as error:
        if named:
            raise
        logger.warning("%s is not used: %s", path, error)
        return None


def _digest(path: Path) -> str:
    return xxhash.xxh3_64_hexdigest(path.read_bytes())
