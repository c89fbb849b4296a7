"""Launchers start a model on several ranks. Another package provides one, by an entry point:

[project.entry-points."epslots.launchers"]
ray = "cluster.api:Cluster"
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, Unpack, cast

from epslots.cli.extensions import load_extension
from epslots.cli.tables import RanksStats
from epslots.config import LoadSettings
from epslots.generation.portions import Portion

GROUP = "epslots.launchers"
NAME = "ray"


class Continuation(Protocol):
    """One choice of a prompt's continuation."""

    def portions(self) -> Iterator[Portion]:
        """It as it comes.

        Raises (the iterator):
            RequestError: this one ended with an error. Others go on.
            EpslotsError: none can be served any more.
        """


class Launched(Protocol):
    """A model that serves prompts. Leaving its context ends all of its processes."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> object: ...

    def submit_choices(self, prompt: Sequence[int], **settings: Any) -> Sequence[Continuation]:
        """Start to continue a prompt of token ids.

        Args:
            settings: of ``GenerationSettings``.

        Raises:
            EpslotsError: the prompt or a setting is refused.
        """

    def stats(self) -> RanksStats:
        """Counters since the start."""


class LaunchSettings(LoadSettings, total=False):
    """How many ranks there are, and where; and the settings of each rank's model."""

    ranks: int | None
    """None = as many as both roles have."""
    groups: int
    """Into which the ranks are divided."""
    prefill_ranks: int
    """Ranks that compute prompts for the others; 0 = each does all."""
    decode_ranks: int
    """The others; 0 = as many as there are."""
    address: str | None
    """Of a running system; None starts one on this machine."""
    strategy: str
    """How ranks are placed on nodes: PACK, SPREAD, STRICT_PACK or STRICT_SPREAD."""
    placement: Path | None
    """File of the experts' first placement."""


class Launcher(Protocol):
    """Starts a model on several ranks, and returns when it serves."""

    def __call__(self, path_or_id: str, *, max_queue: int, **settings: Unpack[LaunchSettings]) -> Launched:
        """Start the ranks.

        Args:
            path_or_id: a checkpoint folder, or a hub id.
            max_queue: prompts that may be submitted at once.

        Raises:
            EpslotsError: they can't be started; the message says what to do.
        """


def find_launcher() -> Launcher:
    """The installed launcher.

    Raises:
        ConfigError: there is none, or it can't be imported.
    """
    return cast(Launcher, load_extension(GROUP, NAME, "--ranks, --address", "starts several ranks"))
