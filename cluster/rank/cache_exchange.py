"""A request's cache over a connection: the source's side and the target's. Each runs in a thread of its own, beside the steps.

    CacheOffer -> CacheAnswer -> (CachePart -> pieces) ... -> CacheSent -> CacheAnswer

A part is what is final since the last one: everything at once, or, of a prompt that is being computed, some tokens of each
layer after a step, and the states that steps change in place with the last of them. The cache itself belongs to the stepping
thread: it reads or writes one or two pieces between two steps, for some milliseconds. Waiting is the exchange's own.
Layouts are agreed before the first piece, digests after the last.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import torch
import xxhash

from cluster.messages.hand_over import (
    BYTES_BETWEEN_STEPS,
    CacheAnswer,
    CacheMessage,
    CacheOffer,
    CachePart,
    CacheSent,
    decode_cache_message,
    encode_cache_message,
)
from cluster.rank.command_queue import NotYet
from epslots.errors import EpslotsError, PeerLost, RankMismatchError
from epslots.generation.cache_image import CacheImage
from epslots.generation.cache_layout import CacheLayout, CachePiece
from epslots.transport.pair_connection import PIECE_BYTES, PairConnection

T = TypeVar("T")
M = TypeVar("M", bound=CacheMessage)


class BetweenSteps(Protocol):
    """Has the stepping thread call a function between two steps; returns its result, or raises its exception.

    A function that raises ``NotYet`` is called again after the next step.
    """

    def __call__(self, function: Callable[[], T]) -> T: ...


class HandOverRefused(EpslotsError):
    """One of the two ranks can't or won't go on with a hand-over; its request goes on where it is."""


@dataclass(frozen=True)
class SendingTimes:
    """How long it took to send a cache.

    Attributes:
        held_s: in which the request made no step: from the end of its prompt.
        copying_s: in all, without waiting for the prompt.
    """

    held_s: float
    copying_s: float


class _PartReader:
    """Reads an image in parts, of what is final by then. All but the attributes is the stepping thread's.

    Attributes:
        end: tokens of the parts until now.
        begins: the last pieces were the first ones of a part.
        waited_s: for tokens of the prompt.
        held_from_s: when the request was first seen to make no step; None = it still does.
    """

    def __init__(self, image: CacheImage, now_s: float) -> None:
        self.end, self.begins, self.waited_s = 0, False, 0.0
        self.held_from_s = now_s if image.tokens == image.layout.tokens else None
        self._image, self._pieces = image, deque[CachePiece]()
        self._waits_from_s: float | None = None

    @property
    def done(self) -> bool:
        """Whether all was read."""
        return self.end == self._image.layout.tokens and not self._pieces

    def next_pieces(self) -> list[torch.Tensor]:
        """The bytes of a part's next pieces.

        Raises:
            NotYet: nothing is final that wasn't read.
        """
        layout, now_s = self._image.layout, time.monotonic()
        tokens = self._image.advance()
        if tokens == layout.tokens and self.held_from_s is None:
            self.held_from_s = now_s
        self.begins = not self._pieces
        if self.begins:
            if tokens == self.end or (tokens < layout.tokens and not layout.grows):
                self._waits_from_s = self._waits_from_s or now_s
                raise NotYet
            if self._waits_from_s is not None:
                self.waited_s += now_s - self._waits_from_s
                self._waits_from_s = None
            self._pieces.extend(layout.pieces(PIECE_BYTES, self.end, tokens))
            self.end = tokens
        count = min(max(1, BYTES_BETWEEN_STEPS // PIECE_BYTES), len(self._pieces))
        return [self._image.read(self._pieces.popleft()) for _ in range(count)]


def send_cache(connection: PairConnection, image: CacheImage, between_steps: BetweenSteps) -> SendingTimes:
    """Send the cache of a held request, or of a prompt while it is computed. Returns when the target has all of it.

    Raises:
        HandOverRefused: the target refuses it.
        CacheGone: the request has ended, or has given up its place.
        PeerLost: the connection is broken.
    """
    began_s = time.monotonic()
    _send(connection, CacheOffer(image.layout))
    _check(_receive(connection, CacheAnswer))
    digest, reader = xxhash.xxh3_128(), _PartReader(image, began_s)
    while not reader.done:
        pieces = between_steps(reader.next_pieces)
        if reader.begins:
            _send(connection, CachePart(reader.end))
        for piece in pieces:
            data = piece.cpu()
            digest.update(data.numpy().data)
            connection.send_piece(data)
    _send(connection, CacheSent(digest.digest()))
    _check(_receive(connection, CacheAnswer))
    ended_s = time.monotonic()
    assert reader.held_from_s is not None, "all of it was read"
    return SendingTimes(ended_s - reader.held_from_s, ended_s - began_s - reader.waited_s)


def take_cache(
    connection: PairConnection, reserve: Callable[[CacheLayout], CacheImage | None], between_steps: BetweenSteps
) -> CacheImage:
    """Take a request's cache; returns its place, when all of it is there and the source was told so.

    Args:
        reserve: makes room for a layout, if there is any. Called between steps, as is all that touches the cache.

    Raises:
        HandOverRefused: there is no room, the layout is another model's, or the bytes aren't those that were sent.
        CacheGone: the place was given up.
        PeerLost: the connection is broken.
    """
    layout = _receive(connection, CacheOffer).layout
    try:
        image = between_steps(lambda: reserve(layout))
    except RankMismatchError as error:
        raise _refused(connection, str(error)) from error
    if image is None:
        raise _refused(connection, f"its cache has no room for {layout.tokens} tokens now")
    _send(connection, CacheAnswer())
    digest, taken = xxhash.xxh3_128(), 0
    while taken < layout.tokens:
        end = _receive(connection, CachePart).end
        if not taken < end <= layout.tokens:
            raise PeerLost(
                f"the other end of a connection sent a part up to token {end} of {layout.tokens}, after token {taken}"
            )
        for piece in layout.pieces(PIECE_BYTES, taken, end):
            data = connection.receive_piece(layout.piece_bytes(piece))
            digest.update(data.numpy().data)
            between_steps(partial(image.write, piece, data))
        taken = end
    if _receive(connection, CacheSent).digest != digest.digest():
        raise _refused(connection, "the bytes that arrived have another digest than those that were sent")
    between_steps(image.complete)
    _send(connection, CacheAnswer())
    return image


def _check(answer: CacheAnswer) -> None:
    if answer.refusal is not None:
        raise HandOverRefused(f"the other rank refuses: {answer.refusal}")


def _refused(connection: PairConnection, why: str) -> HandOverRefused:
    _send(connection, CacheAnswer(why))
    return HandOverRefused(why)


def _send(connection: PairConnection, message: CacheMessage) -> None:
    connection.send(encode_cache_message(message))


def _receive(connection: PairConnection, kind: type[M]) -> M:
    message = decode_cache_message(connection.receive())
    if not isinstance(message, kind):
        raise PeerLost(f"the other end of a connection sent {type(message).__name__}, and {kind.__name__} was due")
    return message
