"""Messages of a hand-over, as msgpack: between driver and ranks, and between the two ranks on their connection.

    source -> driver           PromptProgress, after each step
    driver -> source, target   HandOver, TakeOver
    both -> driver -> other    HandOverContact, HandOverContacts, if they meet by gloo
    source -> target           CacheOffer; (CachePart; pieces), until all is sent; CacheSent
    target -> source           CacheAnswer; CacheAnswer once more, after the last piece
    source -> driver           HandedOver

A hand-over that begins before the prompt is computed sends a part after each step; a later one sends one part. The source
makes no step of the request from the offer on, or from its prompt's end. After a failure it goes on, then reports. After a
success the driver submits the request to the target, which waits for it, and has the source forget it.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from epslots.generation.cache_layout import CacheLayout

ConnectionKind = Literal["memory", "gloo"]


class ConnectionOrder(msgspec.Struct, frozen=True, kw_only=True):
    """How two ranks meet for a hand-over.

    Attributes:
        number: of the hand-over, unique in the cluster.
        secret: known only to the two ranks; they recognise each other by it.
        kind: "memory" for processes of one machine.
        form_s: seconds to wait for the other rank.
        deadline_s: seconds that each message or piece may take afterwards.
    """

    number: int
    secret: bytes
    kind: ConnectionKind
    form_s: float
    deadline_s: float


class HandOver(msgspec.Struct, tag=True, frozen=True):
    """Hand a request's cache over to another rank, as soon as its prompt is computed; answer ``HandedOver``."""

    id: str
    connection: ConnectionOrder


class TakeOver(msgspec.Struct, tag=True, frozen=True):
    """Take the cache of a request that will be submitted later."""

    id: str
    connection: ConnectionOrder


class HandOverContacts(msgspec.Struct, tag=True, frozen=True):
    """Entries that the other rank of a hand-over has published, by key."""

    number: int
    entries: dict[str, bytes]


class GoOn(msgspec.Struct, tag=True, frozen=True):
    """Let a request whose cache was handed over go on here after all. The driver doesn't need it at the target any more."""

    id: str


class Forget(msgspec.Struct, tag=True, frozen=True):
    """Drop a request whose cache was handed over, without an event. It may come back at once under its old id."""

    id: str


class Release(msgspec.Struct, tag=True, frozen=True):
    """Drop a cache that was taken, or is being taken: its request doesn't come. So does a target whose connection breaks."""

    id: str


class HandOverContact(msgspec.Struct, tag=True, frozen=True):
    """An entry of torch's rendezvous store, which the other rank of a hand-over needs in order to connect."""

    number: int
    key: str
    value: bytes


class PromptProgress(msgspec.Struct, tag=True, frozen=True):
    """A prompt is being computed; sent after each step, if the group's ``Form`` asks for that.

    Attributes:
        computed: its tokens that are computed.
        left: those that are to come.
        assignment: number of the request's assignment to this rank.
    """

    id: str
    computed: int
    left: int
    assignment: int = 0


class HandedOver(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """A hand-over has ended.

    Attributes:
        number: of the hand-over.
        failure: why the target doesn't have the cache; the request goes on at the source, unless it has ended. None = it has.
        seconds: in which the request made no step: from the offer, or its prompt's end, to the target's last answer.
        copying_s: from the offer to that answer, without waiting for the prompt.
        nbytes: of the cache.
        tokens: that it holds.
        prompt_token_s: seconds in which the source computes a token of a prompt, lately; 0 = it has timed none.
        step_bytes: bytes of caches that the source reads between two steps, lately.
    """

    number: int
    failure: str | None
    seconds: float = 0.0
    copying_s: float = 0.0
    nbytes: int = 0
    tokens: int = 0
    prompt_token_s: float = 0.0
    step_bytes: int = 0


class CacheOffer(msgspec.Struct, tag=True, frozen=True):
    """The layout of a cache that is about to be sent."""

    layout: CacheLayout


class CachePart(msgspec.Struct, tag=True, frozen=True):
    """Pieces of a part follow (``CacheLayout.pieces``), which goes from the last part's end up to token ``end`` - 1.

    Attributes:
        pieces: of the part, as many as were read between two steps; further messages have the others.
    """

    end: int
    pieces: int


class CacheSent(msgspec.Struct, tag=True, frozen=True):
    """All pieces were sent; their digest (XXH3-128), in order."""

    digest: bytes


class CacheAnswer(msgspec.Struct, tag=True, frozen=True):
    """Whether the target has room; later, whether it has the whole cache. If not, why."""

    refusal: str | None = None


CacheMessage = CacheOffer | CachePart | CacheSent | CacheAnswer

_encoder = msgspec.msgpack.Encoder()
_messages = msgspec.msgpack.Decoder(CacheMessage)


def encode_cache_message(message: CacheMessage) -> bytes:
    """A message between the two ranks as bytes."""
    return _encoder.encode(message)


def decode_cache_message(message: bytes) -> CacheMessage:
    return _messages.decode(message)
