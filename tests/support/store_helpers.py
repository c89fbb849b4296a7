"""A host store without a model: two layers whose experts say who they are, and processes that hold or build it."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from epslots.cache.host_store import HostStore, Manifest
from epslots.cache.node_store import OpenFile, open_node_store
from epslots.layout import LayerSpec, RecordLayout
from epslots.progress import ProgressDisplay

WIDE = RecordLayout.of([("gate_up_proj", (64, 32), "float32"), ("down_proj", (32, 32), "float32")])
NARROW = RecordLayout.of([("up_proj", (7, 5), "bfloat16")])
MANIFEST = Manifest("k3y", "model", (LayerSpec("layers.0.experts", 6, WIDE), LayerSpec("layers.1.experts", 3, NARROW)))


class NamedExperts:
    """Every weight of expert e in layer l is 100 l + e."""

    def __init__(self) -> None:
        self.reads = 0

    def read_expert(self, layer: int, expert: int) -> dict[str, torch.Tensor]:
        self.reads += 1
        layout = MANIFEST.layers[layer].layout
        return {t.name: torch.full(t.shape, 100.0 * layer + expert) for t in layout.tensors}


def open_store(cache_dir: Path, source: NamedExperts, kind: str = "file", open_as: OpenFile = HostStore) -> HostStore:
    display = ProgressDisplay(shown=False)
    return open_node_store(MANIFEST, lambda: source, kind=kind, cache_dir=cache_dir, start_progress=display, open_as=open_as)


class TellingExperts(NamedExperts):
    """Tells the test that building is under way, and goes on when the test says so."""

    def __init__(self, pipe: Connection) -> None:
        super().__init__()
        self.pipe = pipe

    def read_expert(self, layer: int, expert: int) -> dict[str, torch.Tensor]:
        if (layer, expert) == (1, 1):
            self.pipe.send("building")
            self.pipe.recv()
        return super().read_expert(layer, expert)


def hold_store(cache_dir: Path, kind: str, pipe: Connection) -> None:
    """A process: open the store, report how many experts were converted and which file it maps, wait to be told to end."""
    torch.set_num_threads(1)
    source = NamedExperts()
    store = open_store(cache_dir, source, kind)
    value = float(store.record(1, 2)[: NARROW.tensors[0].nbytes].view(torch.bfloat16)[0])
    files = {os.fstat(fd).st_ino for fd in _own_fds() if "experts" in _target(fd) or "memfd" in _target(fd)}
    pipe.send((source.reads, sorted(files), value))
    pipe.recv()


def build_slowly(cache_dir: Path, kind: str, pipe: Connection) -> None:
    """A process that the test kills or interrupts in the middle of building."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent in the background has it ignored
    with contextlib.suppress(KeyboardInterrupt):
        open_store(cache_dir, TellingExperts(pipe), kind)


def _own_fds() -> list[int]:
    return [int(name) for name in os.listdir("/proc/self/fd")]  # noqa: PTH208


def _target(fd: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError:
        return ""


@contextlib.contextmanager
def without_privileges() -> Iterator[None]:
    """As somebody whom file permissions concern: root reads everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
