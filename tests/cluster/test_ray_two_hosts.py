"""A service and a job over two hosts with a network between them, which is cut. With ``EPSLOTS_TWO_HOSTS=1``, as root."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.rank_helpers import until
from tests.support.two_hosts import ADDRESSES, TwoHosts, read_until, two_hosts_with_ray

pytestmark = [
    pytest.mark.skipif(not os.environ.get("EPSLOTS_TWO_HOSTS"), reason="EPSLOTS_TWO_HOSTS=1: network namespaces, as root"),
    pytest.mark.timeout(900),
]
PORT = 8123
URL = f"http://127.0.0.1:{PORT}"
BODY: dict[str, Any] = {"prompt": "import os\n", "max_tokens": 400, "temperature": 0, "ignore_eos": True, "stream": True}
PARTS_BEFORE = 10


@pytest.fixture
def hosts() -> Iterator[TwoHosts]:
    with (
        tempfile.TemporaryDirectory(prefix="ep-", ignore_cleanup_errors=True) as folder,
        two_hosts_with_ray(Path(folder)) as two,
    ):
        yield two


class Stream:
    """A request of the first host whose first parts have come."""

    def __init__(self, hosts: TwoHosts) -> None:
        self._asked = hosts.ask(0, f"{URL}/v1/completions", json.dumps(BODY))
        self._first = [read_until(self._asked, "data: {") for _ in range(PARTS_BEFORE)]

    def text(self) -> str:
        """Its whole text, when it has ended."""
        assert self._asked.stdout is not None
        *events, end = [line for line in [*self._first, *self._asked.stdout] if line.startswith("data: ")]
        assert end.strip() == "data: [DONE]"
        return "".join(json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events)


def serving(hosts: TwoHosts) -> int:
    """Ranks that serve."""
    found: int = json.loads(hosts.ask(0, f"{URL}/ready").communicate()[0])["ranks"]
    return found


def test_a_service_outlives_a_rank_and_the_network(hosts: TwoHosts, tmp_path: Path):
    """Found by ``--address auto``. One rank on each host; streams go on where they were, with the same text."""
    options = ["--ranks", "2", "--slots", "4", "--strategy", "STRICT_SPREAD", "--cache-dir", str(tmp_path)]
    command = [sys.executable, "-m", "epslots", "serve", "--address", "auto", "--port", str(PORT), *options]
    service = hosts.start(0, *command, stderr=subprocess.PIPE)
    read_until(service, "ready: python-moe on 2 ranks", service.stderr)
    expected = Stream(hosts).text()
    (there,) = hosts.pids(1, "WorkerActor")
    both = [Stream(hosts), Stream(hosts)]
    os.kill(there, signal.SIGKILL)
    assert [each.text() for each in both] == [expected] * 2
    assert "its process has ended" in read_until(service, f"node {ADDRESSES[1]}, pid {there}) is lost", service.stderr)
    until(lambda: serving(hosts) == 2)
    both = [Stream(hosts), Stream(hosts)]
    hosts.cut()
    assert [each.text() for each in both] == [expected] * 2
    assert "did not answer" in read_until(service, "is lost", service.stderr)


def test_a_job_runs_on_two_hosts_in_two_groups(hosts: TwoHosts, tmp_path: Path):
    output = tmp_path / "out.jsonl"
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": f"def f{n}(", "id": n}) + "\n" for n in range(12)))
    options = ["--ranks", "2", "--groups", "2", "--slots", "4", "--strategy", "STRICT_SPREAD", "--cache-dir", str(tmp_path)]
    files = ["--prompts", str(tmp_path / "in.jsonl"), "--output", str(output), "--max-new-tokens", "16"]
    job = [sys.executable, "-m", "cluster.job", *options, *files]
    ray = str(Path(sys.executable).with_name("ray"))
    submitted = hosts.start(0, ray, "job", "submit", "--address", "http://127.0.0.1:8265", "--", *job)
    log, _ = submitted.communicate()
    assert submitted.returncode == 0, log
    results = [json.loads(line) for line in output.read_text().splitlines()]
    assert sorted(result["id"] for result in results) == list(range(12))
