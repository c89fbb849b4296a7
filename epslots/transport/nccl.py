"""NCCL by torch: settings of its watchdog, and forming a group within a deadline.

torch's watchdog and monitor are made for programs that end when a rank is lost. Here the survivors go on in the same process,
and epslots' own deadlines and aborts notice a loss: so the watchdog may look, but not act.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from epslots.errors import PeerLost, RankUnusable
from epslots.transport import background

# Read by torch when a group is made, only from the environment.
ENVIRONMENT = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",  # a lost peer would end the process
    "TORCH_NCCL_ENABLE_MONITORING": "0",  # the monitor ends the process minutes after a dump was asked for, by any rank
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",  # the watchdog would wait for dumps while the next operation waits for the watchdog
    "TORCH_NCCL_PROPAGATE_ERROR": "0",
    "TORCH_NCCL_RETHROW_CUDA_ERRORS": "0",
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "1",
    "TORCH_FR_BUFFER_SIZE": "0",  # the flight recorder takes a stack trace with every operation
    "TORCH_NCCL_TRACE_BUFFER_SIZE": "0",  # its old name
}

# The groups' own timeout: never before a deadline of ours, which would have two actors notice a loss at once.
GROUP_TIMEOUT = timedelta(days=1)

# Ranks may take long to begin: one downloads what the others have. Those that have met connect within seconds, and NCCL waits
# for ever for one that has ended in between.
CONNECT_DEADLINE_S = 180.0


def set_environment() -> None:
    """Set torch's variables for NCCL groups that are made from now on."""
    os.environ.update(ENVIRONMENT)


def error_of(group: dist.ProcessGroup, device: torch.device) -> str:
    """An error that the watchdog has seen on a group's connections; empty if there is none. Nothing waits for it."""
    if device.type != "cuda":
        return ""
    try:
        found = group._get_backend(device).get_error()
    except RuntimeError as error:
        return f"NCCL reports {str(error).partition(chr(10))[0]}"
    return "" if found.name == "SUCCESS" else f"NCCL reports {found.name}"


def own_group(group: dist.ProcessGroup, device: torch.device, deadline_s: float) -> dist.ProcessGroup:
    """A further NCCL group of the same ranks, only for epslots. All of them call this together.

    The watchdog of the user's group reads the environment that it was made in, its timeouts are the user's, and aborting the
    default group would abort all of his.

    Raises:
        PeerLost, RankUnusable: as ``form_within``.
    """
    set_environment()
    ranks = dist.get_process_group_ranks(group)
    meeting = PrefixStore(f"epslots/{'-'.join(map(str, ranks))}/{next(_own_groups)}", _default_store())
    make = partial(
        dist.new_group,
        ranks,
        timeout=GROUP_TIMEOUT,
        backend="nccl",
        use_local_synchronization=True,
        group_desc="epslots",
        device_id=device,
    )
    rank, size = group.rank(), group.size()
    made = form_within(make, meeting, rank=rank, size=size, device=device, deadline_s=deadline_s, stop=None)
    assert isinstance(made, dist.ProcessGroup)
    return made


_own_groups = itertools.count()  # the same on all ranks, which make their groups together


def _default_store() -> Store:
    """The store of torch's default group."""
    found: Store = dist.distributed_c10d._get_default_store()
    return found


def form_within(
    init: Callable[[], object],
    store: Store,
    *,
    rank: int,
    size: int,
    device: torch.device,
    deadline_s: float,
    stop: Future[str] | None,
) -> Any:
    """Form a group by ``init``, which has no deadline of its own once ranks connect.

    First the ranks meet in the store: one that is missing is noticed there. Then ``init`` runs in a thread. If that doesn't
    return, nothing can end it, and it may still succeed at any time.

    Args:
        store: this epoch's.
        deadline_s: seconds to meet; connecting has as many again, and no more than ``CONNECT_DEADLINE_S``.
        stop: ends the attempt when it is done; its result is the reason.

    Returns:
        The result of ``init``.

    Raises:
        PeerLost: not all ranks met. A further attempt is safe.
        RankUnusable: ``init`` doesn't return. The process must end.
    """
    _meet(store, rank, size, deadline_s, stop)
    made: Future[Any] = Future()

    def make() -> None:
        torch.cuda.set_device(device)  # a thread's setting
        try:
            made.set_result(init())
        except BaseException as error:
            made.set_exception(error)

    background.start(make, name="epslots-nccl")
    connect_s = min(deadline_s, CONNECT_DEADLINE_S)
    wait([made] if stop is None else [made, stop], connect_s, return_when=FIRST_COMPLETED)
    if not made.done():
        in_time = f"within {connect_s:g} s after they met"
        why = in_time if stop is None or not stop.done() else f"before the attempt was ended: {stop.result()}"
        raise RankUnusable(f"NCCL did not connect {size} ranks {why}. Its call can't be ended, so this process must be")
    return made.result()


def _meet(store: Store, rank: int, size: int, deadline_s: float, stop: Future[str] | None) -> None:
    keys = [f"here/{number}" for number in range(size)]
    store.set(keys[rank], "here")
    try:
        store.wait(keys, timedelta(seconds=deadline_s))
    except RuntimeError as error:
        missing = [number for number, key in enumerate(keys) if not _is_there(store, key)]
        raise PeerLost(f"ranks {missing} of {size} didn't come within {deadline_s:g} s") from error
    if stop is not None and stop.done():
        raise PeerLost(stop.result())


def _is_there(store: Store, key: str) -> bool:
    with suppress(RuntimeError):
        return bool(store.check([key]))
    return False
