"""A model's slots while the device decides about them, instead of the host's plans.

An engine takes them for a row of captured steps (``generation/captured_whole.py``), and gives them back before any other
step. ``device_slots.py`` has the decision itself.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from epslots.cache.expert_loader import ExpertLoader
from epslots.cuda_graph.device_experts import DeviceExperts, PrefetchAhead
from epslots.cuda_graph.device_slots import (
    DEFAULT_DEVICE_POLICY,
    DEVICE_POLICIES,
    UNBOUNDED,
    DeviceSlots,
    Kernels,
    slots_obstacle,
)
from epslots.cuda_graph.missed_steps import MissedSteps
from epslots.cuda_graph.side_stream import SideStream
from epslots.cuda_graph.torch_kernels import TorchKernels
from epslots.errors import ConfigError
from epslots.models.quotas import served_tokens
from epslots.moe.moe_layer import MoELayer
from epslots.planner.cache_policy import Policy, own_name, policy_name
from epslots.runtime import Runtime


def device_obstacle(runtime: Runtime, pairs: int) -> str | None:
    """Why the device can't decide about some slots, as a sentence's end; None if it can about all.

    Args:
        pairs: the most (token, k) pairs of a step.
    """
    if any(runner.prefetcher is not None and runner.prefetcher.approximate for runner in runtime.runners):
        return "predicted experts are executed"
    if any(runner.experts.kernel.batch_invariant for runner in runtime.runners):
        return "batch-invariant products are laid out on the host"
    if any(runner.experts.kernel.waits_for_host for runner in runtime.runners):
        return "grouped products wait for the host: torch has no kernel for this GPU and dtype, and triton isn't installed"
    if own_name(_policy_of(runtime)) is None and len(runtime.complete_layers()) < len(runtime.layers):
        return f"policy={policy_name(_policy_of(runtime))} is a function of the host; allowed: {', '.join(DEVICE_POLICIES)}"
    return next((why for loader in runtime.loaders if (why := slots_obstacle(loader, pairs)) is not None), None)


def _policy_of(runtime: Runtime) -> Policy:
    """The eviction policy of the model: all layers have one."""
    return runtime.runners[0].policy


def most_rows(runtime: Runtime) -> int | None:
    """Tokens of a step that can't need more experts than any layer has slots; None = any number."""
    pools = [loader.pool for loader in runtime.loaders]
    layers, quotas = [each for pool in pools for each in pool.layers], [each for pool in pools for each in pool.quotas]
    return served_tokens(layers, quotas, runtime.plan.shape.top_k)


def kernels_for(loader: ExpertLoader) -> Kernels:
    """The kernels that decide about a pool's slots on its device."""
    if loader.pool.device.type == "cpu":
        return TorchKernels(loader)
    from epslots.cuda_graph.triton_kernels import TritonKernels  # optional, and used only on GPUs

    return TritonKernels(loader)


