"""Connections of two processes: bytes arrive as sent, a bounded number at a time; strangers and lost ends are seen."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from epslots.errors import PeerLost
from epslots.piece_sizes import PIECE_BYTES
from epslots.transport import memory_connection, pair_connection
from epslots.transport.gloo_connection import open_gloo_connection
from epslots.transport.memory_connection import _CELLS as CELLS
from epslots.transport.memory_connection import open_source, open_target
from epslots.transport.pair_connection import PairConnection, machine_of_this

SECRET, OTHER = b"s" * 16, b"o" * 16
LONG_S = 100.0
Opened = Callable[..., tuple[Callable[[], PairConnection], Callable[[], PairConnection]]]


def ends_of(
    kind: str, number: int, form_s: float = LONG_S, deadline_s: float = LONG_S, secrets: Any = (SECRET, SECRET)
) -> Any:
    """Functions that open the two ends, to be called at once."""
    if kind == "memory":
        return (
            partial(open_source, number, secrets[0], form_s, deadline_s),
            partial(open_target, number, secrets[1], form_s, deadline_s),
        )
    store = HashStore()
    return tuple(
        partial(open_gloo_connection, store, number, secret, form_s, deadline_s, source=source)
        for secret, source in zip(secrets, (True, False), strict=True)
    )


def together(*functions: Callable[[], Any]) -> list[Any]:
    """The results or errors of functions, each in a thread of its own."""
    futures: list[Future[Any]] = [Future() for _ in functions]

    def run(function: Callable[[], Any], future: Future[Any]) -> None:
        try:
            future.set_result(function())
        except Exception as error:
            future.set_result(error)

    threads = [threading.Thread(target=run, args=pair) for pair in zip(functions, futures, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [future.result() for future in futures]


@pytest.fixture(params=["memory", "gloo"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_messages_and_pieces_arrive_as_they_were_sent(kind: str):
    source, target = together(*ends_of(kind, 1))
    sizes = [PIECE_BYTES, 1, 7000, 1 << 20, 5]
    pieces = [torch.arange(size, dtype=torch.int32).to(torch.uint8) for size in sizes]

    def send() -> bytes:
        source.send(b"layout" * 5000)
        first = source.receive()
        for piece in pieces:
            data = piece.clone()
            source.send_piece(data)
            data.fill_(0)  # it is free on return
        source.send(b"")
        return bytes(first + source.receive())

    def receive() -> list[bool]:
        assert target.receive() == b"layout" * 5000
        target.send(b"yes, ")
        held = [target.receive_piece(len(piece)) for piece in pieces]
        found = [bool((one == piece).all()) for one, piece in zip(held, pieces, strict=True)]
        target.release(len(pieces))
        assert target.receive() == b""
        target.send(b"all")
        return found

    assert together(send, receive) == [b"yes, all", [True] * len(pieces)]
    for end in (source, target):
        end.abort()
        end.abort()
        with pytest.raises(PeerLost):
            end.receive()


@pytest.mark.parametrize("together_count", [1, 3, CELLS])
def test_pieces_are_held_until_they_are_released(together_count: int):
    """A source that is faster than its target waits for it, and writes over nothing that is still being read."""
    source, target = together(*ends_of("memory", 2))
    sent, total = list[int](), 3 * CELLS

    def send() -> None:
        for number in range(total):
            source.send_piece(torch.full((100,), number, dtype=torch.uint8))
            sent.append(number)

    thread = threading.Thread(target=send)
    thread.start()
    held: list[tuple[int, torch.Tensor]] = []
    for number in range(total):
        held.append((number, target.receive_piece(100)))
        if len(held) == together_count:
            assert len(sent) <= number + 1 - len(held) + CELLS
            assert all(piece.tolist() == [earlier] * 100 for earlier, piece in held)
            target.release(len(held))
            held.clear()
    target.send(b"done")
    thread.join()
    assert source.receive() == b"done"
    source.abort()
    target.abort()


def test_a_piece_takes_the_first_free_cell():
    """Cells that were never used are no memory."""
    source, target = together(*ends_of("memory", 10))
    for number in range(2 * CELLS):
        source.send_piece(torch.full((100,), number, dtype=torch.uint8))
        piece = target.receive_piece(100)
        target.release(1)
        assert piece.data_ptr() - target._memory.data_ptr() <= PIECE_BYTES
        target.send(b"")
        assert source.receive() == b"", "it knows that the cell is free"
    source.abort()
    target.abort()


def test_a_lost_end_is_noticed_at_once(kind: str):
    """Also by one that waits in the middle of a message."""
    source, target = together(*ends_of(kind, 3))

    def leave() -> None:
        target.receive()
        target.abort()

    def go_on() -> None:
        source.send(b"hello")
        source.receive()

    found, left = together(go_on, leave)
    assert isinstance(found, PeerLost) and left is None
    source.abort()


def test_another_thread_ends_a_wait(kind: str):
    source, target = together(*ends_of(kind, 4))
    found, _ = together(source.receive, source.abort)
    assert isinstance(found, PeerLost)
    target.abort()


def test_a_silent_end_is_given_up(kind: str):
    source, target = together(*ends_of(kind, 5, deadline_s=0.05))
    with pytest.raises(PeerLost, match="gone or silent"):
        source.receive()
    target.abort()


def test_an_end_that_doesnt_come_is_given_up(kind: str):
    for end in (0, 1):
        alone = ends_of(kind, 6, form_s=0.05)[end]
        with pytest.raises(PeerLost, match="hand-over 6"):
            alone()


def test_strangers_are_refused():
    """One that finds the address doesn't know the secret. Memory's address alone tells nothing without it."""
    found = together(*ends_of("gloo", 7, secrets=(SECRET, OTHER)))
    assert all(isinstance(error, PeerLost) for error in found)
    assert any("doesn't know its secret" in str(error) for error in found)
    assert memory_connection._address(7, SECRET) != memory_connection._address(7, OTHER)
    source, target = together(*ends_of("memory", 7))
    found = together(
        partial(pair_connection.prove, source, OTHER, 7, source=True),
        partial(pair_connection.prove, target, SECRET, 7, source=False),
    )
    assert all(isinstance(error, PeerLost) for error in found)


def test_foreign_messages_end_a_connection():
    source, target = together(*ends_of("memory", 8))
    source.send(b"a message")
    with pytest.raises(PeerLost, match="was due"):
        target.receive_piece(9)
    source.abort()
    source, target = together(*ends_of("memory", 8))
    source.send_piece(torch.zeros(9, dtype=torch.uint8))
    target.release(2)
    with pytest.raises(PeerLost, match="2 cells are free, and 1 are in use"):
        source.receive()
    with pytest.raises(PeerLost, match="9 bytes in cell 0, and 8"):
        target.receive_piece(8)


def test_memory_is_gone_with_its_connection():
    """Nothing has a name: no file, no socket and no descriptor is left."""
    gc.collect()
    before = set(Path("/proc/self/fd").iterdir())
    source, target = together(*ends_of("memory", 9))
    assert set(Path("/proc/self/fd").iterdir()) - before
    source.abort()
    target.abort()
    del source, target
    gc.collect()
    assert set(Path("/proc/self/fd").iterdir()) <= before


def test_processes_of_one_machine_know_each_other():
    assert machine_of_this() == machine_of_this() != ""
