"""``bench gpu``: two ranks over NCCL, on one GPU where NCCL allows that. One is killed, and the other goes on alone.

form, load, generate   both ranks; tokens equal plain transformers'
kill                   rank 1 ends itself by SIGKILL; rank 0 is in a step, and raises PeerLost
form again, generate   rank 0 alone, in the next epoch and the same process
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from multiprocessing.context import SpawnProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from transformers import PreTrainedModel

import epslots
from epslots.bench.engines import random_prompt
from epslots.bench.gpu_kit import GpuKit
from epslots.bench.models import random_checkpoint, random_config
from epslots.bench.report import MS, Tables, median, synchronise
from epslots.errors import GroupError, PeerLost
from epslots.group.join import join
from epslots.transport.forming import form_group
from epslots.transport.rendezvous import BACKENDS
from epslots.transport.torch_transport import TorchTransport

# Two ranks on one GPU since this version of NCCL, by this variable.
_SHARED_GPU_NCCL, _SHARED_GPU = (2, 30), "NCCL_MULTI_RANK_GPU_ENABLE"
PROMPT, NEW_TOKENS, STEPS = 16, 12, 20
FORM_S, OPERATION_S, LIMIT_S = 40.0, 5.0, 100.0


class _Orders(msgspec.Struct):
    """The settings of a rank's process.

    Attributes:
        checkpoint: its folder.
        expected: plain transformers' tokens.
    """

    folder: str
    checkpoint: str
    cache_dir: str
    device: str
    rank: int
    size: int
    expected: list[int]


def measure_ranks(kit: GpuKit) -> None:
    """Form, compute, kill and form again."""
    kit.step("ranks", LIMIT_S if kit.on_gpu else 20, lambda: _ranks(kit))


def _devices(kit: GpuKit) -> list[str]:
    """The device of each rank."""
    if not kit.on_gpu:
        return ["cpu", "cpu"]
    if torch.cuda.device_count() > 1:
        return ["cuda:0", "cuda:1"]
    return ["cuda:0"] * (2 if torch.cuda.nccl.version() >= _SHARED_GPU_NCCL else 1)


def _ranks(kit: GpuKit) -> Tables:
    config = random_config(layers=3, hidden=64, experts=16, top_k=4, width=32, vocab=320, heads=4)
    devices = _devices(kit)
    with random_checkpoint(config, torch.float32) as checkpoint, TemporaryDirectory(prefix="epslots-ranks-") as folder:
        expected = _generate(kit.plain(checkpoint, torch.device("cpu")))
        paths = {"folder": folder, "checkpoint": str(checkpoint), "cache_dir": str(kit.cache_dir)}
        orders = [
            _Orders(**paths, device=device, rank=rank, size=len(devices), expected=expected)
            for rank, device in enumerate(devices)
        ]
        if len(set(devices)) < len(devices):
            os.environ[_SHARED_GPU] = "1"
        return {"ranks": [_run(orders, Path(folder))]}


def _run(orders: list[_Orders], folder: Path) -> dict[str, Any]:
    """Start all ranks, and return what the first has found.

    Raises:
        RuntimeError: it didn't end in time, or failed.
    """
    context = multiprocessing.get_context("spawn")
    processes: list[SpawnProcess] = [context.Process(target=_rank, args=(msgspec.json.encode(one),)) for one in orders]
    try:
        for process in processes:
            process.start()
        processes[0].join(LIMIT_S)
    finally:
        for process in processes:
            process.kill()
            process.join()
    found = folder / "found.json"
    if not found.exists():
        raise RuntimeError(f"rank 0 found nothing within {LIMIT_S:.0f} s; its last step: {_last_step(folder)}")
    result: dict[str, Any] = json.loads(found.read_text(encoding="utf-8"))
    return result


def _last_step(folder: Path) -> str:
    path = folder / "step.txt"
    return path.read_text(encoding="utf-8") if path.exists() else "it didn't start"


def _rank(encoded: bytes) -> None:
    """A rank's process."""
    orders = msgspec.json.decode(encoded, type=_Orders)
    try:
        _live(orders)
    except Exception as error:
        _say(orders, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        raise


def _say(orders: _Orders, step: str) -> None:
    if orders.rank == 0:
        (Path(orders.folder) / "step.txt").write_text(step, encoding="utf-8")


@torch.no_grad()
def _live(orders: _Orders) -> None:
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    device = torch.device(orders.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    _say(orders, "forming the group")
    transport, form_s = _form(orders, device, epoch=0, size=orders.size)
    _say(orders, "loading")
    settings: dict[str, Any] = {"slots": "50%", "device": device, "dtype": "float32", "cache_dir": orders.cache_dir}
    group = transport if orders.size > 1 else None
    model = epslots.load(orders.checkpoint, progress=False, group=group, **settings)
    if orders.size == 1:
        join(model, transport, settings={})
    _say(orders, "generating")
    with epslots.sync_ranks(model):
        right = _generate(model) == orders.expected
    step_ms = median([_step_seconds(model, device) for _ in range(STEPS)]) * MS
    found = {"ranks": orders.size, "device": orders.device, "form s": form_s, "tokens equal": right, "ms a step": step_ms}
    if orders.size > 1:
        transport.deadline_s = OPERATION_S
        if orders.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        _say(orders, "waiting for a lost rank")
        found["loss noticed s"] = _seconds_to_notice(model, device)
    _say(orders, "forming again")
    transport, found["form again s"] = _form(orders, device, epoch=1, size=1)
    join(model, transport)
    _say(orders, "generating alone")
    found["tokens equal, alone"] = _generate(model) == orders.expected
    (Path(orders.folder) / "found.json").write_text(json.dumps(found), encoding="utf-8")


def _form(orders: _Orders, device: torch.device, *, epoch: int, size: int) -> tuple[TorchTransport, float]:
    store = dist.FileStore(str(Path(orders.folder) / "store"), -1)  # type: ignore[attr-defined]
    began = time.monotonic()
    group = form_group(store, epoch=epoch, rank=orders.rank, size=size, backend=BACKENDS[device.type], deadline_s=FORM_S)
    return TorchTransport(group, device=device, epoch=epoch, deadline_s=FORM_S), time.monotonic() - began


def _generate(model: PreTrainedModel) -> list[int]:
    ids = torch.tensor([random_prompt(model, PROMPT, 1)]).to(model.device)
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found: list[int] = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0].tolist()
    return found


def _step_seconds(model: PreTrainedModel, device: torch.device) -> float:
    ids = torch.tensor([random_prompt(model, 1, 2)]).to(device)
    began = time.perf_counter()
    model(ids, use_cache=False)
    synchronise(device)
    return time.perf_counter() - began


def _seconds_to_notice(model: PreTrainedModel, device: torch.device) -> float:
    """Seconds of steps until one raises.

    Raises:
        RuntimeError: none does.
    """
    began = time.monotonic()
    while time.monotonic() - began < 4 * OPERATION_S:
        try:
            _step_seconds(model, device)
        except (PeerLost, GroupError):
            return time.monotonic() - began
    raise RuntimeError("no step raised after the other rank was killed")
