"""Routing with a given hit rate, and predictions with a given recall, on a model whose weights are random.

Before each step a script chooses, for every layer, which of a token's experts are in slots and which are missing. The routers
and the predictor compute as ever; what they find is replaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from epslots.arrays import BoolArray, IntArray
from epslots.models.experts import experts_modules
from epslots.models.experts_interface import RUNNER
from epslots.moe.moe_layer import MoELayer
from epslots.moe.prefetcher import Prefetcher, UsagePredictor
from epslots.planner.prefetch_policy import PrefetchVerdict
from epslots.runtime import runtime_of
from epslots.simulated_gpu.machine import SimulatedMachine
from epslots.simulated_gpu.tensors import memory_of

# Experts that were used longest ago may be evicted within the step, for prefetches: no hit is chosen among this share of them.
_MAY_BE_EVICTED = 0.25
# How sure predictions of absent experts are, in 256ths, and the shares of each among those that were used and those that
# weren't: the shipped model on text, its fitted predictor, half of the experts in slots.
_SURENESS = (242, 160, 95, 45)
_OF_USED, _OF_UNUSED = (0.61, 0.17, 0.16, 0.06), (0.04, 0.14, 0.31, 0.51)


class ScriptedRouting:
    """Chooses the experts of steps with so many tokens; in steps of other lengths the routers do.

    Attributes:
        hit_rate: share of a token's experts that are in slots, or on their way there, when a step begins.

    Args:
        model: on a simulated GPU.
        tokens: of a step.
        recall: share of a layer's experts that are predicted in the layer before.
    """

    def __init__(
        self,
        gpu: SimulatedMachine,
        model: PreTrainedModel,
        *,
        tokens: int,
        top_k: int,
        recall: float,
        seed: int = 0,
        hit_rate: float = 1.0,
    ) -> None:
        runtime = runtime_of(model)
        self._gpu, self._runtime = gpu, runtime
        self.hit_rate, self._recall = hit_rate, recall
        self._random = np.random.default_rng(seed)
        self.active, self._owed = False, 0.0
        device = runtime.runners[0].cache.pool.device
        layers = [runner.cache.num_experts for runner in runtime.runners]
        self.ids = [torch.zeros(tokens, top_k, dtype=torch.int64, device=device) for _ in layers]
        self._steps, self._last_use = 0, [np.zeros(count, np.int64) for count in layers]
        self._usage = [torch.zeros(count, dtype=torch.int32, device=device) for count in layers]
        for number, module in enumerate(experts_modules(model).values()):
            setattr(module, RUNNER, _ScriptedLayer(self, runtime.runners[number]))
        for runner, following in zip(runtime.runners, [*runtime.runners[1:], runtime.runners[0]], strict=True):
            if runner.prefetcher is not None and runtime.predictor is not None:
                predictor = _ScriptedPredictor(runtime.predictor, self)
                runner.prefetch_by(Prefetcher(runner.index, following.prefetch_target, predictor))

    def next_step(self) -> None:
        """Choose the experts of a step."""
        if not self.active:
            self._forget_predictions()
        self.active = True
        self._steps += 1
        for number, runner in enumerate(self._runtime.runners):
            chosen = self._choose(runner, self.ids[number].shape)
            _write(self._gpu, self.ids[number], chosen)
            self._last_use[number][chosen] = self._steps
        following = [*self.ids[1:], self.ids[0]]  # the last layer predicts the first of a step to come
        for usage, ids in zip(self._usage, following, strict=True):
            _write(self._gpu, usage, self._predict(ids, len(usage)))

    def _forget_predictions(self) -> None:
        """The random model's own predictions, of its prompt, say nothing about the script's."""
        for runner in self._runtime.runners:
            runner.planner.prefetch_policy.set_verdict(PrefetchVerdict(active=True, predicted=0, used=0))

    def _choose(self, runner: MoELayer, shape: Sequence[int]) -> IntArray:
        resident_E = self._resident(runner)
        recent, missing = np.flatnonzero(resident_E), np.flatnonzero(~resident_E)
        recent = recent[np.argsort(self._last_use[runner.index][recent])[int(len(recent) * _MAY_BE_EVICTED) :]]
        tokens, top_k = shape
        found = []
        for _ in range(tokens):
            misses = self._misses(top_k, len(missing))
            hits = min(top_k - misses, len(recent))
            chosen = [self._random.choice(recent, hits, replace=False), self._random.choice(missing, misses, replace=False)]
            others = np.setdiff1d(np.arange(runner.cache.num_experts), np.concatenate(chosen))
            found.append(np.concatenate([*chosen, others[: top_k - hits - misses]]))
        return np.array(found, np.int64)

    def _misses(self, top_k: int, most: int) -> int:
        """Misses of one token in a layer: by chance, and yet soon the given share of all, so that few steps suffice."""
        self._owed += top_k * (1 - self.hit_rate)
        misses = min(max(0, int(np.floor(self._owed + self._random.random()))), top_k, most)
        self._owed -= misses
        return misses

    def _resident(self, runner: MoELayer) -> BoolArray:
        """The experts in a slot of any rank, or on their way. By the host's table, or by the device's where that decides."""
        if not runner.planner.alone:
            held_E: BoolArray = np.any(runner.planner.state.holds_RE, axis=0)
            return held_E
        if not runner.slots_are_lent:
            return runner.cache.resident_E
        pool, layer = self._runtime.place_of(runner.index)
        return _read(self._gpu, pool.slot_of_device[layer])[: runner.cache.num_experts] >= 0

    def _predict(self, ids: torch.Tensor, experts: int) -> NDArray[np.int32]:
        true = np.unique(_read(self._gpu, ids))
        kept = self._random.random(len(true)) < self._recall
        others = np.setdiff1d(np.arange(experts), true)
        wrong = self._random.choice(others, min(int((~kept).sum()), len(others)), replace=False)
        usage = np.zeros(experts, np.int32)
        for predicted, shares in ((true[kept], _OF_USED), (wrong, _OF_UNUSED)):
            usage[predicted] = self._random.choice(_SURENESS, len(predicted), p=shares)
        return usage

    def usage_after(self, layer: int) -> torch.Tensor:
        """How likely the next layer uses each expert, by the script."""
        return self._usage[layer]


class _ScriptedLayer:
    """A layer's runner, given the script's experts."""

    def __init__(self, script: ScriptedRouting, runner: MoELayer) -> None:
        self._script, self._runner = script, runner

    def __call__(self, hidden_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        ids = self._script.ids[self._runner.index]
        scripted = self._script.active and index_TK.shape == ids.shape
        return self._runner(hidden_TH, ids if scripted else index_TK, weights_TK)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)


class _ScriptedPredictor:
    """A predictor that computes as ever, and then tells what the script has."""

    def __init__(self, predictor: UsagePredictor, script: ScriptedRouting) -> None:
        self._predictor, self._script = predictor, script

    def usage(self, layer: int, hidden_TH: torch.Tensor, index_TK: torch.Tensor) -> torch.Tensor | None:
        found = self._predictor.usage(layer, hidden_TH, index_TK)
        return self._script.usage_after(layer) if self._script.active and found is not None else found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._predictor, name)


def _write(gpu: SimulatedMachine, tensor: torch.Tensor, values: NDArray[Any]) -> None:
    """Change a tensor's memory from outside of the simulation: no copy, and no time."""
    with gpu.computing_kernel():
        memory_of(tensor).copy_(torch.from_numpy(values))


def _read(gpu: SimulatedMachine, tensor: torch.Tensor) -> IntArray:
    with gpu.computing_kernel():
        found: IntArray = memory_of(tensor).numpy().copy()
    return found
