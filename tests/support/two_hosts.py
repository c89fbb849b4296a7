"""Two hosts with a network between them, on one machine: network namespaces, each with an address and a loopback of its own.

What is bound to a wrong interface, or announced by a wrong name, is not found from the other host, as between machines.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

ADDRESSES = ("10.77.0.1", "10.77.0.2")
_PORT = 6399
_TOKEN = "0123456789abcdef" * 2
_ASK = """
import sys
from urllib.request import Request, urlopen
url, *body = sys.argv[1:]
for line in urlopen(Request(url, body[0].encode() if body else None, {"Content-Type": "application/json"})):
    print(line.decode(), end="", flush=True)
"""


class TwoHosts:
    """Two hosts; those who ask for more bind themselves to ``ADDRESSES``.

    Args:
        environment: of the processes that are started there.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment, self._started = dict(environment), list[subprocess.Popen[str]]()
        self.names = tuple(f"epslots-{os.getpid()}-{number}" for number in (1, 2))
        self._links = tuple(f"ep{os.getpid()}-{number}" for number in (1, 2))

    def open(self) -> None:
        for name in self.names:
            _ip("netns", "add", name)
        first, second = self._links
        _ip("link", "add", first, "type", "veth", "peer", "name", second)
        for name, link, address in zip(self.names, self._links, ADDRESSES, strict=True):
            _ip("link", "set", link, "netns", name)
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            _ip("-n", name, "link", "set", link, "up")
            _ip("-n", name, "link", "set", "lo", "up")

    def close(self) -> None:
        """Ends all that runs there, too."""
        for name in self.names:
            if (Path("/run/netns") / name).exists():
                for pid in _ip("netns", "pids", name).split():
                    os.kill(int(pid), signal.SIGKILL)
                _ip("netns", "del", name)
        for process in self._started:
            with process:  # closes its pipes
                process.kill()

    def cut(self) -> None:
        """Take the network away: nothing arrives any more, and no connection is closed."""
        _ip("-n", self.names[1], "link", "set", self._links[1], "down")

    def start(self, host: int, *command: str, stderr: int | IO[str] | None = None) -> subprocess.Popen[str]:
        """Start a process on host 0 or 1; its standard output is a pipe."""
        in_there = ["ip", "netns", "exec", self.names[host], *command]
        started = subprocess.Popen(in_there, stdout=subprocess.PIPE, stderr=stderr, text=True, env=self._environment)
        self._started.append(started)
        return started

    def ask(self, host: int, url: str, *body: str) -> subprocess.Popen[str]:
        """A request from a host; the answer comes line by line, as it is sent."""
        return self.start(host, sys.executable, "-c", _ASK, url, *body)

    def pids(self, host: int, words: str) -> list[int]:
        """Processes of a host with these words in their command lines."""
        found = map(int, _ip("netns", "pids", self.names[host]).split())
        return [pid for pid in found if words in Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")]


@contextmanager
def two_hosts_with_ray(folder: Path) -> Iterator[TwoHosts]:
    """Ray's head on the first host, a node on the second, a CPU each, with token authentication; both end after the block.

    Args:
        folder: for Ray's files, and as the home of the processes. Its path has to be short: Ray's sockets are in it.
    """
    token = folder / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text(_TOKEN)
    hosts = TwoHosts(os.environ | {"HOME": str(folder), "RAY_AUTH_MODE": "token", "OMP_NUM_THREADS": "1"})
    ray = str(Path(sys.executable).with_name("ray"))
    places = (["--head", f"--port={_PORT}", f"--temp-dir={folder}/ray"], [f"--address={ADDRESSES[0]}:{_PORT}"])
    try:
        hosts.open()
        for host, place in enumerate(places):
            options = [f"--node-ip-address={ADDRESSES[host]}", "--num-cpus=1", "--block"]
            read_until(hosts.start(host, ray, "start", *place, *options), "Ray runtime started")
        yield hosts
    finally:
        hosts.close()


def read_until(process: subprocess.Popen[str], words: str, lines: IO[str] | None = None) -> str:
    """The next line of a process with these words.

    Args:
        lines: what it writes; its standard output by default.
    """
    found: list[str] = []
    stream = lines or process.stdout
    assert stream is not None
    for line in stream:
        found.append(line)
        if words in line:
            return line
    raise AssertionError(f"the process ended: {''.join(found)}")


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout
