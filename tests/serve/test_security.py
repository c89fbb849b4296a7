"""The service's bounds for strangers: keys, hosts, origins, sizes, times."""

from __future__ import annotations

import resource
import socket
from pathlib import Path

import pytest

from cluster.serve.auth import ApiKeys, read_keys
from cluster.serve.config import ServeConfig
from cluster.serve.server import allow_connections
from epslots.errors import ConfigError
from tests.support.http_service import CHAT, COMPLETIONS, PATIENCE_S, read_until, serving
from tests.support.scripted_cluster import ScriptedCluster

KEYS = ("first-key-1", "second-key-2")


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def closed(connection: socket.socket) -> bool:
    """Whether the other end closes it, without an answer."""
    try:
        return connection.recv(100) == b""
    except ConnectionResetError:
        return True


def send_until_refused(connection: socket.socket, data: bytes) -> None:
    while True:
        connection.sendall(data)


GARBAGE = [b"\x16\x03\x01\x02\x00\x01", b"\0" * 100, b"GET / HTTP/9.9\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"]


def test_a_key_opens_the_service():
    with ScriptedCluster() as cluster, serving(cluster, keys=KEYS) as client:
        for key in KEYS:
            assert client.post(COMPLETIONS, {"prompt": "a"}, bearer(key)).status == 200
        for headers in ({}, bearer("first-key-"), bearer(""), {"Authorization": "Basic first-key-1"}, bearer("first-key-1x")):
            reply = client.post(COMPLETIONS, {"prompt": "a"}, headers)
            assert (reply.status, reply.error["code"], reply.error["type"]) == (401, "invalid_api_key", "authentication_error")
            assert reply.headers["www-authenticate"] == "Bearer"
            assert not any(key.encode() in reply.body for key in KEYS)
        assert len(cluster.requests) == 2


def test_every_path_that_tells_something_needs_the_key():
    """Two don't, which orchestrators ask; nor do the live page's files, which are the same everywhere."""
    with ScriptedCluster() as cluster, serving(cluster, keys=KEYS) as client:
        for path in ("/health", "/ready"):
            assert client.get(path).status == 200
        for path in (
            "/metrics",
            "/version",
            "/v1/models",
            "/openapi.json",
            "/live",
            "/nowhere",
            "/health/",
            "//health",
            "/Health",
        ):
            assert client.get(path).status == 401, path
        for path in ("/tokenize", "/detokenize", "/health"):
            assert client.post(path, {}).status == (405 if path == "/health" else 401), path


def test_keys_of_options_files_and_the_environment(tmp_path: Path):
    file = tmp_path / "keys"
    file.write_text("# ours\nfile-key-1\n\n  file-key-2  \n")
    keys = read_keys(["option-key"], str(file), {"EPSLOTS_API_KEY": "env-key-one,env-key-two"})
    assert len(keys) == 5
    for key in ("option-key", "file-key-1", "file-key-2", "env-key-one", "env-key-two"):
        assert keys.opens(key.encode())
    assert not keys.opens(b"# ours")
    assert not keys.opens(b"")
    assert not any(key in repr(vars(keys)) for key in ("option-key", "file-key-1"))


@pytest.mark.parametrize("key", ["short", "with space", "tab\tstop-", "ümläuts-here"])
def test_keys_that_no_header_carries_are_refused(key: str):
    with pytest.raises(ConfigError, match=r"an API key of \d+ characters; allowed: at least 8") as raised:
        ApiKeys([key])
    assert key not in str(raised.value)


def test_key_files_that_cant_be_read(tmp_path: Path):
    with pytest.raises(ConfigError, match="No such file"):
        read_keys((), str(tmp_path / "none"), {})
    (tmp_path / "empty").write_text("# nothing\n")
    with pytest.raises(ConfigError, match="has no key"):
        read_keys((), str(tmp_path / "empty"), {})


@pytest.mark.parametrize(("host", "local"), [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False)])
def test_without_keys_other_machines_arent_served(host: str, local: bool):
    config = ServeConfig(names=("m",), host=host)
    assert config.is_local == local
    if local:
        config.check_exposure(has_keys=False)
    else:
        with pytest.raises(ConfigError, match="--no-auth to serve everybody"):
            config.check_exposure(has_keys=False)
        config.check_exposure(has_keys=True)
        ServeConfig(names=("m",), host=host, no_auth=True).check_exposure(has_keys=False)


def test_a_page_under_another_name_is_refused():
    """A browser's page whose name leads to this machine (DNS rebinding) must not use a service without keys."""
    with ScriptedCluster() as cluster, serving(cluster) as client:
        assert client.post(COMPLETIONS, {"prompt": "a"}, {"Host": "evil.example:8000"}).status == 403
        for host in ("localhost:1", "127.0.0.1", "[::1]:8000"):
            assert client.post(COMPLETIONS, {"prompt": "a"}, {"Host": host}).status == 200


