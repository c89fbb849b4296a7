"""A cache over a connection, without a model: what is sent when, what is timed, and what a target doesn't believe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import xxhash

from cluster.messages.hand_over import (
    CacheAnswer,
    CacheOffer,
    CachePart,
    CacheSent,
    decode_cache_message,
    encode_cache_message,
)
from cluster.rank import cache_exchange
from cluster.rank.cache_exchange import send_cache, take_cache
from cluster.rank.command_queue import NotYet
from epslots.errors import PeerLost
from epslots.generation.cache_image import CacheImage
from epslots.generation.cache_layout import CacheLayout, KeptTensor
from epslots.transport.pair_connection import PairConnection

ANSWERS = [encode_cache_message(CacheAnswer())] * 2


class Connection:
    """One end, whose other end has said all that it will say.

    Attributes:
        said: messages that were sent, sizes of pieces, and how many were released.
    """

    def __init__(self, comes: Sequence[bytes]) -> None:
        self.said: list[Any] = []
        self._comes = list(comes)

    def send(self, message: bytes) -> None:
        self.said.append(decode_cache_message(message))

    def send_piece(self, data: torch.Tensor) -> None:
        self.said.append(len(data))

    def receive(self) -> bytes:
        return self._comes.pop(0)

    def receive_piece(self, nbytes: int) -> torch.Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8)

    def release(self, pieces: int) -> None:
        self.said.append(pieces)


class Image:
    """A cache of which a step makes some more tokens final. Its clock: a second a look."""

    def __init__(self, *final: int, grows: bool = True) -> None:
        self.device = torch.device("cpu")
        self.layout = CacheLayout("rows", final[-1], b"", (KeptTensor("0.keys", "bool", final[-1], (3,), grows=grows),))
        self.tokens, self.now_s = final[0], 0.0
        self._final = list(final)

    def advance(self) -> int:
        self.now_s += 1
        self.tokens = self._final.pop(0) if len(self._final) > 1 else self._final[0]
        return self.tokens

    def read(self, piece: Any) -> torch.Tensor:
        return torch.zeros(self.layout.piece_bytes(piece), dtype=torch.uint8)

    def write(self, piece: Any, data: torch.Tensor) -> None:
        assert self.layout.piece_bytes(piece) == len(data)


def between_steps(function: Callable[[], Any]) -> Any:
    while True:
        try:
            return function()
        except NotYet:
            continue


@pytest.fixture(autouse=True)
def pieces_of_nine_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_exchange, "PIECE_BYTES", 9)
    monkeypatch.setattr(cache_exchange, "BYTES_IN_FLIGHT", 18)


class Budget:
    """Of two pieces between two steps.

    Attributes:
        copied: bytes.
    """

    def __init__(self) -> None:
        self.copied = 0

    def pieces(self) -> int:
        return 2

    def take(self, nbytes: int) -> None:
        self.copied += nbytes

    def observe_copy(self, nbytes: int, seconds: float) -> None:
        assert nbytes <= self.copied


def send(image: Image, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], float, float]:
    """A source's messages; for how long its request stood still, and for how long it copied."""
    monkeypatch.setattr(cache_exchange.time, "monotonic", lambda: image.now_s)
    connection = Connection(ANSWERS)
    budget: Any = Budget()
    times = send_cache(cast(PairConnection, connection), cast(CacheImage, image), between_steps, budget)
    assert budget.copied == image.layout.nbytes
    assert isinstance(connection.said[0], CacheOffer) and isinstance(connection.said[-1], CacheSent)
    return connection.said[1:-1], times.held_s, times.copying_s


def test_a_prompts_parts_follow_its_steps(monkeypatch: pytest.MonkeyPatch):
    """Two pieces between two steps; looks that find nothing new are waiting, which is neither copying nor standing still."""
    said, held_s, copying_s = send(Image(0, 4, 4, 4, 12, 12, 12), monkeypatch)
    assert said == [CachePart(4, 2), 9, 3, CachePart(12, 2), 9, 9, CachePart(12, 1), 6]
    # Looks begin at 0 with nothing, at 1 with four tokens, at 2 and 3 with nothing, at 4 with the rest, and at 5.
    assert (held_s, copying_s) == (6 - 4, 6 - (1 - 0) - (4 - 2))


