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
        said: messages that were sent, and sizes of pieces.
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


class Image:
    """A cache of which a step makes some more tokens final. Its clock: a second a look."""

    def __init__(self, *final: int, grows: bool = True) -> None:
        self.layout = CacheLayout("rows", final[-1], b"", (KeptTensor("0.keys", "bool", final[-1], (3,), grows=grows),))
        self.tokens, self.now_s = final[0], 0.0
        self._final = list(final)

    def advance(self) -> int:
        self.now_s += 1
        self.tokens = self._final.pop(0) if len(self._final) > 1 else self._final[0]
        return self.tokens

    def read(self, piece: Any) -> torch.Tensor:
        return torch.zeros(self.layout.piece_bytes(piece), dtype=torch.uint8)


def between_steps(function: Callable[[], Any]) -> Any:
    while True:
        try:
            return function()
        except NotYet:
            continue


@pytest.fixture(autouse=True)
def pieces_of_nine_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_exchange, "PIECE_BYTES", 9)
    monkeypatch.setattr(cache_exchange, "BYTES_BETWEEN_STEPS", 18)


def send(image: Image, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], float, float]:
    """What a source says; for how long its request stood still, and for how long it copied."""
    monkeypatch.setattr(cache_exchange.time, "monotonic", lambda: image.now_s)
    connection = Connection(ANSWERS)
    times = send_cache(cast(PairConnection, connection), cast(CacheImage, image), between_steps)
    assert isinstance(connection.said[0], CacheOffer) and isinstance(connection.said[-1], CacheSent)
    return connection.said[1:-1], times.held_s, times.copying_s


def test_a_prompts_parts_follow_its_steps(monkeypatch: pytest.MonkeyPatch):
    """Two pieces between two steps; looks that find nothing new are waiting, which is neither copying nor standing still."""
    said, held_s, copying_s = send(Image(0, 4, 4, 4, 12, 12, 12), monkeypatch)
    assert said == [CachePart(4), 9, 3, CachePart(12), 9, 9, 6]
    # Looks begin at 0 with nothing, at 1 with four tokens, at 2 and 3 with nothing, at 4 with the rest, and at 5.
    assert (held_s, copying_s) == (6 - 4, 6 - (1 - 0) - (4 - 2))


def test_states_are_sent_with_the_last_token(monkeypatch: pytest.MonkeyPatch):
    """There is nothing to be sent of them before."""
    said, _, _ = send(Image(2, 4, 5, grows=False), monkeypatch)
    assert said == [CachePart(5), 9, 6]


def test_a_request_that_is_held_stands_still_from_the_offer(monkeypatch: pytest.MonkeyPatch):
    said, held_s, copying_s = send(Image(7), monkeypatch)
    assert said == [CachePart(7), 9, 9, 3]
    assert held_s == copying_s == 2


def test_a_target_touches_its_cache_between_steps_alone():
    layout, inside, done = Image(7).layout, [False], list[str]()

    def between(function: Callable[[], Any]) -> Any:
        inside[0] = True
        found = function()
        inside[0] = False
        return found

    def touch(name: str) -> None:
        assert inside[0]
        done.append(name)

    place = SimpleNamespace(write=lambda *_: touch("write"), complete=lambda: touch("complete"))

    def reserve(_: CacheLayout) -> CacheImage:
        touch("reserve")
        return cast(CacheImage, place)

    digest = xxhash.xxh3_128_digest(bytes(layout.nbytes))
    connection = Connection(
        [encode_cache_message(message) for message in (CacheOffer(layout), CachePart(7), CacheSent(digest))]
    )
    assert take_cache(cast(PairConnection, connection), reserve, between) is place
    assert done == ["reserve", "write", "write", "write", "complete"]
    assert connection.said == [CacheAnswer(), CacheAnswer()]


@pytest.mark.parametrize("end", [0, 3, 8, -1])
def test_parts_that_lead_nowhere_are_refused(end: int):
    """Backwards, on the spot, or past the end: the target would wait for ever, or write beyond its room."""
    layout = Image(7).layout
    connection = Connection([encode_cache_message(message) for message in (CacheOffer(layout), CachePart(3), CachePart(end))])

    class Place:
        def write(self, piece: Any, data: torch.Tensor) -> None:
            assert all(part.end <= 3 for part in piece)

    with pytest.raises(PeerLost, match=rf"a part up to token {end} of 7, after token 3"):
        take_cache(cast(PairConnection, connection), lambda _: cast(CacheImage, Place()), between_steps)
