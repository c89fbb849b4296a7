"""Users of a service for a soak: they ask one request after the other, some leave halfway, some read slowly."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import msgspec

from cluster.bench.http_client import HttpAnswer, HttpConnection

_LEAVES, _SLOW, _WHOLE = 0.1, 0.1, 0.3
"""Chances that a user leaves halfway, reads slowly, or asks for no stream."""
_SLOW_BUFFER_BYTES = 4096
_SLOW_WAIT_S = 0.05
_LEAVES_WITHIN_S = 1.0
_MOST_PROBLEMS = 20


class AskedText(msgspec.Struct):
    """A request, and its right text."""

    body: dict[str, Any]
    text: str


class Users(msgspec.Struct, tag=True):
    """The command to let users ask.

    Attributes:
        count: of the users.
        seconds: in which they begin requests.
        asked: the requests that they choose from.
        seed: of all chances.
        finish_s: seconds after that in which the last requests must end.
    """

    count: int
    seconds: float
    asked: list[AskedText]
    seed: int = 0
    finish_s: float = 120.0


class UserTally(msgspec.Struct, tag=True):
    """The answers that users have seen.

    Attributes:
        requests: by their ends: "whole", "left", "busy" (told to come again), "lost" (any other error).
        different: whole answers with another text, or parts that aren't the beginning of the right one.
        hanging: requests that didn't end.
        problems: some of the errors and differences, in words.
    """

    requests: dict[str, int]
    different: int
    hanging: int
    problems: list[str]


class _User:
    """One user."""

    def __init__(self, address: tuple[str, int], users: Users, number: int, tally: UserTally) -> None:
        self._address, self._users, self._tally = address, users, tally
        self._chance = random.Random(users.seed * 1_000_003 + number)

    async def live(self, ends_s: float) -> None:
        while time.monotonic() < ends_s:
            chance = self._chance
            asked = chance.choice(self._users.asked)
            leaves, slow = chance.random() < _LEAVES, chance.random() < _SLOW
            body = msgspec.json.encode({**asked.body, "stream": chance.random() >= _WHOLE})
            async with HttpConnection(self._address, _SLOW_BUFFER_BYTES if slow else 2**16) as connection:
                asking = asyncio.create_task(connection.ask(body, wait_s=_SLOW_WAIT_S if slow else 0.0))
                if leaves:
                    await asyncio.wait({asking}, timeout=chance.random() * _LEAVES_WITHIN_S)
                    left = not asking.done()
                    connection.abort()
                    answer = await asking
                    self._note(answer, asked, left=left)
                else:
                    self._note(await asking, asked, left=False)

    def _note(self, answer: HttpAnswer, asked: AskedText, *, left: bool) -> None:
        end = "left" if left else "whole" if answer.whole else "busy" if answer.status in (429, 503) else "lost"
        self._tally.requests[end] = self._tally.requests.get(end, 0) + 1
        right = asked.text.startswith(answer.text) if left else answer.text == asked.text
        different = end in ("left", "whole") and not right
        self._tally.different += different
        if (different or end == "lost") and len(self._tally.problems) < _MOST_PROBLEMS:
            self._tally.problems.append(f"{end}, status {answer.status}, {answer.error!r}: {answer.text[:60]!r}")


async def let_users_ask(address: tuple[str, int], users: Users) -> UserTally:
    """Let users ask until their time is over, and their last requests have ended."""
    tally = UserTally({}, 0, 0, [])
    ends_s = time.monotonic() + users.seconds
    living = {asyncio.create_task(_User(address, users, number, tally).live(ends_s)) for number in range(users.count)}
    done, hanging = await asyncio.wait(living, timeout=users.seconds + users.finish_s)
    tally.hanging = len(hanging)
    for user in hanging:
        user.cancel()
    for user in done:
        user.result()
    return tally
