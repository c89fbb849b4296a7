"""``epslots serve`` as a process, with a Ray of its own: it serves, survives a rank's death, drains, and leaves nothing.

One rank computes prompts and hands them over to the other one.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.http_service import COMPLETIONS, raw_request, read_until
from tests.support.rank_helpers import PATIENCE_S

KEY = "a-key-of-ours"
BODY = {"prompt": "def read(path):\n    return path\n\n" * 8, "max_tokens": 200, "temperature": 0, "ignore_eos": True}


@pytest.fixture
def process(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    options = [
        "--prefill-ranks",
        "1",
        "--decode-ranks",
        "1",
        "--slots",
        "4",
        "--port",
        "0",
        "--cache-dir",
        str(tmp_path / "stores"),
    ]
    with subprocess.Popen(
        [sys.executable, "-m", "epslots", "serve", *options],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"EPSLOTS_API_KEY": KEY, "OMP_NUM_THREADS": "1"},
    ) as started:
        yield started
        started.kill()


def line_with(process: subprocess.Popen[str], words: str) -> str:
    """The next line of standard error that has these words."""
    assert process.stderr is not None
    found = []
    for line in process.stderr:
        found.append(line)
        if words in line:
            return line
    raise AssertionError(f"the process ended: {''.join(found)}")


def ask(port: int, method: str, path: str, body: Any = None, key: str = KEY) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    connection.request(method, path, None if body is None else json.dumps(body), headers)
    answer = connection.getresponse()
    found = answer.status, json.loads(answer.read())
    connection.close()
    return found


def ask_text(port: int, path: str) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    connection.request("GET", path, headers={"Authorization": f"Bearer {KEY}"})
    found = connection.getresponse().read().decode()
    connection.close()
    return found


def test_a_service_of_its_own(process: subprocess.Popen[str]):
    listening = re.search(r":(\d+);", line_with(process, "listening at"))
    assert listening is not None
    port = int(listening[1])
    assert ask(port, "GET", "/ready")[0] == 503
    assert ask(port, "POST", COMPLETIONS, BODY)[0] == 503
    assert "try: curl" in line_with(process, "ready: python-moe on 2 ranks")
    assert ask(port, "GET", "/ready") == (200, {"status": "ready", "ranks": 2})
    assert ask(port, "POST", COMPLETIONS, BODY, key="another-key")[0] == 401
    status, right = ask(port, "POST", COMPLETIONS, BODY)
    assert status == 200
    metrics = ask_text(port, "/metrics")
    assert re.search(r"^epslots:hand_overs_total\{.*\} 1\.0$", metrics, re.MULTILINE), metrics
    decoded = re.search(r'^epslots:group_new_tokens_total\{group="1",.*role="decode"\} (\d+)', metrics, re.MULTILINE)
    assert decoded is not None and 100 < int(decoded[1]) < 200, "the first ones came from where the prompt was computed"
    driver = psutil.Process(process.pid)
    children = driver.children(recursive=True)
    ranks = [child for child in children if "WorkerActor" in " ".join(child.cmdline())]
    assert len(ranks) == 2
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as stream:
        head, _, data = raw_request(COMPLETIONS, BODY | {"stream": True}).partition(b"\r\n\r\n")
        stream.sendall(head + f"\r\nAuthorization: Bearer {KEY}\r\n\r\n".encode() + data)
        found = read_until(stream, b"data: {")
        ranks[1].kill()  # the request goes on where it was, or never knew of it
        process.send_signal(signal.SIGTERM)
        found += read_until(stream, b"data: [DONE]\n\n")
    events = re.findall(rb"data: (\{.*\})", found)
    text = "".join(json.loads(event)["choices"][0]["text"] for event in events)
    assert text == right["choices"][0]["text"]
    assert process.wait(PATIENCE_S) == 0
    _, alive = psutil.wait_procs(children, PATIENCE_S)
    assert alive == []