def test_origins_are_those_named():
    origin = {"Origin": "https://chat.example"}
    asks = origin | {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    with ScriptedCluster() as cluster:
        with serving(cluster) as client:
            assert "access-control-allow-origin" not in client.post(COMPLETIONS, {"prompt": "a"}, origin).headers
            assert client.ask("OPTIONS", COMPLETIONS, headers=asks).status == 405
        with serving(cluster, cors_origins=("https://chat.example",), keys=KEYS) as client:
            assert client.ask("OPTIONS", COMPLETIONS, headers=asks).status == 200
            reply = client.post(COMPLETIONS, {"prompt": "a"}, origin | bearer(KEYS[0]))
            assert reply.headers["access-control-allow-origin"] == "https://chat.example"
            other = client.post(COMPLETIONS, {"prompt": "a"}, {"Origin": "https://evil.example"} | bearer(KEYS[0]))
            assert "access-control-allow-origin" not in other.headers


def test_a_body_has_a_limit():
    """By its length before it is sent, and by its bytes where no length is stated."""
    with ScriptedCluster() as cluster, serving(cluster, max_body_bytes=1000) as client:
        reply = client.post(COMPLETIONS, {"prompt": "x" * 1000})
        assert (reply.status, reply.error["type"]) == (413, "invalid_request_error")
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with socket.create_connection(client.address, timeout=PATIENCE_S) as one:
            one.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
            one.sendall(b"3e8\r\n" + b" " * 1000 + b"\r\n3e8\r\n" + b" " * 1000 + b"\r\n")
            assert b" 413 " in read_until(one, b"\r\n\r\n")
        assert client.post(COMPLETIONS, {"prompt": "a"}).status == 200


def test_headers_have_a_limit():
    with ScriptedCluster() as cluster, serving(cluster, max_header_bytes=2000) as client:
        for head in (
            b"GET /" + b"x" * 3000,
            b"GET /health HTTP/1.1\r\nX: " + b"y" * 3000,
            b"GET /health HTTP/1.1\r\n" + b"a: b\r\n" * 500,
        ):
            with socket.create_connection(client.address, timeout=PATIENCE_S) as one:
                one.sendall(head)
                assert b" 431 " in read_until(one, b"\r\n\r\n")
                assert one.recv(100) == b""
        with socket.create_connection(client.address, timeout=PATIENCE_S) as one:
            one.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"a: b\r\n" * 500 + b"\r\n")
            assert b" 431 " in read_until(one, b"\r\n\r\n")
        assert client.post(COMPLETIONS, {"prompt": "a" * 300, "max_tokens": 1}).status == 200, "a body isn't a header"


@pytest.mark.parametrize("trailers", [b"a: b\r\n" * 2000, b"a: " + b"b" * 10_000], ids=["many", "long"])
def test_fields_behind_a_body_have_a_limit(trailers: bytes):
    """They would be kept for as long as they come, also of a request without a key."""
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    request = f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + b'e\r\n{"prompt":"a"}\r\n0\r\n'
    with ScriptedCluster() as cluster, serving(cluster, max_header_bytes=2000) as client:
        with socket.create_connection(client.address, timeout=PATIENCE_S) as one:
            one.sendall(request + b"a: b\r\n" * 50 + b"\r\n")
            assert b" 200 " in read_until(one, b"\r\n\r\n")
        with socket.create_connection(client.address, timeout=PATIENCE_S) as one:
            one.sendall(request)
            with pytest.raises(ConnectionError):
                send_until_refused(one, trailers)


