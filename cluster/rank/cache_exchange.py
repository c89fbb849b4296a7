"""A request's cache over a connection: the source's side and the target's. Each runs in a thread of its own, beside the steps.

    CacheOffer -> CacheAnswer -> (CachePart -> pieces) ... -> CacheSent -> CacheAnswer

A part is what is final since the last one: everything at once, or, of a prompt that is being computed, some tokens of each
layer after a step, and the states that steps change in place with the last of them. The cache itself belongs to the stepping
thread: between two steps it reads or writes as many pieces as the rank's budget allows (``copy_budget.py``). Only the
exchange's thread waits. Layouts are agreed before the first piece, digests after the last.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
import xxhash

from cluster.messages.hand_over import (
    CacheAnswer,
    CacheMessage,
    CacheOffer,
    CachePart,
    CacheSent,
    decode_cache_message,
    encode_cache_message,
)
from cluster.rank.command_queue import NotYet
from cluster.rank.copy_budget import CopyBudget
from epslots.errors import EpslotsError, PeerLost, RankMismatchError
from epslots.generation.cache_image import CacheImage
from epslots.generation.cache_layout import CacheLayout, CachePiece
from epslots.generation.piece_copies import PieceReader, PieceWriter, ReadPiece
from epslots.piece_sizes import BYTES_IN_FLIGHT, PIECE_BYTES
from epslots.transport.pair_connection import PairConnection

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
        waited_s: for tokens of the prompt.
        held_from_s: when the request was first seen to make no step; None = it still does.
    """

    def __init__(self, image: CacheImage, copies: PieceReader, budget: CopyBudget, now_s: float) -> None:
        self.end, self.waited_s = 0, 0.0
        self.held_from_s = now_s if image.tokens == image.layout.tokens else None
        self._image, self._pieces = image, deque[CachePiece]()
        self._copies, self._budget = copies, budget
        self._waits_from_s: float | None = None

    @property
    def done(self) -> bool:
        """Whether all was read."""
        return self.end == self._image.layout.tokens and not self._pieces

    def next_pieces(self) -> list[ReadPiece]:
        """A part's next pieces.

        Raises:
            NotYet: nothing is final that wasn't read.
        """
        layout, now_s = self._image.layout, time.monotonic()
        tokens = self._image.advance()
        if tokens == layout.tokens and self.held_from_s is None:
            self.held_from_s = now_s
        if not self._pieces:
            if tokens == self.end or (tokens < layout.tokens and not layout.grows):
                self._waits_from_s = self._waits_from_s or now_s
                raise NotYet
            if self._waits_from_s is not None:
                self.waited_s += now_s - self._waits_from_s
                self._waits_from_s = None
            self._pieces.extend(layout.pieces(PIECE_BYTES, self.end, tokens))
            self.end = tokens
        chosen = [self._pieces.popleft() for _ in range(min(self._budget.pieces(), len(self._pieces)))]
        self._budget.take(sum(map(layout.piece_bytes, chosen)))
        return self._copies.read(self._image, chosen)


def send_cache(connection: PairConnection, image: CacheImage, between_steps: BetweenSteps, budget: CopyBudget) -> SendingTimes:
    """Send the cache of a held request, or of a prompt while it is computed. Returns when the target has all of it.

    Args:
        budget: of this rank.

    Raises:
        HandOverRefused: the target refuses it.
        CacheGone: the request has ended, or has given up its place.
        PeerLost: the connection is broken.
    """
    began_s = time.monotonic()
    _send(connection, CacheOffer(image.layout))
    _check(_receive(connection, CacheAnswer))
    digest = xxhash.xxh3_128()
    with closing(PieceReader(image.device, _staged_bytes(image.layout), budget.observe_copy)) as copies:
        reader = _PartReader(image, copies, budget, began_s)
        while not reader.done:
            pieces = between_steps(reader.next_pieces)
            _send(connection, CachePart(reader.end, len(pieces)))
            for piece in pieces:
                data = copies.arrived(piece)
                digest.update(data.numpy().data)
                connection.send_piece(data)
    _send(connection, CacheSent(digest.digest()))
    _check(_receive(connection, CacheAnswer))
    ended_s = time.monotonic()
    assert reader.held_from_s is not None, "all of it was read"
    return SendingTimes(ended_s - reader.held_from_s, ended_s - began_s - reader.waited_s)


def take_cache(
    connection: PairConnection,
    reserve: Callable[[CacheLayout], CacheImage | None],
    between_steps: BetweenSteps,
    budget: CopyBudget,
) -> CacheImage:
    """Take a request's cache; returns its place, when all of it is there and the source was told so.

    Args:
        reserve: makes room for a layout, if there is any. Called between steps, as is all that touches the cache.
        budget: of this rank.

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
    with closing(_PartWriter(connection, image, budget)) as writer:
        while not writer.done:
            writer.receive(_receive(connection, CachePart))
            while writer.received:
                connection.release(between_steps(writer.write_some))
            writer.copies.free()
    if _receive(connection, CacheSent).digest != writer.digest.digest():
        raise _refused(connection, "the bytes that arrived have another digest than those that were sent")
    between_steps(image.complete)
    _send(connection, CacheAnswer())
    return image


class _PartWriter:
    """Receives parts of an image, and writes them. ``write_some`` is the stepping thread's.

    Attributes:
        copies: to the device.
        digest: of the pieces that came.
        received: pieces that aren't written yet, and their bytes on the device.
    """

    def __init__(self, connection: PairConnection, image: CacheImage, budget: CopyBudget) -> None:
        self.copies = PieceWriter(image.device, _staged_bytes(image.layout), budget.observe_copy)
        self.digest, self.received = xxhash.xxh3_128(), deque[tuple[CachePiece, torch.Tensor]]()
        self._connection, self._image, self._budget = connection, image, budget
        self._end, self._to_come = 0, deque[CachePiece]()

    @property
    def done(self) -> bool:
        """Whether all has come."""
        return self._end == self._image.layout.tokens and not self._to_come

    def receive(self, part: CachePart) -> None:
        """Take pieces off the connection.

        Raises:
            PeerLost: the connection is broken, or there are no such pieces.
        """
        layout, begins = self._image.layout, not self._to_come
        if not (self._end < part.end <= layout.tokens if begins else part.end == self._end):
            raise PeerLost(
                f"the other end of a connection sent a part up to token {part.end} of {layout.tokens}, after {self._end}"
            )
        if begins:
            self._to_come.extend(layout.pieces(PIECE_BYTES, self._end, part.end))
            self._end = part.end
        if not 1 <= part.pieces <= min(len(self._to_come), BYTES_IN_FLIGHT // PIECE_BYTES):
            raise PeerLost(
                f"the other end of a connection sent {part.pieces} pieces at once; {len(self._to_come)} are to come"
            )
        for _ in range(part.pieces):
            piece = self._to_come.popleft()
            data = self._connection.receive_piece(layout.piece_bytes(piece))
            self.digest.update(data.numpy().data)
            self.received.append((piece, self.copies.bring(data)))
        self.copies.settle()

    def write_some(self) -> int:
        """Write as many pieces as the budget allows; returns how many."""
        some = [self.received.popleft() for _ in range(min(self._budget.pieces(), len(self.received)))]
        pieces, staged = zip(*some, strict=True)
        self._budget.take(sum(map(len, staged)))
        self.copies.write(self._image, pieces, staged)
        return len(some)

    def close(self) -> None:
        """End all copies."""
        self.copies.close()


def _staged_bytes(layout: CacheLayout) -> int:
    return min(layout.nbytes, BYTES_IN_FLIGHT)


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
