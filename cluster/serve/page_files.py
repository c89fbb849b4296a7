"""The live page's files, as they are sent. They are the same everywhere, and tell nothing: no key is needed for them.

All that the page shows comes from ``/live``, for which it asks its user for the key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_FOLDER = Path(__file__).parent / "static"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
HEADERS = {
    # Nothing from elsewhere, nothing inline, no text that becomes markup or code.
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


@dataclass(frozen=True)
class PageFile:
    """One file.

    Attributes:
        media_type: with its character set.
    """

    body: bytes
    media_type: str


def _read() -> dict[str, PageFile]:
    found = {}
    for file in sorted(_FOLDER.rglob("*")):
        if file.suffix in _TYPES:
            name = file.relative_to(_FOLDER).as_posix()
            path = "/" if name == "index.html" else f"/page/{name}"
            found[path] = PageFile(file.read_bytes(), f"{_TYPES[file.suffix]}; charset=utf-8")
    return found


PAGE_FILES: Mapping[str, PageFile] = _read()
"""By path."""
