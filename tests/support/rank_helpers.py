"""Run a function as each of N ranks: on processes that meet through a store, or on threads joined by the fake transport.

A function for processes is named at the top level of its module and takes a ``Rank``; one for threads takes a transport.
Both give a list of what the ranks returned. Neither hangs: a failure or the timeout ends all ranks and is named.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import pickle
import socket
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
from torch.distributed import FileStore, Store

from epslots.transport.forming import form_group
from epslots.transport.local_transport import LocalHub, LocalTransport
from epslots.transport.torch_transport import TorchTransport

# One server process imports what takes long and forks every rank, which is up in 0.1 s instead of 3. It runs no threads.
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(
    [
        "pytest",
        "hypothesis.strategies",
        "torch.distributed",
        "epslots.transport.torch_transport",
        "tests.support.warm_up",
        "tests.support.zoo",
    ]
)

PATIENCE_S = 200.0
"""A deadline that nothing healthy misses, however busy the machine; and what hangs is still named before pytest ends it."""

_GRACE_S = 1.0  # what other ranks have, after a failure, to say theirs
_LATE_S = 30.0  # in which a rank whose time is over has ended itself


class RankError(Exception):
    """A rank raised, died or didn't return in time; the message holds every traceback there is, the earliest first."""


@dataclass(frozen=True)
class Rank:
    """A process's own data: its rank among ``size``, and a folder that all ranks share."""

    rank: int
    size: int
    folder: Path

    def store(self) -> Store:
        """Where ranks meet, of all epochs."""
        return FileStore(str(self.folder / "store"), -1)

    def transport(
        self,
        *,
        epoch: int = 0,
        rank: int | None = None,
        size: int | None = None,
        form_deadline_s: float = PATIENCE_S,
        deadline_s: float = PATIENCE_S,
    ) -> TorchTransport:
        """Form a gloo group, of this process's own rank among all unless said otherwise."""
        group = form_group(
            self.store(),
            epoch=epoch,
            rank=self.rank if rank is None else rank,
            size=self.size if size is None else size,
            backend="gloo",
            deadline_s=form_deadline_s,
        )
        return TorchTransport(group, device=torch.device("cpu"), epoch=epoch, deadline_s=deadline_s)

    def end_after(self, seconds: float) -> None:
        """Have this process end, and leave its stacks behind, unless it has returned by then. The last call counts."""
        # Ends the process even if its parent is gone. The file stays open for that.
        faulthandler.dump_traceback_later(seconds, exit=True, file=(self.folder / f"stack{self.rank}").open("w"))


def run_ranks(
    fn: Callable[..., Any], size: int, *args: Any, timeout: float = PATIENCE_S, may_die: Collection[int] = ()
) -> list[Any]:
    """``fn(Rank, *args)`` in ``size`` processes: what each returned (it must pickle; tensors go by value).

    Args:
        timeout: seconds for all of it.
        may_die: ranks that may end without returning; their result is None. They are killed when all others have returned,
            so they may also be stopped or hang.

    Raises:
        RankError: a rank raised, or died without leave, or the time was over.
    """
    with TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        processes = [
            FORKED.Process(target=_main, args=(fn, Rank(rank, size, folder), args, timeout), daemon=True)
            for rank in range(size)
        ]
        try:
            for process in processes:
                process.start()
            _await(processes, folder, may_die, time.monotonic() + timeout + _LATE_S)
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()
        return [
            pickle.loads(path.read_bytes()) if (path := folder / f"result{rank}").exists() else None for rank in range(size)
        ]


def run_threads(
    fn: Callable[..., Any], size: int, *args: Any, hub: LocalHub | None = None, timeout: float = PATIENCE_S
) -> list[Any]:
    """``fn(LocalTransport, *args)`` in ``size`` threads of this process: what each returned.

    Raises:
        Exception: the first that a rank raised, with a note of its rank. The hub is broken then, so that no rank waits for it.
        TimeoutError: a thread doesn't return.
    """
    hub = hub or LocalHub(size, deadline_s=timeout)
    results: list[Any] = [None] * size
    failures: list[BaseException] = []

    def main(transport: LocalTransport) -> None:
        try:
            results[transport.rank] = fn(transport, *args)
        except BaseException as error:  # pytest's failures are no Exception
            error.add_note(f"on rank {transport.rank} of {size}")
            failures.append(error)
            hub.lose(transport.rank)

    threads = [threading.Thread(target=main, args=(hub.transport(rank),), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    ends = time.monotonic() + timeout
    for thread in threads:
        thread.join(max(0.0, ends - time.monotonic()))
    if failures:
        raise failures[0]
    running = [rank for rank, thread in enumerate(threads) if thread.is_alive()]
    if running:
        hub.break_off("the time is over")
        raise TimeoutError(f"ranks {running} didn't return within {timeout:g} s")
    return results


def free_port() -> int:
    with socket.socket() as probing:
        probing.bind(("", 0))
        port: int = probing.getsockname()[1]
    return port


def until(condition: Callable[[], object]) -> None:
    """Wait for a condition that nothing tells of, ever more patiently: to ask costs time that others need."""
    pause_s = 1e-4
    while not condition():
        time.sleep(pause_s)
        pause_s = min(1.2 * pause_s, 2e-2)


def until_stopped(pid: int) -> None:
    """Wait until a process is stopped: a signal that was sent may be yet to come."""
    until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)


def _main(fn: Callable[..., Any], rank: Rank, args: tuple[Any, ...], timeout: float) -> None:
    """The main function of a process: leave ``result<rank>`` in the folder, or ``failure<rank>`` and exit with 1."""
    torch.set_num_threads(1)
    warnings.filterwarnings("error", module="epslots")
    rank.end_after(timeout)
    try:
        result = pickle.dumps(fn(rank, *args))
    except BaseException:
        _publish(rank.folder / f"failure{rank.rank}", traceback.format_exc().encode())
        raise SystemExit(1) from None
    _publish(rank.folder / f"result{rank.rank}", result)
    faulthandler.cancel_dump_traceback_later()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _publish(path: Path, content: bytes) -> None:
    """A file is whole or absent: the process may be killed at any time."""
    part = path.with_name(f".{path.name}")
    part.write_bytes(content)
    part.rename(path)


def _await(processes: list[Any], folder: Path, may_die: Collection[int], ends: float) -> None:
    """Wait for the ranks that have to return, or raise."""
    waiting = {process.sentinel: rank for rank, process in enumerate(processes) if rank not in may_die}
    failed: list[int] = []
    while waiting and (ready := wait(list(waiting), max(0.0, ends - time.monotonic()))):
        for sentinel in ready:
            rank = waiting.pop(sentinel)
            if not (folder / f"result{rank}").exists():
                if not failed:
                    ends = min(ends, time.monotonic() + _GRACE_S)
                failed.append(rank)
    if not failed and not waiting:
        return
    lines = []
    for path in sorted(folder.glob("failure*"), key=lambda path: path.stat().st_mtime_ns):
        lines.append(f"rank {path.name.removeprefix('failure')} raised:\n{path.read_text()}")
    for rank in failed:
        if not (folder / f"failure{rank}").exists():
            processes[rank].join()
            lines.append(f"rank {rank} ended with exit code {processes[rank].exitcode}\n{_stack(folder, rank)}")
    for rank in waiting.values():
        lines.append(f"rank {rank} was still running\n{_stack(folder, rank)}")
    raise RankError("\n".join(lines))


def _stack(folder: Path, rank: int) -> str:
    """Where a process was when its time was over; empty if it ended before."""
    path = folder / f"stack{rank}"
    return path.read_text() if path.exists() else ""
