"""Forming process groups: ranks find each other through a store, connect, and prove to each other that they belong.

A store on the network is open to every process that reaches it, and so are the ports that gloo listens on. With a secret that
all ranks were given on another way, a foreign process can neither find a group's entries nor put in entries that pass for a
rank's, and a connection that it opens in a rank's place is detected before anything is exchanged. Called by a rank's worker
(cluster) and by benchmarks, once per epoch.
"""

from __future__ import annotations

import hmac
import sys
from concurrent.futures import FIRST_COMPLETED, Future, wait
from datetime import timedelta
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from epslots.device_copy import to_device
from epslots.errors import PeerLost
from epslots.transport import background, nccl
from epslots.transport.torch_transport import GLOO, TorchTransport, cut

_SEAL_BYTES = 32


def form_group(
    store: Store,
    *,
    epoch: int,
    rank: int,
    size: int,
    backend: str,
    deadline_s: float,
    secret: bytes = b"",
    stop: Future[str] | None = None,
) -> dist.ProcessGroup:
    """Form the process group of an epoch, with all ranks that call this with the same one.

    The process leaves the group that it is in, in any state.

    Args:
        store: holds the ranks' addresses; shared by all epochs, each under its own prefix. NCCL uses it as long as the group
            lives.
        epoch: a new one for each attempt: entries of an earlier attempt in the store would mislead the next.
        rank, size: this rank, and the number of ranks.
        backend: "gloo", or "nccl" for the current CUDA device.
        deadline_s: seconds to wait for the other ranks.
        secret: known only to the group's ranks; empty where every process that reaches the store is trusted.
        stop: ends the attempt when it is done; its result is the reason.

    Raises:
        RankUnusable: NCCL doesn't return from connecting. The process must end.
        PeerLost: not all ranks came in time, or an entry of the store or a connection isn't a rank's. A further call with a
            later epoch is safe.
    """
    _leave_group()
    place, device = f"epslots/{epoch}", None
    if secret:
        place += f"/{seal(secret, 'place', epoch).hex()}"
    if backend == "nccl":
        nccl.set_environment()
        # One communicator, made now by all ranks: the first exchange may be one of some ranks only.
        device = torch.device("cuda", torch.cuda.current_device())
    else:
        store = _SealedStore(store, secret) if secret else store
        dist.Backend.register_backend(GLOO, partial(connect_gloo, stop, store), devices=["cpu"])
    hook, deadline = sys.excepthook, timedelta(seconds=deadline_s)
    init = partial(
        dist.init_process_group,
        GLOO if device is None else backend,
        store=PrefixStore(place, store),
        rank=rank,
        world_size=size,
        timeout=deadline if device is None else nccl.GROUP_TIMEOUT,
        device_id=device,
    )
    try:
        if device is None:
            init()
        else:
            meeting = PrefixStore(f"{place}/meeting", store)
            nccl.form_within(init, meeting, rank=rank, size=size, device=device, deadline_s=deadline_s, stop=stop)
    except (RuntimeError, ValueError, MemoryError) as error:  # the last two: an entry of the store isn't a rank's
        raise PeerLost(f"epoch {epoch} of {size} ranks didn't form within {deadline_s:g} s: {error}") from error
    finally:
        sys.excepthook = hook  # torch wraps it once more with each group
    group = dist.group.WORLD
    assert group is not None
    if secret and size > 1:
        transport = TorchTransport(group, device=device or torch.device("cpu"), epoch=epoch, deadline_s=deadline_s)
        _prove(transport, secret)
    return group


def _leave_group() -> None:
    """Leave this process's group, in any state."""
    group = dist.group.WORLD
    if group is not None:
        cut(group)  # destroying alone would wait for operations in progress
    if dist.is_initialized():
        dist.destroy_process_group()
    # Part of the rendezvous keys: a rank whose last attempt failed would otherwise look for the others under another number.
    dist.distributed_c10d._world.group_count = 0


def connect_gloo(
    stop: Future[str] | None, whole: Store, store: Store, rank: int, size: int, timeout: timedelta
) -> dist.distributed_c10d.ProcessGroupGloo:
    """Gloo's group, made in a thread: gloo itself waits five times its timeout for a rank that doesn't connect.

    Args:
        whole: the store that ``store`` is a part of, and doesn't keep alive.

    Raises:
        RuntimeError: not all connected in time, or ``stop`` is done. The thread ends later by itself.
    """
    made: Future[Any] = Future()

    def make() -> None:
        _ = whole  # alive as long as this thread
        try:
            made.set_result(dist.ProcessGroupGloo(store, rank, size, timeout))
        except BaseException as error:
            made.set_exception(error)

    background.start(make, name="epslots-connect")
    wait([made] if stop is None else [made, stop], timeout.total_seconds(), return_when=FIRST_COMPLETED)
    if made.done():
        return made.result()
    raise RuntimeError("not all ranks connected in time" if stop is None or not stop.done() else stop.result())


def _prove(transport: TorchTransport, secret: bytes) -> None:
    """Prove to every rank that this one knows the secret, and check its proof.

    Raises:
        PeerLost: a rank doesn't know the secret. Nothing else has been exchanged with it.
    """
    me, ones = transport.rank, [1] * transport.size
    seals = [seal(secret, "rank", transport.epoch, me, peer) for peer in range(transport.size)]
    mine = np.frombuffer(bytearray().join(seals), np.uint8).reshape(transport.size, _SEAL_BYTES)
    theirs = transport.to_host(transport.all_to_all(to_device(mine, transport.device), ones, ones, agreed=True))
    for peer in range(transport.size):
        if not hmac.compare_digest(theirs[peer].tobytes(), seal(secret, "rank", transport.epoch, peer, me)):
            cause = f"the process that answers as rank {peer} doesn't know the secret of epoch {transport.epoch}"
            transport.abort(cause)
            raise PeerLost(cause)


class _SealedStore(Store):
    """A store whose values carry a seal: values of other processes are refused before gloo reads them."""

    def __init__(self, store: Store, secret: bytes) -> None:
        super().__init__()
        self._store, self._secret = store, secret

    def set(self, key: str, value: Any) -> None:
        """Write a value with its seal."""
        value = value.encode() if isinstance(value, str) else bytes(value)
        self._store.set(key, seal(self._secret, "value", key, value) + value)

    def get(self, key: str) -> bytes:
        """A value, without its seal."""
        sealed = self._store.get(key)
        found, value = sealed[:_SEAL_BYTES], sealed[_SEAL_BYTES:]
        if not hmac.compare_digest(found, seal(self._secret, "value", key, value)):
            raise ValueError("the store has a value that none of the ranks has written")
        return value

    def wait(self, keys: list[str], *timeout: timedelta) -> None:
        """Wait until all keys are there."""
        self._store.wait(keys, *timeout)


def seal(secret: bytes, *parts: str | int | bytes) -> bytes:
    """A digest of the parts that takes the secret to compute (HMAC-SHA-256)."""
    return hmac.digest(secret, repr(parts).encode(), "sha256")
