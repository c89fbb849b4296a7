"""``LiveFeed``: frames for the live page, once a second while it is open, the same ones for all that look.

It costs nothing while no page is open: the first viewer starts the one task that makes frames, and it ends with the last one.
A viewer that is slow, or far away, misses frames; none wait for it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Protocol

from cluster.reports import ClusterStats
from cluster.serve.errors import overloaded
from cluster.serve.live_frame import Known, frame_of, layer_of
from cluster.serve.live_window import LiveSample, LiveWindow
from cluster.serve.sampler import Sampler
from cluster.serve.sse import encode_json

EVERY_S = 1.0
MOST_VIEWERS = 64
logger = logging.getLogger("epslots.serve")


class Watched(Protocol):
    """The service, as far as its page shows it. For the loop's thread."""

    viewed: frozenset[int]
    """Numbers of the layers whose slots the ranks' numbers are to have."""
    ended: asyncio.Event
    """The service has ended; so do its viewers."""

    @property
    def sampler(self) -> Sampler[ClusterStats] | None: ...
    def view(self, layers: frozenset[int]) -> None:
        """Have the numbers of these layers' slots from now on."""
        ...

    def known(self) -> Known: ...


class Viewer:
    """One open page: the frame that it hasn't been sent yet.

    Args:
        layer: number of the MoE layer that it shows.
    """

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self._frame: bytes | None = None
        self._news = asyncio.Event()
        self._left = False

    def show(self, frame: bytes) -> None:
        """Have this frame sent next, in place of one that is still unsent."""
        self._frame = frame
        self._news.set()

    def leave(self) -> None:
        """End its frames."""
        self._left = True
        self._news.set()

    async def frames(self) -> AsyncIterator[bytes]:
        """Frames as they come, until ``leave``."""
        while True:
            await self._news.wait()
            self._news.clear()
            if self._left:
                return
            if self._frame is not None:
                frame, self._frame = self._frame, None
                yield frame


class LiveFeed:
    """Makes frames for viewers. For the loop's thread.

    Args:
        service: shown to them.
        every_s: seconds from a frame to the next.
    """

    def __init__(self, service: Watched, every_s: float = EVERY_S) -> None:
        self._service, self._every_s = service, every_s
        self._viewers: set[Viewer] = set()
        self._making: asyncio.Task[None] | None = None

    def join(self, layer: int) -> Viewer:
        """A new viewer; it gets a frame within a second.

        Args:
            layer: number of the MoE layer that it shows.

        Raises:
            ApiError: there are too many.
        """
        if len(self._viewers) >= MOST_VIEWERS:
            raise overloaded(f"{MOST_VIEWERS} pages are open, and no more are served")
        viewer = Viewer(layer)
        self._viewers.add(viewer)
        self._note_layers()
        if self._making is None:
            self._making = asyncio.get_running_loop().create_task(self._make())
        return viewer

    def part(self, viewer: Viewer) -> None:
        """A viewer has left."""
        viewer.leave()
        self._viewers.discard(viewer)
        self._note_layers()
        if not self._viewers and self._making is not None:
            self._making.cancel()
            self._making = None

    def _note_layers(self) -> None:
        self._service.view(frozenset(viewer.layer for viewer in self._viewers))

    async def _make(self) -> None:
        """Make frames for as long as there are viewers, and the service lives."""
        loop, window = asyncio.get_running_loop(), LiveWindow()
        try:
            while not self._service.ended.is_set():
                began_s = loop.time()
                sampler = self._service.sampler
                if sampler is not None:
                    await sampler.sample(self._every_s)
                known, layers = self._service.known(), self._service.viewed
                at_s = None if sampler is None else sampler.latest_s
                frames = await asyncio.to_thread(make_frames, known, window, layers, at_s, time.time())
                for viewer in self._viewers:
                    if viewer.layer in frames:
                        viewer.show(frames[viewer.layer])
                await self._pause(self._every_s - (loop.time() - began_s))
        except Exception:
            logger.exception("the live page met a bug")
        self._making = None
        for viewer in self._viewers:
            viewer.leave()

    async def _pause(self, seconds: float) -> None:
        """Wait, but no longer than the service lives."""
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, seconds)):
                await self._service.ended.wait()


def make_frames(
    known: Known, window: LiveWindow, layers: frozenset[int], sampled_s: float | None, at: float
) -> dict[int, bytes]:
    """Events with frames, by the layer that they show; for a thread, since large models have large ones.

    Args:
        window: gets the newest sample.
        layers: numbers of the layers that are viewed.
        sampled_s: when the ranks' numbers came, on a monotonic clock.
        at: seconds since 1970.
    """
    if known.stats is not None and sampled_s is not None:
        window.add(LiveSample.of(known.stats, sampled_s, layers))
    frame = encode_json(frame_of(known, window, at))
    return {
        layer: b'data: {"frame":' + frame + b',"layer":' + encode_json(layer_of(known, window, layer)) + b"}\n\n"
        for layer in layers
    }