class LentSlots:
    """All slots of a model, taken from the host's plans and given back to them.

    While they are taken, the device prefetches, too: for each layer but the first, which the last one would predict for the
    next step. Readers of the model's statistics have the slots given back first.

    Args:
        pairs: the most (token, k) pairs of a step. There must be no ``device_obstacle`` to them.
        policy: the eviction policy on the device; None = the model's. No output depends on it.

    Attributes:
        taken: whether the device decides.
        lock: held by a thread from ``take`` to the end of its step, and by one that gives the slots back.
    """

    def __init__(self, runtime: Runtime, pairs: int, *, policy: str | None = None) -> None:
        self._runtime, self._pairs = runtime, pairs
        self._policy = policy or own_name(_policy_of(runtime)) or DEFAULT_DEVICE_POLICY
        self.taken = False
        self.lock = threading.RLock()
        self._layouts: list[int] = []
        self._slots: list[DeviceSlots | None] = []
        self._experts: list[DeviceExperts] = []
        self._missed_steps: MissedSteps | None = None
        self._replays = 0
        device = runtime.telemetry.device
        self._real = torch.full((1,), pairs, dtype=torch.int64, device=device)
        self._budget = runtime.prefetch_config.bytes_per_step
        self._left = torch.full((1,), UNBOUNDED, dtype=torch.int64, device=device)
        self._beside = SideStream(device)
        self._prefetches = False

    def take(self) -> bool:
        """Let the device decide from now on; a no-op if it does.

        Returns:
            Whether the layers' ranges have changed since the last time, also to and fro, or were unknown: captured steps are
            then void.

        Raises:
            ConfigError: another engine has taken them.
        """
        if self.taken:
            return False
        runners, loaders = self._runtime.runners, self._runtime.loaders
        if any(runner.slots_are_lent for runner in runners):
            raise ConfigError("another engine decodes with this model's slots; end its requests before")
        layouts = [loader.pool.layouts for loader in loaders]
        changed = layouts != self._layouts
        if changed:
            self._layouts = layouts
            self._build()
        for slots, loader in zip(self._slots, loaders, strict=True):
            if slots is not None:
                layers = [runners[index] for index in loader.store_layers]
                verdicts = [layer.planner.prefetch_policy.verdict for layer in layers]
                slots.enter([layer.history for layer in layers], [layer.steps for layer in layers], verdicts)
        for runner, experts in zip(runners, self._experts, strict=True):
            runner.lend_slots(experts)
        self._runtime.telemetry.collect_by(self.give_back)
        self.taken = True
        return changed

    def _build(self) -> None:
        """Make the device's state, and a ``DeviceExperts`` for each layer, for the layers' present slots."""
        self._slots = []
        places: dict[int, tuple[DeviceSlots | None, int]] = {}
        for loader in self._runtime.loaders:
            pool = loader.pool
            misses = [layer for layer in range(len(pool.layers)) if not pool.holds_all_of(layer)]
            slots = None
            if misses:
                slots = DeviceSlots(loader, kernels_for(loader), self._pairs, policy=self._policy, left=self._left)
            self._slots.append(slots)
            for layer, index in enumerate(loader.store_layers):
                places[index] = slots if layer in misses else None, layer
        self._experts = []
        before: PrefetchAhead | None = None
        for index, runner in enumerate(self._runtime.runners):
            ahead = self._ahead(runner, *places.get(index + 1, (None, 0)))
            shared = self._real, self._beside
            self._experts.append(DeviceExperts(runner.experts, *places[index], *shared, before=before, ahead=ahead))
            before = ahead
        self._prefetches = any(experts.prefetches for experts in self._experts)
        counters = [slots.misses_L for slots in self._slots if slots is not None]
        self._missed_steps = MissedSteps(counters) if counters else None

    def _ahead(self, runner: MoELayer, slots: DeviceSlots | None, layer: int) -> PrefetchAhead | None:
        """The prefetches from one layer for the next; None where that never misses, or isn't predicted."""
        if slots is None or runner.prefetcher is None or not runner.prefetcher.fetches:
            return None
        return PrefetchAhead(runner.prefetcher, slots, layer, self._beside)

    @contextmanager
    def step(self, count_1: torch.Tensor, row_T: torch.Tensor, rows: int) -> Iterator[None]:
        """Within the context, the model makes a step; may be captured.

        Args:
            count_1: int64 [1] on the device, tokens that count: others repeat them.
            row_T: int64, the place of each token's row among ``rows``, where the predictor keeps it.
        """
        torch.mul(count_1, self._runtime.plan.shape.top_k, out=self._real)
        predictor = self._runtime.predictor if self._prefetches else None
        if self._budget is not None:
            self._left.fill_(self._budget)
        if predictor is not None:
            predictor.keep_rows_at(row_T, rows)
        try:
            yield
        finally:
            if predictor is not None:
                predictor.keep_rows_at(None)
        if self._prefetches:
            self._beside.join()
        if self._missed_steps is not None:
            self._missed_steps.end_step()

    def count_replay(self) -> None:
        """Count a step that went through no Python."""
        self._replays += 1

    def give_back(self) -> None:
        """Let the host's plans decide again, by tables and histories as the device leaves them; a no-op if they do.

        Synchronises with the device.
        """
        with self.lock:
            if self.taken:
                self._give_back()

    def _give_back(self) -> None:
        self.taken = False
        self._beside.join()  # a step may have broken off
        runners, telemetry = self._runtime.runners, self._runtime.telemetry
        telemetry.collect_by(None)
        for runner in runners:
            runner.take_slots_back()
        replays, self._replays = self._replays, 0
        missed = 0 if self._missed_steps is None else self._missed_steps.take()
        telemetry.count_steps(steps=replays, missed=missed)
        for runner, experts in zip(runners, self._experts, strict=True):
            if experts.calls:
                telemetry.count(runner.index, steps=replays, passes=replays)
        for slots, loader in zip(self._slots, self._runtime.loaders, strict=True):
            if slots is not None:
                self._hand_back(slots, loader, [runners[index] for index in loader.store_layers])

    def _hand_back(self, slots: DeviceSlots, loader: ExpertLoader, layers: list[MoELayer]) -> None:
        """Copy the histories and counters of a pool's layers from the device."""
        telemetry = self._runtime.telemetry
        for layer, step, tally, verdict in zip(layers, *slots.leave([layer.history for layer in layers]), strict=True):
            if not tally.steps:
                continue
            layer.continue_from(step)
            layer.planner.prefetch_policy.set_verdict(verdict)
            # While a graph replays, every use counts as a hit.
            telemetry.count(layer.index, hits=-tally.misses, misses=tally.misses, prefetches=tally.prefetches)
            fetched = (tally.misses + tally.prefetches) * loader.pool.layout.nbytes
            telemetry.count(layer.index, host_bytes=fetched, evictions=tally.evictions)
