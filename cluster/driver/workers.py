"""Workers as the supervisor knows them."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from enum import Enum

from cluster.driver.backend import WorkerDied, WorkerHandle
from cluster.errors import ClusterError
from cluster.messages.rank import Loaded

_PROVEN_S = 60.0


@dataclass(frozen=True)
class Deadlines:
    """Seconds.

    Attributes:
        roll_call_s: in which ranks answer before a group is formed; who doesn't is given up.
        silence_s: in which a rank answers while there is work, or while it loads.
        form_s: in which ranks meet.
        operation_s: that one operation between ranks may take.
        stop_s: in which ranks give everything back before they are killed.
        give_up_s: after which a seat that keeps failing, or a Ray that doesn't come back, is given up; None for never.
    """

    roll_call_s: float = 3.0
    silence_s: float = 10.0
    form_s: float = 10.0
    operation_s: float = 60.0
    stop_s: float = 5.0
    give_up_s: float | None = None


class WorkerState(Enum):
    """Loading -> ready -> member; lost from anywhere, and for ever."""

    LOADING = "loading"
    READY = "ready"
    MEMBER = "member"
    LOST = "lost"


@dataclass(eq=False)
class LiveWorker:
    """A worker's process and what is known of it.

    Attributes:
        rank: in the current epoch, or the last that it was in; -1 before.
        formed: the last epoch that it said it stood in.
        served: it has brought something.
        cause: why it is lost.
        listening: takes its events.
    """

    seat: int
    handle: WorkerHandle
    state: WorkerState = WorkerState.LOADING
    rank: int = -1
    formed: int = -1
    served: bool = False
    stopped: bool = False
    loaded: Loaded | None = None
    cause: WorkerDied | ClusterError | None = None
    listening: asyncio.Task[None] | None = None
    since_s: float = field(default_factory=time.monotonic)

    @property
    def name(self) -> str:
        """For people."""
        return f"rank {self.seat if self.rank < 0 else self.rank} ({self.handle.where})"

    @property
    def proven(self) -> bool:
        """Whether its end says nothing against its seat."""
        return self.served or time.monotonic() - self.since_s > _PROVEN_S
