"""A request's cache over a link: the source's side and the target's. Each runs in a thread of its own, beside the steps.

    CacheOffer -> CacheAnswer -> pieces -> CacheSent -> CacheAnswer

The cache itself belongs to the stepping thread: it reads and writes a piece between two steps, for at most a few milliseconds.
Waiting for the other rank is the exchange's own. Layouts are agreed before the first piece, digests after the last.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol, TypeVar

import xxhash

from cluster.messages.hand_over import (
    CacheAnswer,
    CacheOffer,
    CacheSent,
    LinkMessage,
    decode_link_message,
    encode_link_message,
)
from epslots.errors import EpslotsError, PeerLost, RankMismatchError
from epslots.generation.cache_image import CacheImage
from epslots.generation.cache_layout import CacheLayout
from epslots.transport.pair_link import PIECE_BYTES, PairLink

T = TypeVar("T")
M = TypeVar("M", bound=LinkMessage)


class BetweenSteps(Protocol):
    """Has the stepping thread call a function between two steps; returns its result, or raises its exception."""

    def __call__(self, function: Callable[[], T]) -> T: ...


class HandOverRefused(EpslotsError):
    """One of the two ranks can't or won't go on with a hand-over; its request goes on where it is."""


def send_cache(link: PairLink, image: CacheImage, between_steps: BetweenSteps) -> None:
    """Send a held request's cache; returns when the target has all of it.

    Raises:
        HandOverRefused: the target refuses it.
        CacheGone: the request has ended, or has given up its place.
        PeerLost: the link is broken.
    """
    _send(link, CacheOffer(image.layout))
    _check(_receive(link, CacheAnswer))
    digest = xxhash.xxh3_128()
    for piece in image.layout.pieces(PIECE_BYTES):
        data = between_steps(partial(image.read, piece)).cpu()
        digest.update(data.numpy().data)
        link.send_piece(data)
    _send(link, CacheSent(digest.digest()))
    _check(_receive(link, CacheAnswer))


def take_cache(link: PairLink, reserve: Callable[[CacheLayout], CacheImage | None], between_steps: BetweenSteps) -> CacheImage:
    """Take a request's cache; returns its place, when all of it is there and the source was told so.

    Args:
        reserve: makes room for a layout, if there is any. Called between steps, as is all that touches the cache.

    Raises:
        HandOverRefused: there is no room, the layout is another model's, or the bytes aren't those that were sent.
        CacheGone: the place was given up.
        PeerLost: the link is broken.
    """
    layout = _receive(link, CacheOffer).layout
    try:
        image = between_steps(lambda: reserve(layout))
    except RankMismatchError as error:
        raise _refused(link, str(error)) from error
    if image is None:
        raise _refused(link, f"its cache has no room for {layout.tokens} tokens now")
    _send(link, CacheAnswer())
    digest = xxhash.xxh3_128()
    for piece in layout.pieces(PIECE_BYTES):
        data = link.receive_piece(layout.piece_bytes(piece))
        digest.update(data.numpy().data)
        between_steps(partial(image.write, piece, data))
    if _receive(link, CacheSent).digest != digest.digest():
        raise _refused(link, "the bytes that arrived have another digest than those that were sent")
    between_steps(image.complete)
    _send(link, CacheAnswer())
    return image


def _check(answer: CacheAnswer) -> None:
    if answer.refusal is not None:
        raise HandOverRefused(f"the other rank refuses: {answer.refusal}")


def _refused(link: PairLink, why: str) -> HandOverRefused:
    _send(link, CacheAnswer(why))
    return HandOverRefused(why)


def _send(link: PairLink, message: LinkMessage) -> None:
    link.send(encode_link_message(message))


def _receive(link: PairLink, kind: type[M]) -> M:
    message = decode_link_message(link.receive())
    if not isinstance(message, kind):
        raise PeerLost(f"the other end of a link sent {type(message).__name__}, and {kind.__name__} was due")
    return message
