"""Predicted decoding steps of ranks in lock-step.

Each rank is a thread with a simulated GPU of its own, joined by simulated NCCL.

Each has an engine that decodes a request, captured in pieces or on the usual path. Models are those of ``predicted_steps.py``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedConfig, PreTrainedModel

from epslots.bench.engines import Decoding, open_engine, random_requests
from epslots.bench.models import LARGE_EXPERTS, random_checkpoint, release, use_sums
from epslots.bench.predicted_steps import (
    KV_TOKENS,
    PROMPT,
    RECALL,
    REST_S,
    WARM_UP,
    StepTimes,
    charge_plans,
    hits_of,
    load_twin,
    times_of,
)
from epslots.bench.scripted_routing import ScriptedRouting
from epslots.cache.host_store import HostStore
from epslots.group.join import join
from epslots.models.measure_shape import shape_of_config
from epslots.runtime import runtime_of
from epslots.simulated_gpu.cuda_api import replaced, simulated_gpus
from epslots.simulated_gpu.gpu_spec import GpuSpec
from epslots.simulated_gpu.machine import SimulatedMachine
from epslots.simulated_gpu.nccl_group import NcclHub, SimulatedNcclGroup, simulated_dist
from epslots.simulated_gpu.tiny_twin import tiny_twin
from epslots.transport import nccl, torch_transport
from epslots.transport.torch_transport import TorchTransport

_DEADLINE_S = 600.0

RankRun = Callable[..., StepTimes]
"""Called with a kind of GPU and a share of slots; keywords: ``ranks``, ``hit_rate``, ``captured``. The first rank's times."""


@contextmanager
def predicted_ranks(
    config: PreTrainedConfig, cache_dir: Path, *, layers: int | None = None, steps: int = 4
) -> Iterator[RankRun]:
    """Runs of one model by ranks with a request each; arguments and errors as of ``predicted_steps``.

    The hit rate is that of all ranks' slots as one cache.
    """
    twin, sizes = tiny_twin(config, layers)
    true = shape_of_config(config, "the model", "bfloat16")
    kept: list[HostStore] = []  # in memory it lives as long as it is held

    def run(spec: GpuSpec, share: float, *, ranks: int = 2, hit_rate: float = 1.0, captured: bool = False) -> StepTimes:
        with simulated_gpus(spec, count=ranks) as gpu, replaced(torch_transport, "dist", simulated_dist(dist)):
            nccl.set_environment()
            nbytes = true.layers[0].layout.nbytes
            room: dict[str, Any] = {"kv_tokens": KV_TOKENS, "max_requests": 1, "max_batch_tokens": PROMPT, "capture": captured}
            load = partial(load_twin, gpu, folder, cache_dir, sizes, nbytes, share, **room)
            models = [load(device=f"cuda:{n}") for n in range(ranks)]
            steps_of = _Steps(gpu, NcclHub(ranks), steps, true.top_k, hit_rate)
            with ThreadPoolExecutor(ranks) as threads:
                found = list(threads.map(steps_of, range(ranks), models))
            kept[1:] = [runtime_of(models[0]).store]
            del models
        release()
        uses = len(true.layers) if layers is None else layers
        return StepTimes(**found[0], uses=uses * true.top_k, layers=uses, expert_bytes=nbytes)

    with random_checkpoint(twin, torch.bfloat16) as folder:
        yield run


class _Steps:
    """The steps of one rank, in its thread."""

    def __init__(self, gpu: SimulatedMachine, hub: NcclHub, steps: int, top_k: int, hit_rate: float) -> None:
        self._gpu, self._hub, self._steps, self._top_k, self._hit_rate = gpu, hub, steps, top_k, hit_rate
        self._warm, self._done = threading.Barrier(hub.size, action=gpu.reset), threading.Barrier(hub.size)

    def __call__(self, rank: int, model: PreTrainedModel) -> dict[str, Any]:
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
        try:
            group: Any = SimulatedNcclGroup(self._hub, rank, device)
            join(model, TorchTransport(group, device=device, deadline_s=_DEADLINE_S), settings={}, costs=LARGE_EXPERTS)
            routing: dict[str, Any] = {"hit_rate": self._hit_rate, "recall": RECALL, "seed": rank}
            return self._decode(model, ScriptedRouting(self._gpu, model, tokens=1, top_k=self._top_k, **routing), rank)
        except BaseException:  # the other ranks wait for this one
            self._hub.lose(rank)
            self._warm.abort()
            self._done.abort()
            raise

    def _decode(self, model: PreTrainedModel, script: ScriptedRouting, rank: int) -> dict[str, Any]:
        gpu, plan_s, engine = self._gpu, charge_plans(self._gpu, runtime_of(model).runners), open_engine(model)
        decoding = Decoding(engine, random_requests(model, 1, PROMPT, WARM_UP + self._steps + 1, seed=rank))
        for number in range(WARM_UP + self._steps):
            if number == WARM_UP:
                self._warm.wait()
                planned_s, began_s, before = plan_s(), gpu.now_s, use_sums(model)
            script.next_step()
            decoding.step()
            if number < WARM_UP:
                gpu.spend(REST_S)
        self._done.wait()
        times = times_of(gpu, self._steps, began_s, plan_s() - planned_s) if rank == 0 else {}
        uses = {name: count / self._steps for name, count in use_sums(model, since=before).items()}
        engine.batcher.close()
        return times | hits_of(uses)
