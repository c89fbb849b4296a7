"""``epslots serve``: what can't work is said before anything loads; a signal ends the service after its requests."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.config import ClusterConfig
from cluster.serve import run as run_module
from cluster.serve.auth import ApiKeys
from cluster.serve.command import ORPHAN_S, ServeRanks, default_name, name_of
from cluster.serve.config import ServeConfig, read_serve_config
from cluster.serve.run import FAILED, STOPPED, run_service
from epslots.errors import ConfigError
from epslots.example import example_model
from tests.support.http_service import COMPLETIONS, PATIENCE_S, raw_request, read_until
from tests.support.scripted_cluster import ScriptedCluster

Run = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "there is no API key"),
        (["--host", "203.0.113.7", "--no-auth"], "give another --port, or the --host of this machine"),
        (["--api-key", "short"], "an API key of 5 characters"),
        (["--api-key-file", "/nowhere/keys"], "No such file"),
        (["--chat-template", "/nowhere/template"], "No such file"),
        (["--response-template", "/nowhere/template"], "No such file"),
        (["--cors-origin", "chat.example"], "allowed: origins such as"),
        (["--drain-s", "-1"], "drain_s=-1.0; allowed: seconds, at least 0"),
        (["--request-timeout-s", "0"], "request_timeout_s=0.0; allowed"),
        (["--served-model-name", ""], "allowed: printable names"),
        (["--model", "/nowhere/model"], "/nowhere/model"),
        (["--slots", "nonsense"], "slots='nonsense'"),
        (["--name", "../x"], "name='../x'; allowed"),
        (["--orphan-s", "nan"], "orphan_s=nan; allowed: seconds"),
        (["--ranks", "3", "--groups", "2"], "groups=2 with ranks=3"),
    ],
)
def test_what_cant_work_is_said_first(run: Run, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str):
    """No rank is started, and no port stays open."""

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("the ranks were started")

    monkeypatch.setattr("cluster.api.Cluster.__init__", never)
    code, output, errors = run("serve", *options)
    assert code == 2, errors
    assert message in errors
    assert "Traceback" not in errors
    assert "listening" not in errors
    assert output == ""


def test_a_taken_port_is_said_first(run: Run):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, _, errors = run("serve", "--port", taken.getsockname()[1])
    assert code == 2
    assert "already in use; give another --port" in errors


def test_a_model_is_called_by_its_folder(tmp_path: Path):
    (tmp_path / "Qwen3-30B-A3B").mkdir()
    assert default_name(str(tmp_path / "Qwen3-30B-A3B")) == "Qwen3-30B-A3B"
    assert default_name("Qwen/Qwen3-30B-A3B") == "Qwen/Qwen3-30B-A3B"
    assert default_name(str(example_model())) == "python-moe"


def test_settings_of_a_serve_file_are_checked():
    assert read_serve_config({"names": ["m"], "drain_s": 5}).drain_s == 5
    for given, message in (
        ({"names": ["m"], "prot": 1}, "prot: no such setting; allowed: names, host"),
        ({"names": ["m"], "port": "x"}, "Expected `int`"),
        ({"names": []}, "allowed: printable names"),
        ({"names": ["m"], "port": 70_000}, "allowed: 0 to 65535"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            read_serve_config(given)


class Served:
    """A service in this thread; a second one does things to it."""

    def __init__(self, act: Callable[[Served], None] | None, **settings: Any) -> None:
        self.cluster = ScriptedCluster("one two three " * 100, held=True)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.failure: BaseException | None = None
        config = ServeConfig(names=("scripted",), port=self.port, log_requests=False, **settings)

        def acting() -> None:
            try:
                if act is not None:
                    self.wait_for("ready")
                    act(self)
            except BaseException as error:
                self.failure = error
                self.cluster.break_down("the test failed")

        thread = threading.Thread(target=acting)
        thread.start()
        self.code = run_service(config, ApiKeys(), lambda: self.cluster, "")  # type: ignore[arg-type,return-value]
        thread.join(PATIENCE_S)
        if self.failure is not None:
            raise self.failure

    def get(self, path: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def wait_for(self, status: str) -> None:
        ends = time.monotonic() + PATIENCE_S
        while True:
            assert time.monotonic() < ends
            try:
                if self.get("/ready")[1]["status"] == status:
                    return
            except OSError:
                pass
            time.sleep(0.01)


def test_a_signal_ends_it_after_its_requests(capsys: pytest.CaptureFixture[str]):
    def act(there: Served) -> None:
        with socket.create_connection(("127.0.0.1", there.port), timeout=PATIENCE_S) as stream:
            stream.sendall(raw_request(COMPLETIONS, {"prompt": "a", "stream": True}))
            there.cluster.wait_for(lambda: len(there.cluster.requests) == 1)
            os.kill(os.getpid(), signal.SIGTERM)
            there.wait_for("draining")
            there.cluster.go_on()
            assert b"error" not in read_until(stream, b"data: [DONE]\n\n")

    assert Served(act).code == STOPPED
    said = capsys.readouterr().err
    assert re.search(r"listening at http://127\.0\.0\.1:\d+; requests are taken when the model is loaded", said)
    assert re.search(
        r"ready: scripted on 2 ranks at http://\S+/v1, after \d+\.\d s; try: curl http://\S+/v1/completions", said
    )
    assert "stopped by SIGTERM; up to 30 s for 1 request; once more to cut them off" in said


def test_a_signal_at_the_ready_line_drains(monkeypatch: pytest.MonkeyPatch):
    """Requests may have come by then, and nothing is wrong: the exit code says so."""
    said = list[str]()

    def say(text: str) -> None:
        said.append(text)
        if text.startswith("ready: "):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(run_module, "say", say)
    assert Served(None).code == STOPPED
    assert said[-1] == "stopped by SIGTERM"


def test_a_second_signal_cuts_requests_off(capsys: pytest.CaptureFixture[str]):
    def act(there: Served) -> None:
        with socket.create_connection(("127.0.0.1", there.port), timeout=PATIENCE_S) as stream:
            stream.sendall(raw_request(COMPLETIONS, {"prompt": "a", "stream": True}))
            there.cluster.wait_for(lambda: len(there.cluster.requests) == 1)
            os.kill(os.getpid(), signal.SIGINT)
            there.wait_for("draining")
            os.kill(os.getpid(), signal.SIGINT)
            assert b"try again" in read_until(stream, b"data: [DONE]\n\n")

    assert Served(act, drain_s=1000).code == STOPPED
    assert "1 request cut off, with an error that says to try again" in capsys.readouterr().err


def test_a_cluster_that_fails_ends_it(capsys: pytest.CaptureFixture[str]):
    assert Served(lambda there: there.cluster.break_down("all ranks are lost")).code == FAILED
    assert "error: all ranks are lost" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "port", "name", "orphan_s"),
    [
        ({}, 8000, "org-model-8000", ORPHAN_S),
        ({}, 0, None, 0.0),
        ({"name": "mine"}, 0, "mine", ORPHAN_S),
        ({"orphan_s": 0.0}, 8000, "org-model-8000", 0.0),
    ],
)
def test_ranks_outlive_a_service_that_can_come_again(given: dict[str, Any], port: int, name: str | None, orphan_s: float):
    """Under the same name: a port that the system chooses is another one each time."""
    assert ServeRanks(**given).lasting("org/model", port) == {"name": name, "orphan_s": orphan_s}


@pytest.mark.parametrize("parts", [("/models/a b",), ("x" * 100, "8000"), ("-._",), ("", "")])
def test_any_names_make_an_allowed_one(parts: tuple[str, ...]):
    assert ClusterConfig(name=name_of(*parts)).name
