"""Ranks that outlive their driver, described: their load order, and the names that Ray keeps of them."""

from __future__ import annotations

import re
from typing import ClassVar, Self

import msgspec

from cluster.messages.rank import Load

SUPERSEDED = b"superseded"
"""A rank's answer to a driver whose term is over."""
TERM_BYTES = 8
"""Each command begins with the driver's term."""


class Lasting(msgspec.Struct, frozen=True):
    """All that a rank needs to outlive its driver.

    Attributes:
        name: of the cluster.
        users: file that a process locks while it uses a Ray of our own, which ends with the last of them; "" for other Rays.
    """

    name: str
    users: str = ""


class RankDescription(msgspec.Struct, frozen=True):
    """A rank's answer to a driver that may adopt it.

    Attributes:
        load: its order to load; None if none has come.
        loaded: the model is loaded.
        running: it can go on.
    """

    load: Load | None
    loaded: bool
    running: bool


class RayName(msgspec.Struct, frozen=True, order=True):
    """A name that Ray keeps of a driver's term. Names are compared by their fields, in order.

    Attributes:
        term: of the driver.
        serial: number of the thing among those that this driver started.
    """

    pattern: ClassVar[re.Pattern[str]]
    """Has the fields as groups."""

    term: int
    serial: int

    @classmethod
    def of(cls, text: str) -> Self | None:
        """The name that Ray gives as text; None if it is something else's."""
        found = cls.pattern.fullmatch(text)
        return None if found is None else msgspec.convert(found.groupdict(), cls, strict=False)


class RankName(RayName, frozen=True, order=True):
    """Ray's name of a rank's actor. Of two ranks on one bundle, the greater is the newer one."""

    pattern = re.compile(r"(?P<cluster>.+)/term (?P<term>\d+)\.(?P<serial>\d+)/rank (?P<bundle>\d+)")

    bundle: int
    cluster: str

    def __str__(self) -> str:
        return f"{self.cluster}/term {self.term}.{self.serial}/rank {self.bundle}"


class GroupName(RayName, frozen=True, order=True):
    """Ray's name of a placement group; groups in this order hold the bundles in theirs."""

    pattern = re.compile(r"epslots, (?P<cluster>.+), term (?P<term>\d+)\.(?P<serial>\d+)")

    cluster: str

    def __str__(self) -> str:
        return f"epslots, {self.cluster}, term {self.term}.{self.serial}"


def with_term(term: int, message: bytes) -> bytes:
    """A command, with the driver's term before it."""
    return term.to_bytes(TERM_BYTES, "big") + message


def split_term(message: bytes) -> tuple[int, bytes]:
    """The term, and the command."""
    return int.from_bytes(message[:TERM_BYTES], "big"), message[TERM_BYTES:]
