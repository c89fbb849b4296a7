"""The ranks that make a layer's step together: ``LockStep`` (transport/lockstep.py) with others, ``Alone`` without.

``MoELayer`` knows no other difference between one rank and many.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch

from epslots.device_copy import to_host
from epslots.transport.lockstep import IDLE_LINK, Gathered, LinkState
from epslots.transport.transport import Transport


class Peers(Protocol):
    """A layer's way to all ranks of its step.

    Attributes:
        alone: whether there is one rank, and no step to keep. A layer without tokens then has nothing to do.
    """

    alone: bool

    @property
    def transport(self) -> Transport | None:
        """To the other ranks; None if there are none."""
        ...

    @property
    def agreed(self) -> bool:
        """Whether sizes that ranks derive from the same plan go unchecked."""
        ...

    def arrive(self, layer: int) -> None:
        """The model has reached a layer: called before anything is computed there."""
        ...

    def take_part(self, layer: int) -> None:
        """The layer begins to deal with all ranks."""
        ...

    def note(self, *, exchanging: bool, computing: bool = False) -> None:
        """Note this rank's place in a layer: others may wait for it if it fails there.

        Args:
            exchanging: between the layer's first exchange and its last.
            computing: computing in between.
        """
        ...

    def gather_counts(
        self,
        layer: int,
        counts: torch.Tensor,
        top_k: int,
        guard: int,
        predicted: torch.Tensor | None = None,
        *,
        link: LinkState = IDLE_LINK,
        parts: int = 1,
    ) -> Gathered:
        """All ranks' counts on the host: the one host synchronisation of a step that may miss.

        Args:
            counts: int64 [E + 1] on the device, this rank's.
            top_k: K, or 0 without tokens.
            guard: a digest of the inputs of the layer's plan, the same on all ranks.
            predicted: int32 on the device, 0 to 255, how likely each expert of the next layer is used.
            link: of this rank.
            parts: in how many this rank has to divide the step; all make as many as the one that needs the most.
        """
        ...


class Alone:
    """The peers of a rank on its own. Threads may share one: it keeps nothing of a step.

    Args:
        begin_step: called when the model reaches its first layer.
    """

    alone = True
    agreed = True
    transport: Transport | None = None

    def __init__(self, begin_step: Callable[[], object] = lambda: None) -> None:
        self._begin_step = begin_step

    def arrive(self, layer: int) -> None:
        if layer == 0:
            self._begin_step()

    def take_part(self, layer: int) -> None:
        pass

    def note(self, *, exchanging: bool, computing: bool = False) -> None:
        pass

    def gather_counts(
        self,
        layer: int,
        counts: torch.Tensor,
        top_k: int,
        guard: int,
        predicted: torch.Tensor | None = None,
        *,
        link: LinkState = IDLE_LINK,
        parts: int = 1,
    ) -> Gathered:
        if predicted is None:
            counts_host, predicted_R = counts.cpu().numpy(), _NO_PREDICTION
        elif counts.device.type == "cpu":
            counts_host, predicted_R = counts.numpy(), predicted.numpy()[None]
        else:
            both = torch.cat([counts, predicted.to(counts.dtype)]).cpu().numpy()  # by one copy
            counts_host, predicted_R = both[: len(counts)], both[None, len(counts) :]
        return Gathered(counts_host[None], top_k, _BUSY[link.busy], np.array([link.unbegun]), predicted_R)


def gather_alone(usage: torch.Tensor, *, busy: bool) -> Gathered:
    """The ``Gathered`` of a layer without counts: its own prediction, on the way to the host. Nothing waits.

    Args:
        usage: int32 on the device, 0 to 255, how likely each expert of the next layer is used.
        busy: whether this rank's link has something to do.
    """
    usage, arrived = to_host(usage)
    return Gathered(_NO_COUNTS, 0, _BUSY[busy], _NONE_UNBEGUN, usage.numpy()[None], arrived=arrived)


_NO_COUNTS = np.zeros((1, 0), np.int64)
_NO_PREDICTION = np.zeros((1, 0), np.uint8)
_NONE_UNBEGUN = np.zeros(1, np.int64)
_BUSY = np.array([False]), np.array([True])  # of a link that is idle, and of one that is busy
NOTHING_GATHERED = Gathered(_NO_COUNTS, 0, _BUSY[False], _NONE_UNBEGUN, _NO_PREDICTION)
"""The ``Gathered`` of a layer without counts that predicts nothing."""
