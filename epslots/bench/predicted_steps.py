"""Predicted decoding steps: an engine's real operations on a tiny twin of a model, timed by a simulated GPU's clock.

    with predicted_steps(config, cache_dir) as run:
        run(GPUS["h100"], 0.5, hit_rate=0.9, captured=True).step_s

Kernels and copies take the time of the true widths. The host takes ``launch_s`` for each operation, and the recorded time of a
plan for each layer's step that is planned.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from epslots.bench.engines import Decoding, open_engine, random_requests
from epslots.bench.models import LARGE_EXPERTS, random_checkpoint, release, use_sums
from epslots.bench.scripted_routing import ScriptedRouting
from epslots.cache.host_store import HostStore
from epslots.models.measure_shape import shape_of_config
from epslots.moe.moe_layer import Batch, MoELayer
from epslots.planner.plan import NOTHING_PLANNED, RankPlan
from epslots.runtime import runtime_of
from epslots.simulated_gpu.bounds import bounds_of
from epslots.simulated_gpu.cuda_api import simulated_gpus
from epslots.simulated_gpu.gpu_spec import GpuSpec
from epslots.simulated_gpu.loading import load_simulated
from epslots.simulated_gpu.machine import SimulatedMachine
from epslots.simulated_gpu.timeline import Operation
from epslots.simulated_gpu.tiny_twin import tiny_twin
from epslots.simulated_gpu.true_sizes import TrueSizes
from epslots.transport.lockstep import Gathered

RECALL = 0.865  # of the next layer's experts on held-out text (``bench predict``)
# The host's time to plan a layer's step, with nothing and with something missing (``bench exchange``).
PLAN_S, PLAN_MISSES_S = 77e-6, 121e-6
PROMPT, WARM_UP = 520, 4  # tokens; no number of tokens on the way is one of the tiny widths
KV_TOKENS = 1024
# After a step of the warm-up, so that what was fetched ahead for the prompt has arrived.
REST_S = 0.1


class StepTimes(msgspec.Struct, frozen=True):
    """One run, by step; a step gives each request a token.

    Attributes:
        step_s: seconds.
        by_reason: seconds by what bounds them; they add up to ``step_s``.
        host_s: of these, the host's in launching and planning; ``our_host_s``: in code of ours, and its operations.
        link_busy_s: seconds in which a copy to the device was in progress.
        kernels: launched by owner ("epslots", "transformers", "other").
        syncs: of the host.
        hit_rate: share of uses whose expert was in a slot, or on its way there.
        uses: of experts, over all layers; ``fetches``: experts over the link.
        layers: MoE layers; ``expert_bytes``: of one record of the true model.
    """

    step_s: float
    by_reason: dict[str, float]
    host_s: float
    our_host_s: float
    link_busy_s: float
    kernels: dict[str, float]
    syncs: float
    hit_rate: float
    uses: int
    fetches: float
    layers: int
    expert_bytes: int

    @property
    def bound_by(self) -> str:
        """The reason with the most seconds."""
        return max(self.by_reason, key=self.by_reason.__getitem__)


Run = Callable[..., StepTimes]
"""Called with a kind of GPU and a share of slots; keywords: ``hit_rate``, ``requests``, ``captured``, ``record_bits``."""


@dataclass
class PredictedSteps:
    """Runs of one model; made by ``predicted_steps``.

    Attributes:
        folder, cache_dir: of the tiny twin, and of its host store.
        sizes: of the true model; ``record_bytes``: of one of its experts.
        top_k: experts of a token.
        steps: timed in a run.
    """

    folder: Path
    cache_dir: Path
    sizes: TrueSizes
    record_bytes: int
    top_k: int
    steps: int
    _kept: list[HostStore] = field(default_factory=list)  # in memory it lives as long as it is held

    def __call__(
        self, spec: GpuSpec, share: float, *, hit_rate: float = 1.0, record_bits: float = 16, **settings: Any
    ) -> StepTimes:
        """``each`` of one case."""
        return self.each(spec, share, [(hit_rate, record_bits)], **settings)[0]

    def each(
        self, spec: GpuSpec, share: float, cases: Sequence[tuple[float, float]], *, requests: int = 1, captured: bool = False
    ) -> list[StepTimes]:
        """Steps of one model on one GPU, one case after the other.

        Args:
            share: of the experts in slots.
            cases: hit rates, and bits of a weight in the records that cross the link; kernels read 16 in any case.
            requests: that decode together.
            captured: whether steps are.
        """
        room: dict[str, Any] = {"kv_tokens": KV_TOKENS * requests, "max_requests": requests, "max_batch_tokens": PROMPT}
        with simulated_gpus(spec) as gpu:
            model = load_twin(gpu, self.folder, self.cache_dir, self.sizes, self.record_bytes, share, capture=captured, **room)
            found = self._each(gpu, model, cases, requests, captured)
            self._kept[1:] = [runtime_of(model).store]
            del model
        release()
        return found

    def _each(
        self,
        gpu: SimulatedMachine,
        model: PreTrainedModel,
        cases: Sequence[tuple[float, float]],
        requests: int,
        captured: bool,
    ) -> list[StepTimes]:
        script = ScriptedRouting(gpu, model, tokens=requests, top_k=self.top_k, recall=RECALL)
        plan_s, engine = charge_plans(gpu, runtime_of(model).runners), open_engine(model)
        tokens = (self.steps + WARM_UP) * (len(cases) + 1)
        decoding, found = Decoding(engine, random_requests(model, requests, PROMPT, tokens)), []
        for hit_rate, record_bits in cases:
            script.hit_rate, nbytes = hit_rate, int(self.record_bytes * record_bits / 16)
            gpu.sizes.change(runtime_of(model).layers[0].layout.nbytes, nbytes)
            found.append(self._time(gpu, model, script, plan_s, decoding.step, nbytes, captured))
        engine.batcher.close()
        return found

    def _time(
        self,
        gpu: SimulatedMachine,
        model: PreTrainedModel,
        script: ScriptedRouting,
        plan_s: Callable[[], float],
        step: Callable[[], None],
        nbytes: int,
        captured: bool,
    ) -> StepTimes:
        before, counted = use_sums(model), WARM_UP + self.steps
        for number in range(WARM_UP + self.steps):
            if number == WARM_UP:
                if not captured:  # reading ends captured decoding, for a step
                    before, counted = use_sums(model), self.steps
                gpu.reset()
                planned_s, began_s = plan_s(), gpu.now_s
            script.next_step()
            step()
            if number < WARM_UP:
                gpu.spend(REST_S)
        times = times_of(gpu, self.steps, began_s, plan_s() - planned_s)
        uses = {name: count / counted for name, count in use_sums(model, since=before).items()}
        layers = len(script.ids)
        return StepTimes(**times, **hits_of(uses), uses=layers * script.ids[0].numel(), layers=layers, expert_bytes=nbytes)


@contextmanager
def predicted_steps(
    config: PreTrainedConfig, cache_dir: Path, *, layers: int | None = None, steps: int = 8
) -> Iterator[PredictedSteps]:
    """Runs of one model.

    Args:
        config: of one of ``tiny_twin.ARCHITECTURES``.
        cache_dir: of the tiny twin's host store.
        layers: of the model that is run; None = as many as it has.
        steps: timed in a run.

    Raises:
        ConfigError: the model is of another architecture.
    """
    twin, sizes = tiny_twin(config, layers)
    true = shape_of_config(config, "the model", "bfloat16")
    with random_checkpoint(twin, torch.bfloat16) as folder:
        yield PredictedSteps(folder, cache_dir, sizes, true.layers[0].layout.nbytes, true.top_k, steps)


def load_twin(
    gpu: SimulatedMachine,
    folder: Path,
    cache_dir: Path,
    sizes: TrueSizes,
    record_bytes: int,
    share: float,
    **settings: Any,
) -> PreTrainedModel:
    """A tiny twin of a model on a simulated GPU. Its kernels and copies take the true model's time from then on.

    Args:
        sizes: of ``tiny_twin``.
        record_bytes: of an expert over the link.
        share: of the experts in slots.
    """
    gpu.stand_for(sizes)
    costs = LARGE_EXPERTS  # without those of the host's CPU: it computes nothing
    fixed: dict[str, Any] = {"dtype": "bfloat16", "costs": costs, "host_store": "memory", "cache_dir": cache_dir}
    model = load_simulated(folder, slots=f"{100 * share:g}%", **fixed, **settings)
    gpu.stand_for(sizes.with_width(runtime_of(model).layers[0].layout.nbytes, record_bytes))
    return model


def hits_of(uses: Mapping[str, float]) -> dict[str, Any]:
    """``use_sums`` of a step as fields of ``StepTimes``."""
    return {
        "hit_rate": uses["hits"] / uses["uses"] if uses["uses"] else 1.0,
        "fetches": uses["misses"] + uses["prefetches"] - uses["taken_back"],
    }


def times_of(gpu: SimulatedMachine, steps: int, began_s: float, planned_s: float) -> dict[str, Any]:
    """The first device's times until now, by step, as fields of ``StepTimes``; all devices do the same.

    Args:
        began_s, planned_s: when it began, and for how long this thread has planned since.
    """
    streams, ended_s = set(gpu.streams_of(0)), gpu.now_s
    operations = [operation for operation in gpu.timeline.operations if operation.stream in streams]
    syncs, launched = sum(gpu.syncs.values()) / gpu.count, _launches(operations)
    kernels: Counter[str] = Counter()
    for (owner, _), count in gpu.kernels.items():
        kernels[owner] += count
    gpu.timeline.run(float("inf"))
    bounds = bounds_of(operations, gpu.waits[0], gpu.spec, began_s, ended_s)
    launch_s, steps_of_all = gpu.spec.launch_s, steps * gpu.count
    return {
        "step_s": bounds.total / steps,
        "by_reason": {name: seconds / steps for name, seconds in bounds.by_reason.items()},
        "host_s": (launched.total() * launch_s + planned_s) / steps,
        "our_host_s": (launched["epslots"] * launch_s + planned_s) / steps,
        "link_busy_s": bounds.link_busy / steps,
        "kernels": {owner: count / steps_of_all for owner, count in kernels.items()},
        "syncs": syncs / steps,
    }


def _launches(operations: Sequence[Operation]) -> Counter[str]:
    """The host's launches by owner; a graph's operations, which are queued at one moment, are one."""
    found: Counter[str] = Counter()
    last_s = -1.0
    for operation in operations:
        if operation.engine and operation.queued_s > last_s:
            found[operation.owner] += 1
            last_s = operation.queued_s
    return found


def charge_plans(gpu: SimulatedMachine, runners: tuple[MoELayer, ...]) -> Callable[[], float]:
    """Let plans take the host's time; returns the seconds that they have taken so far."""
    taken = [0.0]

    def charged(plan: Callable[[Batch, Gathered], RankPlan]) -> Callable[[Batch, Gathered], RankPlan]:
        def run(batch: Batch, gathered: Gathered) -> RankPlan:
            found = plan(batch, gathered)
            if found is NOTHING_PLANNED:
                return found
            seconds = PLAN_MISSES_S if any(len(one.fetch_experts) for one in found.passes) else PLAN_S
            gpu.spend(seconds)
            taken[0] += seconds
            return found

        return run

    for runner in runners:
        replaced: Any = runner
        replaced.plan = charged(runner.plan)
    return lambda: taken[0]
