"""A service over HTTP in this process, and small clients for it."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families

from cluster.serve.app import create_app
from cluster.serve.auth import ApiKeys
from cluster.serve.config import ServeConfig
from cluster.serve.served_model import ServedCluster
from cluster.serve.server import HttpServer, bind
from cluster.serve.service import Service

PATIENCE_S = 60.0
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or () %}[{{ c.function.name }}"
    "{{ c.function.arguments.x }}]{% endfor %}{% endfor %}"
    "{% for t in tools or () %}{{ '{' ~ t.function.name ~ '}' }}{% endfor %}"
    "{% if style %}({{ style }}){% endif %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@dataclass
class Reply:
    """An answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = self.json["error"]
        assert found.keys() == {"message", "type", "param", "code"}
        return found

    @property
    def events(self) -> list[Any]:
        """The stream's events; ``"[DONE]"`` is the last."""
        assert self.headers["content-type"] == "text/event-stream; charset=utf-8"
        parts = [part for part in self.body.decode().split("\n\n") if part and not part.startswith(":")]
        assert all(part.startswith("data: ") for part in parts)
        found = [part.removeprefix("data: ") for part in parts]
        assert found[-1] == "[DONE]"
        return [json.loads(part) for part in found[:-1]]


@dataclass
class Client:
    """Asks a service."""

    url: str
    service: Service
    server: HttpServer
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.url)
        assert parts.hostname is not None
        assert parts.port is not None
        return parts.hostname, parts.port

    def ask(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Reply:
        connection = http.client.HTTPConnection(*self.address, timeout=PATIENCE_S)
        try:
            connection.request(method, path, body, self.headers | (headers or {}))
            answer = connection.getresponse()
            found = {name.lower(): value for name, value in answer.getheaders()}
            return Reply(answer.status, found, answer.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Reply:
        return self.ask("GET", path, headers=headers)

    def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> Reply:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.ask("POST", path, data, {"Content-Type": "application/json"} | (headers or {}))

    @contextmanager
    def asking(self, path: str, body: Any) -> Iterator[socket.socket]:
        """A connection on which a request was sent, and whose answer is yet to be read."""
        data = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        with socket.create_connection(self.address, timeout=PATIENCE_S) as connection:
            connection.sendall(head.encode() + data)
            yield connection


def raw_request(path: str, body: Any) -> bytes:
    """A request's bytes."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
    return f"{head}{len(data)}\r\n\r\n".encode() + data


@contextmanager
def serving(
    cluster: ServedCluster | None, *, keys: tuple[str, ...] = (), log: Any = None, **settings: Any
) -> Iterator[Client]:
    """A service on a free port, with a cluster or before it has one.

    Args:
        keys: API keys.
        log: the access log.
        settings: of ``ServeConfig``.
    """
    given = {"names": ("scripted", "other"), "port": 0, "chat_template": TEMPLATE, "log_requests": log is not None} | settings
    config = ServeConfig(**given)
    service = Service(config, log)
    app = create_app(service, ApiKeys(keys), local=config.is_local)
    with HttpServer(app, bind(config.host, config.port), config) as server:
        if cluster is not None:
            service.attach(cluster)
        yield Client(server.url, service, server)


def samples(client: Client, path: str = "/metrics") -> dict[str, float]:
    """The metrics by name and labels, without the model's."""
    reply = client.get(path)
    assert reply.headers["content-type"].startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(reply.body.decode()):
        for sample in family.samples:
            labels = {name: value for name, value in sample.labels.items() if name not in ("model_name", "le")}
            if "le" not in sample.labels:
                found[sample.name + "".join(f" {name}={value}" for name, value in sorted(labels.items()))] = sample.value
    return found


def read_until(connection: socket.socket, end: bytes) -> bytes:
    """Read from a connection until its bytes hold something."""
    found = b""
    while end not in found:
        part = connection.recv(65536)
        assert part, f"the connection ended after {found!r}"
        found += part
    return found