def test_states_are_sent_with_the_last_token(monkeypatch: pytest.MonkeyPatch):
    """There is nothing to be sent of them before."""
    said, _, _ = send(Image(2, 4, 5, grows=False), monkeypatch)
    assert said == [CachePart(5, 2), 9, 6]


def test_a_request_that_is_held_stands_still_from_the_offer(monkeypatch: pytest.MonkeyPatch):
    said, held_s, copying_s = send(Image(7), monkeypatch)
    assert said == [CachePart(7, 2), 9, 9, CachePart(7, 1), 3]
    assert held_s == copying_s == 2


def test_a_target_touches_its_cache_between_steps_alone():
    layout, inside, done = Image(7).layout, [False], list[str]()

    def between(function: Callable[[], Any]) -> Any:
        inside[0] = True
        found = function()
        inside[0] = False
        if isinstance(found, int):
            done.append("step")
        return found

    def touch(name: str) -> None:
        assert inside[0]
        done.append(name)

    place = SimpleNamespace(
        write=lambda *_: touch("write"), complete=lambda: touch("complete"), layout=layout, device=torch.device("cpu")
    )

    def reserve(_: CacheLayout) -> CacheImage:
        touch("reserve")
        return cast(CacheImage, place)

    digest = xxhash.xxh3_128_digest(bytes(layout.nbytes))
    messages = (CacheOffer(layout), CachePart(7, 2), CachePart(7, 1), CacheSent(digest))
    connection = Connection([encode_cache_message(message) for message in messages])
    budget: Any = Budget()
    assert take_cache(cast(PairConnection, connection), reserve, between, budget) is place
    assert done == ["reserve", "write", "write", "step", "write", "step", "complete"]
    assert connection.said == [CacheAnswer(), 2, 1, CacheAnswer()], "what is written is released"
    assert budget.copied == layout.nbytes


@pytest.mark.parametrize(
    ("end", "pieces", "message"),
    [
        (0, 1, "a part up to token 0 of 7, after 3"),
        (3, 1, "a part up to token 3 of 7, after 3"),
        (8, 1, "a part up to token 8 of 7, after 3"),
        (-1, 1, "a part up to token -1"),
        (7, 0, "0 pieces at once; 2 are to come"),
        (4, 2, "2 pieces at once; 1 are to come"),
        (7, -1, "-1 pieces"),
    ],
)
def test_parts_that_lead_nowhere_are_refused(end: int, pieces: int, message: str):
    """Backwards, on the spot, or past the end: the target would wait for ever, or write beyond its room."""
    layout = Image(7).layout
    connection = Connection(
        [encode_cache_message(message) for message in (CacheOffer(layout), CachePart(3, 1), CachePart(end, pieces))]
    )

    class Place:
        device = torch.device("cpu")

        def __init__(self) -> None:
            self.layout = layout

        def write(self, piece: Any, data: torch.Tensor) -> None:
            assert all(part.end <= 3 for part in piece)

    budget: Any = Budget()
    with pytest.raises(PeerLost, match=message):
        take_cache(cast(PairConnection, connection), lambda _: cast(CacheImage, Place()), between_steps, budget)


def test_a_part_is_ended_before_the_next_begins():
    """Else pieces would be taken for others."""
    layout = Image(12).layout
    messages = (CacheOffer(layout), CachePart(9, 2), CachePart(12, 1))
    connection, place = Connection([encode_cache_message(message) for message in messages]), Image(12)
    budget: Any = Budget()
    with pytest.raises(PeerLost, match="a part up to token 12 of 12, after 9"):
        take_cache(cast(PairConnection, connection), lambda _: cast(CacheImage, place), between_steps, budget)


def test_more_pieces_than_are_staged_are_refused():
    """A target has memory for so many."""
    connection = Connection([encode_cache_message(message) for message in (CacheOffer(Image(12).layout), CachePart(12, 3))])
    budget: Any = Budget()
    with pytest.raises(PeerLost, match="3 pieces at once"):
        take_cache(cast(PairConnection, connection), lambda _: cast(CacheImage, Image(12)), between_steps, budget)
