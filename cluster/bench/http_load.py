"""``HttpLoad``: the clients of the service's benches, in a process of their own: what they cost isn't the service's.

Each command is a line of JSON on that process' standard input, and its answer a line on standard output:

    Wave    ask some requests at once                    -> Reached, if ``tell_at`` says so; then WaveAnswers
    Users   people who ask, leave and read slowly        -> UserTally (http_users.py)
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, Self
from urllib.parse import urlsplit

import msgspec

from cluster.bench.http_client import HttpAnswer, HttpConnection
from cluster.bench.http_users import Users, UserTally, let_users_ask


class Wave(msgspec.Struct, tag=True):
    """Requests to ask at once, each on a connection that stays for the next wave.

    Attributes:
        bodies: of the requests.
        tell_at: say ``Reached`` when the stream of every request has had so many parts; 0 = don't.
    """

    bodies: list[msgspec.Raw]
    tell_at: int = 0


class Reached(msgspec.Struct, tag=True):
    """Every stream of a wave has had its parts."""


class WaveAnswers(msgspec.Struct, tag=True):
    """A wave's answers, in the order of its requests.

    Attributes:
        took_s: from the first request sent to the last answer read.
        cpu_s: processor time of the clients meanwhile.
    """

    answers: list[HttpAnswer]
    took_s: float
    cpu_s: float


_COMMAND = Wave | Users
_NEWS = Reached | WaveAnswers | UserTally


class HttpLoad:
    """The process of the clients. As a context manager, it ends with the block.

    Args:
        url: of the service.
    """

    def __init__(self, url: str) -> None:
        command = [sys.executable, "-m", "cluster.bench.http_load", url]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._news: msgspec.json.Decoder[Any] = msgspec.json.Decoder(_NEWS)

    def tell(self, command: _COMMAND) -> None:
        """Let the clients begin something."""
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(command) + b"\n")
        self._process.stdin.flush()

    def hear(self) -> Any:
        """Wait for the next line of the clients.

        Raises:
            RuntimeError: their process has ended.
        """
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            raise RuntimeError(f"the process of the clients ended with code {self._process.wait()}")
        return self._news.decode(line)

    def ask(self, bodies: Sequence[dict[str, Any]]) -> WaveAnswers:
        """Ask requests at once, and wait for their answers."""
        self.tell(wave_of(bodies))
        found = self.hear()
        assert isinstance(found, WaveAnswers)
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


def wave_of(bodies: Sequence[dict[str, Any]], tell_at: int = 0) -> Wave:
    """The command to ask requests at once."""
    return Wave([msgspec.Raw(msgspec.json.encode(body)) for body in bodies], tell_at)


class _Clients:
    """The other side: connections that stay, and the waves on them."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address
        self._connections: list[HttpConnection] = []

    async def ask(self, wave: Wave) -> WaveAnswers:
        self._connections = [each for each in self._connections if not each.closed]
        while len(self._connections) < len(wave.bodies):
            self._connections.append(await HttpConnection(self._address).__aenter__())
        parts = [0] * len(wave.bodies)

        async def one(number: int) -> HttpAnswer:
            def count() -> None:
                parts[number] += 1
                if parts[number] == wave.tell_at and min(parts) >= wave.tell_at:
                    _say(Reached())

            connection = self._connections[number]
            answer = await connection.ask(bytes(wave.bodies[number]), count if wave.tell_at else None)
            if not answer.status:
                self._connections[number] = await HttpConnection(self._address).__aenter__()
            return answer

        began_s, cpu_s = time.perf_counter(), time.process_time()
        answers = await asyncio.gather(*map(one, range(len(wave.bodies))))
        return WaveAnswers(list(answers), time.perf_counter() - began_s, time.process_time() - cpu_s)


def _say(news: _NEWS) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(news) + b"\n")
    sys.stdout.buffer.flush()


def _main(url: str) -> None:
    import uvloop

    parts = urlsplit(url)
    address = (parts.hostname or "", parts.port or 80)
    clients, commands = _Clients(address), msgspec.json.Decoder(_COMMAND)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        for line in sys.stdin.buffer:
            match commands.decode(line):
                case Wave() as wave:
                    _say(runner.run(clients.ask(wave)))
                case Users() as users:
                    _say(runner.run(let_users_ask(address, users)))


if __name__ == "__main__":
    _main(sys.argv[1])
