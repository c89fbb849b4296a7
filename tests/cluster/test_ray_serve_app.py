"""The service as an application of Ray Serve: the same answers through its proxy, and settings that are checked first."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.serve.ray_app import build
from cluster.serve.ray_proxy import LOST
from epslots.errors import ConfigError
from epslots.example import example_model

PROXY = "cluster.serve.ray_proxy:middlewares"
CODE = r"""
import json, os, re, signal, socket, sys, threading, urllib.error, urllib.request
import psutil, ray
from ray import serve
from cluster.ray_backend.lean_node import lean_nodes
from cluster.serve.ray_app import build

with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
with lean_nodes():
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, _temp_dir=sys.argv[2])
serve.start(http_options={"host": "127.0.0.1", "port": port})
serve.run(build(json.loads(sys.argv[1])), route_prefix="/")

def ask(path, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()

prompt = {"prompt": "import os", "max_tokens": 8, "temperature": 0}
texts = "/v1/completions"
found = [ask("/ready"), ask(texts, prompt), ask(texts, prompt | {"stream": True}), ask(texts, {})]

def pids(name):
    return sorted(p.pid for p in psutil.Process().children(recursive=True) if name in " ".join(p.cmdline()))

def ask_again():
    while True:
        try:
            answer = ask(texts, prompt)
            if answer[0] != 404:  # as long as the new proxy knows no route
                return answer
        except OSError:  # no service listens, or not for long
            pass
        threading.Event().wait(0.05)

replica, ranks = pids("ServeReplica"), pids("WorkerActor")
(proxy,) = pids("ProxyActor")
os.kill(proxy, signal.SIGKILL)
found += [ask_again(), [pids("ServeReplica") == replica, pids("WorkerActor") == ranks, len(replica), len(ranks)]]

answers, begun = [None, None], threading.Event()
long = {"prompt": "import os", "max_tokens": 1500, "ignore_eos": True}

def read_whole():
    answers[0] = ask(texts, long)

def read_stream():
    data = json.dumps(long | {"stream": True}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{texts}", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            head = answer.read(100)
            begun.set()
            answers[1] = [answer.status, (head + answer.read()).decode()]
    finally:
        begun.set()

threads = [threading.Thread(target=read) for read in (read_whole, read_stream)]
for thread in threads:
    thread.start()
begun.wait()
while all(map(threading.Thread.is_alive, threads)) and not re.search(r"num_requests_running\S* 2.0", ask("/metrics")[1]):
    pass
os.kill(replica[0], signal.SIGKILL)
for thread in threads:
    thread.join()
found += answers
serve.shutdown()
ray.shutdown()
print("FOUND" + json.dumps(found))
"""


def test_a_replica_answers_as_the_command_does(tmp_path: Path):
    """Its proxy and then the replica itself are killed."""
    settings = {"model": str(example_model()), "ranks": 1, "slots": 4, "cache_dir": str(tmp_path), "service": {"names": ["m"]}}
    done = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(settings), f"/tmp/epslots-serve-{os.getpid()}"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": PROXY},
    )
    marked = re.search(r"^FOUND(.*)$", done.stdout, re.MULTILINE)
    assert marked, done.stderr[-3000:]
    ready, whole, stream, refused, after_the_proxy, same, lost, lost_stream = json.loads(marked[1])
    assert ready == [200, '{"status":"ready","ranks":1}']
    body: Any = json.loads(whole[1])
    assert (whole[0], body["model"], body["usage"]["completion_tokens"]) == (200, "m", 8)
    parts = [part for part in stream[1].split("\n\n")[:-2] if not part.startswith(":")]  # comments keep connections alive
    events = [json.loads(part.removeprefix("data: ")) for part in parts]
    assert "".join(event["choices"][0]["text"] for event in events) == body["choices"][0]["text"]
    assert stream[1].endswith("data: [DONE]\n\n")
    assert after_the_proxy[0] == 200, "Serve has started another proxy"
    assert json.loads(after_the_proxy[1])["choices"] == body["choices"]
    assert same == [True, True, 1, 1], "replica and ranks are the same processes"
    assert (refused[0], json.loads(refused[1])["error"]["param"]) == (400, "prompt")
    assert (lost[0], json.loads(lost[1])["error"]["message"]) == (503, LOST), "the replica was killed"
    assert lost_stream[0] == 200
    assert LOST in lost_stream[1] and lost_stream[1].endswith("data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({}, "model=None; allowed: a checkpoint's folder"),
        ({"model": "m", "prompts": 1}, "prompts: no such setting"),
        ({"model": "m", "service": {"prot": 1}}, "prot: no such setting; allowed: names"),
        ({"model": "m", "service": {"drain_s": "x"}}, "drain_s"),
    ],
)
def test_an_applications_settings_are_checked_first(args: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=re.escape(message)):
        build(args)
