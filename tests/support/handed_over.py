"""A request's way from one batcher to another, without a network."""

from __future__ import annotations

from dataclasses import replace

import pytest

import cluster.rank.cache_exchange
import cluster.rank.copy_budget
from epslots.generation.batcher import Batcher
from epslots.generation.cache_image import CacheImage
from epslots.generation.requests import Request
from tests.support.batches import Collected


def small_transfers(monkeypatch: pytest.MonkeyPatch, piece_bytes: int = 9000) -> None:
    """Caches of small models travel in several pieces, of which two are copied between two steps."""
    for module in (cluster.rank.cache_exchange, cluster.rank.copy_budget):
        monkeypatch.setattr(module, "PIECE_BYTES", piece_bytes)
        monkeypatch.setattr(module, "BYTES_IN_FLIGHT", 2 * piece_bytes)


def copy_image(source: CacheImage, target: CacheImage, most_bytes: int) -> list[int]:
    """Copy all pieces; returns the bytes of each."""
    assert target.layout == source.layout
    sizes = []
    for piece in source.layout.pieces(most_bytes):
        data = source.read(piece)
        assert len(data) == source.layout.piece_bytes(piece)
        target.write(piece, data)
        sizes.append(len(data))
    target.complete()
    assert sum(sizes) == source.layout.nbytes
    return sizes


def hand_over(request: Request, collected: Collected, target: Batcher, most_bytes: int = 1000) -> Request:
    """Hand a decoding request over; returns the rest of it, which the target has got."""
    source = collected.batcher
    image = source.hold(request.id)
    assert image is not None
    room = target.reserve(request.id, image.layout)
    assert room is not None
    copy_image(image, room, most_bytes)
    collected.take()
    rest = replace(request, prompt_logprobs=None).after(collected.tokens[request.id])
    target.add(rest)
    source.forget(request.id)
    assert image.gone and room.gone
    return rest
