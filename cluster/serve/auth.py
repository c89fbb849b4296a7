"""API keys: where they come from, and which requests have one."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterable, Mapping

from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.serve.config import is_loopback
from cluster.serve.errors import ApiError
from cluster.serve.page_files import PAGE_FILES
from cluster.serve.responses import send_error
from epslots.errors import ConfigError
from epslots.given_files import read_given

ENVIRONMENT = "EPSLOTS_API_KEY"
"""Variable with API keys, separated by commas."""
OPEN_PATHS = frozenset(("/health", "/ready", *PAGE_FILES))
"""Paths without a key: orchestrators ask the first two, which say no more than whether the service lives and serves; a browser
can't send a key before it has the live page's files."""
_MOST_FILE_BYTES = 1024**2
_LEAST_CHARS = 8


class ApiKeys:
    """The keys that open the service. They are kept as digests, and appear in no message.

    Args:
        keys: as clients send them.

    Raises:
        ConfigError: one is too short, or has characters that no header has.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        found = []
        for key in keys:
            if len(key) < _LEAST_CHARS or not key.isascii() or not key.isprintable() or " " in key:
                raise ConfigError(
                    f"an API key of {len(key)} characters; allowed: at least {_LEAST_CHARS} printable ASCII characters "
                    f"without spaces"
                )
            found.append(_digest(key.encode()))
        self._digests = tuple(dict.fromkeys(found))

    def __bool__(self) -> bool:
        return bool(self._digests)

    def __len__(self) -> int:
        return len(self._digests)

    def opens(self, given: bytes) -> bool:
        """Whether a key is one of these. Takes as long for any key, right or wrong."""
        digest = _digest(given)
        found = False
        for known in self._digests:
            found |= hmac.compare_digest(digest, known)
        return found


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def read_keys(given: Iterable[str], file: str | None, environment: Mapping[str, str] = os.environ) -> ApiKeys:
    """The keys of options, a file, and the environment.

    Args:
        given: as options.
        file: with a key a line; empty lines and those that begin with # are none.

    Raises:
        ConfigError: the file can't be read, or a key isn't allowed.
    """
    keys = [*given, *(key for key in environment.get(ENVIRONMENT, "").split(",") if key)]
    if file is not None:
        try:
            lines = read_given(file, _MOST_FILE_BYTES).decode().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--api-key-file {file}: {getattr(error, 'strerror', None) or error}") from error
        found = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
        if not found:
            raise ConfigError(f"--api-key-file {file} has no key; a line holds one")
        keys += found
    return ApiKeys(keys)


class Authentication:
    """Lets requests with a key through; on a service without keys, only requests from pages of this machine.

    Args:
        app: the application behind it.
        keys: the keys; none = everybody who reaches the service is let through.
        local: without keys, the service is for this machine: a browser's page of another site must not use it under a name
            of its own (DNS rebinding), so requests must name a loopback address as their host.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys, local: bool) -> None:
        self._app, self._keys, self._local = app, keys, local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (error := self._refusal(scope)) is not None:
            await send_error(error, send)
            return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = dict(scope["headers"])  # of several with one name, the last counts: uvicorn keeps their order
        if not self._keys:
            host = headers.get(b"host", b"localhost").decode("latin-1")
            if self._local and not is_loopback(_without_port(host)):
                return ApiError(403, "this service is for its own machine: name it localhost", code="wrong_host")
            return None
        if scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS":  # browsers ask so without a key; nothing is done
            return None
        kind, _, key = headers.get(b"authorization", b"").partition(b" ")
        if kind.lower() == b"bearer" and self._keys.opens(key.strip()):
            return None
        what = "the API key is wrong" if key else "an API key is needed"
        return ApiError(
            401,
            f"{what}; send it as Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0] if host.count(":") == 1 else host
