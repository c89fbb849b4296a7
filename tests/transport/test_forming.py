"""The forming of groups in hostile company: foreign values in the store, foreign connections, ranks that never connect."""

from __future__ import annotations

import socket
import threading
from concurrent.futures import Future
from typing import Any

import pytest
import torch
import torch.distributed as dist

from epslots.errors import PeerLost
from epslots.transport.forming import _prove, form_group
from epslots.transport.torch_transport import TorchTransport
from tests.support.rank_helpers import Rank, run_ranks

SECRET = b"sixteen bytes...."
FAR_S = 60.0


def form(rank: Rank, epoch: int, secret: bytes = SECRET, deadline_s: float = FAR_S) -> TorchTransport:
    group = form_group(
        rank.store(),
        epoch=epoch,
        rank=rank.rank,
        size=rank.size,
        backend="gloo",
        deadline_s=deadline_s,
        secret=secret,
    )
    return TorchTransport(group, device=torch.device("cpu"), epoch=epoch, deadline_s=deadline_s)


def forms_twice(rank: Rank) -> int:
    total = 0
    for epoch in range(2):
        transport = form(rank, epoch)
        total += int(transport.all_gather(torch.tensor([rank.rank])).sum())
        transport.close()
    return total


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_that_know_the_secret_meet(size: int):
    assert run_ranks(forms_twice, size) == [size * (size - 1)] * size


def knows_another_secret(rank: Rank) -> str:
    """The last rank was told nothing: it looks for the others under its own secret, and finds none of them."""
    with pytest.raises(PeerLost) as caught:
        form(rank, 0, b"guessed" if rank.rank == 2 else SECRET, deadline_s=1.0)
    return str(caught.value)


def test_a_rank_without_the_secret_finds_no_one():
    assert all("of 3 ranks didn't form" in cause for cause in run_ranks(knows_another_secret, 3))


class Foreign(dist.Store):
    """A store in which other ranks' entries are what a foreign process wrote."""

    def __init__(self, value: bytes) -> None:
        super().__init__()
        self._value = value
        self.keys: list[str] = []

    def set(self, key: str, value: Any) -> None:
        self.keys.append(key)

    def get(self, key: str) -> bytes:
        return self._value

    def wait(self, keys: list[str], *timeout: object) -> None:
        """All is there."""


@pytest.mark.parametrize(
    "value", [b"", b"\xff" * 16, b"\xff" * 170, bytes(170), b"\x00\x00\x00\x00\x00\x01\x00\x00" + b"x" * 200]
)
def test_a_foreign_value_is_a_lost_peer(value: bytes):
    """Without a seal, an empty value would end the process, and others raise any error of parsing."""
    with pytest.raises(PeerLost, match="a value that none of the ranks has written"):
        form_group(Foreign(value), epoch=0, rank=0, size=2, backend="gloo", deadline_s=FAR_S, secret=SECRET)


def test_keys_tell_neither_the_secret_nor_the_next_place():
    stores = [Foreign(b"") for _ in range(3)]
    for store, (epoch, secret) in zip(stores, [(0, SECRET), (1, SECRET), (0, b"another")], strict=True):
        with pytest.raises(PeerLost):
            form_group(store, epoch=epoch, rank=0, size=2, backend="gloo", deadline_s=FAR_S, secret=secret)
    places = {key.split("/")[2] for store in stores for key in store.keys}
    assert len(places) == 3
    assert not any(SECRET.hex() in place for place in places)


def meets_itself(rank: Rank) -> str:
    """All have connected, but one has taken another's place by the addresses alone."""
    transport = rank.transport()
    with pytest.raises(PeerLost) as caught:
        _prove(transport, SECRET if rank.rank < 2 else b"guessed")
    return str(caught.value)


def test_who_takes_a_ranks_place_is_found_out():
    causes = run_ranks(meets_itself, 3)
    assert all("rank 2 doesn't know the secret" in cause or "gone" in cause for cause in causes[:2]), causes
    assert any("rank 2 doesn't know the secret" in cause for cause in causes[:2])


class Absent(Foreign):
    """The other rank's address is one from which no process will connect: it died as it formed the group."""

    def __init__(self, began: threading.Event) -> None:
        super().__init__(b"")
        self._began = began

    def set(self, key: str, value: Any) -> None:
        address = bytes(value)
        at = address.index(socket.AF_INET.to_bytes(2, "little"), 8)
        self._value = address[: at + 2] + b"\xff\xff" + address[at + 4 :]  # the larger address is the one that connects

    def get(self, key: str) -> bytes:
        self._began.set()
        return super().get(key)


@pytest.mark.parametrize("how", ["deadline", "stop"])
def test_forming_ends_though_a_rank_never_connects(how: str):
    """Gloo alone would wait for it five times as long, and could not be called off."""
    stop: Future[str] = Future()
    began = threading.Event()

    def call_off() -> None:
        began.wait()
        stop.set_result("a newer epoch is being formed")

    if how == "stop":
        threading.Thread(target=call_off, daemon=True).start()
    with pytest.raises(PeerLost, match="newer epoch" if how == "stop" else "not all ranks connected in time"):
        form_group(
            Absent(began),
            epoch=0,
            rank=0,
            size=2,
            backend="gloo",
            deadline_s=0.5 if how == "deadline" else 20.0,
            stop=stop,
        )
    assert not dist.is_initialized()
