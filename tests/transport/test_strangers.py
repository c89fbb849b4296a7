"""Strangers at the ports of gloo's ranks: garbage, silence, many connections, and a rank's greeting.

A process that speaks gloo's protocol to its end is in ``test_forming.py``: it doesn't know the secret.

Each test's last process is the stranger. It finds the ports that the ranks listen on, as any process of the network could.
"""

from __future__ import annotations

import os
import socket
import struct
from contextlib import suppress
from itertools import chain
from typing import Any

import psutil
import torch

from epslots.errors import PeerLost
from epslots.transport.forming import form_group
from epslots.transport.torch_transport import TorchTransport
from tests.support.rank_helpers import PATIENCE_S, Rank, run_ranks, until

SECRET = b"sixteen bytes...."
EPOCHS = 4
"""With a stranger; in the one after them there is none."""
SOON_S = 1.0
GLOO_HEAD = "<QIIQQQ"
"""Bytes, operation, slot, offset, length, remote offset."""
GREETINGS = [struct.pack("<q", number) for number in range(4)]
"""A connection begins with the number of the pair of ranks that it belongs to."""
GARBAGE = [
    b"",
    b"\0" * 3,
    b"\xff" * 300,
    b"GET / HTTP/1.1\r\n\r\n",
    os.urandom(100_000),
    *GREETINGS,
    *(greeting + os.urandom(500) for greeting in GREETINGS),
    *(greeting + struct.pack(GLOO_HEAD, 48, operation, 0, 0, 2**40, 0) for greeting in GREETINGS for operation in range(6)),
]


def say(rank: Rank, what: str) -> None:
    (rank.folder / what).write_text(str(os.getpid()))


def said(rank: Rank, *whats: str) -> bool:
    return all((rank.folder / what).exists() and (rank.folder / what).read_text() for what in whats)


def until_said(rank: Rank, *whats: str) -> None:
    until(lambda: said(rank, *whats))


def ports_of(rank: Rank, name: str) -> set[Any]:
    """The addresses that a rank's process listens on."""
    process = psutil.Process(int((rank.folder / name).read_text()))
    return {each.laddr for each in process.net_connections("inet") if each.status == psutil.CONN_LISTEN}


def ports_once_there(rank: Rank, name: str) -> set[Any]:
    """The same, when it listens."""
    until(lambda: said(rank, name) and ports_of(rank, name))
    return ports_of(rank, name)


def send_garbage(addresses: set[Any], kept: list[socket.socket], messages: list[bytes]) -> None:
    for address in addresses:
        for message in messages:
            one = socket.create_connection(tuple(address), timeout=PATIENCE_S)
            kept.append(one)
            one.setblocking(False)
            try:
                one.send(message)
            except OSError:  # it has been closed, as it should be
                continue


def form(rank: Rank, epoch: int, deadline_s: float = PATIENCE_S) -> TorchTransport:
    group = form_group(rank.store(), epoch=epoch, rank=rank.rank, size=2, backend="gloo", deadline_s=deadline_s, secret=SECRET)
    return TorchTransport(group, device=torch.device("cpu"), epoch=epoch, deadline_s=deadline_s)


def serves_on(rank: Rank, connections: int) -> int:
    """Two ranks go on with their exchanges until the stranger is done, and once more."""
    if rank.rank == 2:
        kept: list[socket.socket] = []
        until(lambda: said(rank, "formed 0", "formed 1"))
        for name in ("formed 0", "formed 1"):
            send_garbage(ports_of(rank, name), kept, GARBAGE + [b""] * connections)
        say(rank, "attacked")
        until(lambda: said(rank, "gone 0", "gone 1"))
        return len(kept)
    transport = form(rank, 0)
    say(rank, f"formed {rank.rank}")
    ended, exchanges = False, 0
    while not ended:
        mine = torch.tensor([int(said(rank, "attacked")), rank.rank])
        found = transport.all_gather(mine)
        assert found[:, 1].tolist() == [0, 1]
        ended, exchanges = bool(found[:, 0].all()), exchanges + 1
    transport.close()
    say(rank, f"gone {rank.rank}")
    return exchanges


def test_a_group_goes_on_whatever_strangers_send():
    """And with connections that they keep open and say nothing on."""
    *exchanges, connections = run_ranks(serves_on, 3, 200)
    assert min(exchanges) >= 1
    assert connections >= 2 * (200 + len(GARBAGE))


def attacks(rank: Rank) -> None:
    """The stranger's acts, before rank 1 comes in each epoch."""
    for epoch in range(EPOCHS):
        kept: list[socket.socket] = []
        addresses = ports_once_there(rank, f"forming {epoch}")
        with suppress(ConnectionRefusedError):  # rank 0 has given this epoch up
            send_garbage(addresses, kept, GARBAGE)
        say(rank, f"attacked {epoch}")
        until_said(rank, f"done {epoch} 0", f"done {epoch} 1")
        for one in kept:
            one.close()


def meets_strangers(rank: Rank) -> list[str]:
    """Rank 0 waits for rank 1 in each of some epochs, and the stranger comes first. The causes of the epochs that failed."""
    if rank.rank == 2:
        attacks(rank)
        return []
    causes = []
    for epoch in range(EPOCHS):
        if rank.rank == 0:
            say(rank, f"forming {epoch}")
        else:
            until_said(rank, f"attacked {epoch}")
        try:
            transport = form(rank, epoch, SOON_S)
            assert transport.all_gather(torch.tensor([100 + rank.rank])).tolist() == [[100], [101]]
            transport.close()
        except PeerLost as error:
            causes.append(str(error))
        say(rank, f"done {epoch} {rank.rank}")
        until_said(rank, f"done {epoch} 0", f"done {epoch} 1")
    transport = form(rank, EPOCHS)
    assert transport.all_gather(torch.tensor([100 + rank.rank])).tolist() == [[100], [101]]
    return causes


def test_a_strangers_connection_never_is_a_rank():
    """An epoch forms of the ranks alone, or fails in its time and says why. Without the stranger the next one forms."""
    for cause in chain.from_iterable(run_ranks(meets_strangers, 3)):
        assert any(words in cause for words in ("doesn't know the secret", "a peer is gone", "didn't form")), cause
