"""Finding a process's transport: over a given process group, torch's default one, or one formed under ``torchrun``.

``load`` calls ``find_transport``.
"""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from epslots.errors import ConfigError, PeerLost
from epslots.transport import nccl
from epslots.transport.forming import form_group
from epslots.transport.torch_transport import TorchTransport
from epslots.transport.transport import Transport

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
FORM_DEADLINE_S = 1800.0
"""Seconds that ranks wait for each other to begin: one may download what the others have."""


def started_by_torchrun() -> bool:
    """Whether the environment names this process's rank among several."""
    return {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys() and int(os.environ.get("WORLD_SIZE", "1")) > 1


def local_number() -> int | None:
    """This process's number among those that ``torchrun`` started on the node; None if it started none."""
    return int(os.environ["LOCAL_RANK"]) if "LOCAL_RANK" in os.environ else None


def find_transport(group: dist.ProcessGroup | Transport | None, device: torch.device) -> Transport | None:
    """The transport to the other ranks; None if there are none.

    Args:
        group: a process group or a transport; None = torch's default group, or ``torchrun``'s ranks, if there are any. For a
            GPU its ranks form a further NCCL group.
        device: of the model.

    Raises:
        ConfigError: this process isn't in ``group``, or its backend isn't the device's.
        PeerLost: the ranks didn't find each other within ``FORM_DEADLINE_S``.
        RankUnusable: they did, but NCCL doesn't return from connecting them. The process must end.
    """
    if group is None:
        if not dist.is_available():
            return None
        if not dist.is_initialized():
            if not started_by_torchrun():
                return None
            _form_default_group(device)
            assert dist.group.WORLD is not None
            return TorchTransport(dist.group.WORLD, device=device)
        group = dist.group.WORLD
        assert group is not None
    if isinstance(group, dist.ProcessGroup):
        if group.size() == 1:
            return None
        if device.type == "cuda":
            group = nccl.own_group(group, device, FORM_DEADLINE_S)
        return TorchTransport(group, device=device)
    if not hasattr(group, "all_to_all"):  # torch gives processes outside of a group a number in its place
        raise ConfigError(f"group={group!r}: allowed: None, or a torch.distributed process group that this process is in")
    return group if group.size > 1 else None


def _form_default_group(device: torch.device) -> None:
    """Make ``torchrun``'s ranks torch's default group."""
    deadline = timedelta(seconds=FORM_DEADLINE_S)
    try:
        store, rank, size = next(rendezvous("env://", timeout=deadline))
    except (RuntimeError, ValueError) as error:
        raise PeerLost(f"the ranks of torchrun could not form a group: {error}") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    form_group(store, epoch=0, rank=rank, size=size, backend=BACKENDS[device.type], deadline_s=FORM_DEADLINE_S)
