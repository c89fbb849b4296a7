"""The routes of the live page: its files, and the stream of frames that it shows."""

from __future__ import annotations

from typing import Annotated

from fastapi import FastAPI, Query
from starlette.requests import Request
from starlette.responses import Response

from cluster.serve.errors import ApiError
from cluster.serve.live_feed import LiveFeed
from cluster.serve.page_files import HEADERS, PAGE_FILES
from cluster.serve.request_summary import summary_of
from cluster.serve.sse import EventStream

MOST_LAYERS = 4096


def add_page(app: FastAPI, feed: LiveFeed, stalled_s: float) -> None:
    """Add the routes. They are the page's own, and no part of the API: ``/openapi.json`` leaves them out.

    Args:
        stalled_s: seconds in which a page may take nothing; it is dropped then.
    """

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return _file("/")

    @app.get("/page/{name:path}", include_in_schema=False)
    async def page_file(name: str) -> Response:
        return _file(f"/page/{name}")

    @app.get("/live", include_in_schema=False)
    async def live(request: Request, layer: Annotated[int, Query(ge=0, lt=MOST_LAYERS)] = 0) -> Response:
        viewer = feed.join(layer)
        summary_of(request.scope).stream = True
        return EventStream(viewer.frames(), on_left=viewer.leave, on_end=lambda: feed.part(viewer), stalled_s=stalled_s)


def _file(path: str) -> Response:
    if (file := PAGE_FILES.get(path)) is None:
        raise ApiError(404, f"GET {path[:200]}: there is no such path; see /openapi.json")
    return Response(file.body, headers=HEADERS, media_type=file.media_type)