def test_a_request_must_come_in_time():
    """A connection that sends nothing, or half of a request, is closed."""
    with ScriptedCluster() as cluster, serving(cluster, header_s=0.2) as client:
        half = (
            f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{{"
        )
        for sent in (b"", b"GET /hea", half.encode()):
            with socket.create_connection(client.address, timeout=PATIENCE_S) as one:
                one.sendall(sent)
                assert closed(one)
        assert client.get("/health").status == 200


def test_a_long_answer_isnt_cut_by_the_time_of_its_request():
    with (
        ScriptedCluster(held=True) as cluster,
        serving(cluster, header_s=0.2, keepalive_s=0.1) as client,
        client.asking(COMPLETIONS, {"prompt": "a", "stream": True}) as stream,
    ):
        found = b""
        while found.count(b"keep-alive") < 5:
            found += stream.recv(1000)
        cluster.go_on()
        read_until(stream, b"[DONE]")


def test_connections_have_a_limit():
    with (
        ScriptedCluster(held=True) as cluster,
        serving(cluster, max_connections=2) as client,
        client.asking(COMPLETIONS, {"prompt": "a"}),
        client.asking(COMPLETIONS, {"prompt": "a", "stream": True}),
    ):
        cluster.wait_for(lambda: len(cluster.requests) == 2)
        with socket.create_connection(client.address, timeout=PATIENCE_S) as third:
            assert closed(third)
        assert client.service.running == 2
        cluster.go_on()


HELLO = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize("sent", [b"", b"GET /hea", HELLO])
def test_a_connection_that_waits_gives_way(sent: bytes):
    """The one that has waited longest: a peer that opens many and asks nothing doesn't keep others out."""
    with ScriptedCluster() as cluster, serving(cluster, max_connections=3) as client:
        first = [socket.create_connection(client.address, timeout=PATIENCE_S) for _ in range(3)]
        for one in first:
            one.sendall(sent)
            if sent == HELLO:
                read_until(one, b"}")
        assert client.get("/health").status == 200
        assert closed(first[0])
        for one in first[1:]:
            one.sendall(HELLO if sent in (b"", HELLO) else b"lth HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b" 200 " in read_until(one, b"}")
            one.close()
        first[0].close()


@pytest.mark.parametrize(
    ("soft", "hard", "now", "allowed"),
    [
        (1024, 20_000, 2512, 2000),
        (1024, -1, 2512, 2000),
        (20_000, 20_000, 20_000, 2000),
        (-1, -1, -1, 2000),
        (256, 1024, 1024, 512),
        (256, 256, 256, 1),
    ],
)
def test_connections_are_no_more_than_files(monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, now: int, allowed: int):
    """A process may open 1,024 by default. Without one left, it could neither accept a connection nor reach its ranks."""
    limits = [(soft, hard)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, given: limits.append(given))
    assert allow_connections(2000) == allowed
    assert limits[-1] == (now, hard)


@pytest.mark.parametrize(
    "garbage", [b"\x16\x03\x01\x02\x00\x01", b"\0" * 100, b"GET / HTTP/9.9\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"]
)
def test_garbage_is_survived(garbage: bytes):
    with ScriptedCluster() as cluster, serving(cluster) as client:
        with socket.create_connection(client.address, timeout=PATIENCE_S) as one:
            one.sendall(garbage)
            one.shutdown(socket.SHUT_WR)
            while one.recv(1000):
                pass
        assert client.get("/health").status == 200


def test_answers_say_what_they_are():
    """No sniffing, no name of the server, an id that is the client's if it has a plain one."""
    with ScriptedCluster() as cluster, serving(cluster) as client:
        reply = client.get("/health", **{"X-Request-Id": "mine-1"})
        assert (reply.headers["x-request-id"], reply.headers["x-content-type-options"]) == ("mine-1", "nosniff")
        assert "server" not in reply.headers
        for given in ("with space", "x" * 129, ""):
            assert client.get("/health", **{"X-Request-Id": given}).headers["x-request-id"] != given


def test_nothing_is_fetched_from_urls():
    """Of images, files, schemas: what would be read from elsewhere is refused by its name, without a request."""
    with ScriptedCluster() as cluster, serving(cluster) as client, socket.create_server(("127.0.0.1", 0)) as bait:
        url = f"http://127.0.0.1:{bait.getsockname()[1]}/x"
        parts = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "video_url", "video_url": {"url": url}},
            {"type": "input_audio", "input_audio": {"data": url, "format": "wav"}},
            {"type": "file", "file": {"file_data": url}},
        ]
        for part in parts:
            reply = client.post(CHAT, {"messages": [{"role": "user", "content": [part]}]})
            assert (reply.status, reply.error["param"]) == (400, "messages.0.content.0.type")
            assert "'text'" in reply.error["message"]
        for place in (url, "file:///secrets"):
            schema = {"name": "x", "schema": {"$ref": place}}
            form = {"type": "json_schema", "json_schema": schema}
            body = {"messages": [{"role": "user", "content": "a"}], "response_format": form}
            assert client.post(CHAT, body).error["param"] == "response_format"
            assert client.post(COMPLETIONS, {"prompt": "a", "guided_json": {"$ref": place}}).error["param"] == "guided_json"
        bait.setblocking(False)
        with pytest.raises(BlockingIOError):
            bait.accept()


def test_a_page_that_is_named_can_read_refusals():
    """Without its origin in an answer, a browser hides a wrong key behind an error of its own."""
    origin = {"Origin": "https://chat.example"}
    with ScriptedCluster() as cluster, serving(cluster, cors_origins=("https://chat.example",), keys=KEYS) as client:
        reply = client.post(COMPLETIONS, {"prompt": "a"}, origin | bearer("not-a-key"))
        assert (reply.status, reply.headers["access-control-allow-origin"]) == (401, "https://chat.example")


def test_a_balancer_may_ask_without_a_body():
    with ScriptedCluster() as cluster, serving(cluster, keys=KEYS) as client:
        for path in ("/health", "/ready"):
            reply = client.ask("HEAD", path)
            assert (reply.status, reply.body) == (200, b"")
            assert int(reply.headers["content-length"]) == len(client.get(path).body)


def test_no_answer_leads_elsewhere():
    """A redirect would repeat the host that a stranger has named."""
    with ScriptedCluster() as cluster, serving(cluster) as client:
        assert client.get("/health/").status == 404
        assert client.get("//health").status == 404
