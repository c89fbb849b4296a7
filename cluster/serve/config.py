"""``ServeConfig``: the settings of a service, declared, explained and checked here, once.

``epslots serve`` makes one of its options (``command.py``), a Serve application one of its arguments (``ray_app.py``).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Any

import msgspec

from epslots.errors import ConfigError, shown

_MOST_SECONDS = 7 * 24 * 3600


class ServeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How a service answers.

    Attributes:
        names: names of the model in requests; answers have the one that was asked for, the first by default.
        host: address to listen on.
        port: port to listen on; 0 = any that is free.
        no_auth: serve without an API key on an address that other machines reach.
        cors_origins: web origins whose pages may call the service from a browser, such as ``"https://chat.example"``.
        chat_template: Jinja template in place of the tokenizer's.
        response_template: transformers' response template, which finds tool calls and reasoning in a text, in place of the
            tokenizer's.
        request_timeout_s: seconds that a request may take; None = any.
        drain_s: seconds in which running requests may end after the service was told to stop.
        stalled_s: seconds in which the reader of an answer may take nothing; it is dropped then.
        keepalive_s: seconds without news after which a stream gets a comment, so that proxies keep it open.
        header_s: seconds in which a connection must send a request's headers, and then its body.
        max_body_bytes: bytes of a request's body.
        max_header_bytes: bytes of a request's line and headers.
        max_connections: connections at a time; fewer if this process may open fewer files.
        max_prompts: prompts of one request.
        log_requests: write a line for each request.
        log_prompts: the line has the request's prompt and text, too.
    """

    names: tuple[str, ...]
    host: str = "127.0.0.1"
    port: int = 8000
    no_auth: bool = False
    cors_origins: tuple[str, ...] = ()
    chat_template: str | None = None
    response_template: dict[str, Any] | None = None
    request_timeout_s: float | None = None
    drain_s: float = 30.0
    stalled_s: float = 60.0
    keepalive_s: float = 15.0
    header_s: float = 30.0
    max_body_bytes: int = 16 * 1024**2
    max_header_bytes: int = 64 * 1024
    max_connections: int = 4096
    max_prompts: int = 1024
    log_requests: bool = True
    log_prompts: bool = False

    def __post_init__(self) -> None:
        if not self.names or not all(name and name.isprintable() and len(name) <= 512 for name in self.names):
            raise ConfigError(f"served_model_name={shown(self.names)}; allowed: printable names of up to 512 characters")
        if not 0 <= self.port < 2**16:
            raise ConfigError(f"port={self.port}; allowed: 0 to 65535, 0 for any that is free")
        for name in ("drain_s", "stalled_s", "keepalive_s", "header_s", "request_timeout_s"):
            seconds, least = getattr(self, name), 0 if name == "drain_s" else 0.001
            if seconds is not None and not least <= seconds <= _MOST_SECONDS:
                raise ConfigError(f"{name}={shown(seconds)}; allowed: seconds, at least {least:g}, at most {_MOST_SECONDS}")
        for name in ("max_body_bytes", "max_header_bytes", "max_connections", "max_prompts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}; allowed: at least 1")
        for origin in self.cors_origins:
            if origin != "*" and not origin.startswith(("http://", "https://")):
                raise ConfigError(f"cors_origin={shown(origin)}; allowed: origins such as https://chat.example, or *")

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches the service's address."""
        return is_loopback(self.host)

    def check_exposure(self, has_keys: bool) -> None:
        """Refuse to serve other machines without API keys, unless the user says so.

        Raises:
            ConfigError: there are none, and the address is no loopback.
        """
        if not has_keys and not self.is_local and not self.no_auth:
            raise ConfigError(
                f"host={self.host!r} is reached by other machines, and there is no API key: give --api-key-file, or "
                f"EPSLOTS_API_KEY, or --no-auth to serve everybody"
            )


def is_loopback(host: str) -> bool:
    """Whether a host's name or address is this machine's loopback."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def read_serve_config(given: Mapping[str, Any]) -> ServeConfig:
    """A configuration of names and values.

    Raises:
        ConfigError: a name is unknown, or a value isn't allowed.
    """
    if unknown := sorted(set(given) - set(ServeConfig.__struct_fields__)):
        raise ConfigError(f"{', '.join(unknown)}: no such setting; allowed: {', '.join(ServeConfig.__struct_fields__)}")
    try:
        return msgspec.convert(dict(given), ServeConfig)
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from error
        raise ConfigError(f"settings {shown(dict(given))}: {error}") from error
