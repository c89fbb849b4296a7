"""``ReservedPages``: the pages of requests that are yet to come, with their caches, from other ranks."""

from __future__ import annotations

from transformers.generation.continuous_batching.cache import PagedAttentionCache

from epslots.errors import RankMismatchError
from epslots.generation.cache_image import CacheImage
from epslots.generation.cache_layout import CacheLayout, sequence_digest
from epslots.generation.page_images import room_in_pages
from epslots.generation.page_scheduler import PageScheduler
from epslots.generation.tracked_request import TrackedRequest


class ReservedPages:
    """The reserved pages of one cache. ``Batcher.reserve`` and ``release`` say what they are for."""

    def __init__(self, cache: PagedAttentionCache, scheduler: PageScheduler) -> None:
        self._cache, self._scheduler = cache, scheduler
        self._reserved: dict[str, tuple[str, CacheImage]] = {}
        """By our id of a request: transformers' id, and the image."""

    def __len__(self) -> int:
        return len(self._reserved)

    def reserve(self, id: str, layout: CacheLayout, number: str) -> CacheImage | None:
        """Reserve pages for a layout's tokens; None if there is no room now.

        Args:
            number: a new id for transformers.

        Raises:
            RankMismatchError: the layout is that of another model, or of other settings.
        """
        assert id not in self._reserved
        if not self._scheduler.reserve(number, layout.tokens):
            return None
        try:
            image = room_in_pages(self._cache, number, layout)
        except RankMismatchError:
            self._scheduler.release(number)
            raise
        self._reserved[id] = number, image
        return image

    def release(self, id: str) -> None:
        """Give up a request's pages; a no-op if it has none."""
        number, image = self._reserved.pop(id, (None, None))
        if number is not None and image is not None and not image.gone:
            image.end()
            self._scheduler.release(number)

    def release_all(self) -> None:
        """Give up all pages."""
        for id in list(self._reserved):
            self.release(id)

    def claim(self, entry: TrackedRequest) -> str | None:
        """The id in transformers of a request's pages, if they hold its beginning: the request has come, and takes them."""
        id, length = entry.request.id, 0
        if id in self._reserved:
            number, image = self._reserved[id]
            length = image.layout.tokens
            if image.whole and length < entry.length and image.layout.sequence == sequence_digest(entry.ids(0, length)):
                del self._reserved[id]
                image.end()
                return number
            self.release(id)
        return None
