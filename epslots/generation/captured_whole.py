"""Decoding steps that are captured whole: one CUDA graph a step, within which the device decides about slots.

The host waits for nothing in a step, and launches it by one call. For one rank whose slots ``cuda_graph/lent_slots.py`` may
take; decisions and copies within the graph are an idea of FreeToken's.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

from epslots.cuda_graph.lent_slots import LentSlots
from epslots.generation.step_graphs import Call, GraphMemory, Step, StepGraphs
from epslots.runtime import Runtime


class WholeStep(StepGraphs[Step]):
    """The steps of one size, each one graph."""

    def __init__(self, step: Step, call: Call, memory: GraphMemory, requests: int, lent: LentSlots) -> None:
        super().__init__(step, call, memory, requests)
        self._lent = lent
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: torch.Tensor | None = None

    @property
    def captured(self) -> bool:
        return self._graph is not None

    def run(self) -> torch.Tensor:
        if not self._warm:
            self._warm = True
            return self._forward()
        if self._graph is None:
            self._capture()
        else:
            self._lent.count_replay()
        assert self._graph is not None and self._logits is not None
        self._graph.replay()
        return self._logits

    @torch.no_grad()
    def _forward(self) -> torch.Tensor:
        step = self.step
        with self._lent.step(step.count_1, step.row_B, self._requests), step.inputs() as inputs:
            return self._call(inputs)

    def _capture(self) -> None:
        with self._memory.taken_by_a_step():
            graph = torch.cuda.CUDAGraph()
            with self._memory.capturing(graph):
                logits = self._forward()
            states = self._capture_states()
        self._graph, self._states, self._logits = graph, states, logits


class WholeSteps:
    """The way of ``WholeStep``.

    Args:
        pairs: the most (token, k) pairs of a step; no ``device_obstacle`` is in their way.
        requests: the most that run.
    """

    def __init__(self, runtime: Runtime, pairs: int, requests: int) -> None:
        self._lent, self._requests = LentSlots(runtime, pairs), requests

    @property
    def taken(self) -> bool:
        return self._lent.taken

    @property
    def lock(self) -> AbstractContextManager[Any]:
        return self._lent.lock

    def take(self) -> bool:
        return self._lent.take()

    def give_back(self) -> None:
        self._lent.give_back()

    def graphs(self, step: Step, call: Call, memory: GraphMemory) -> WholeStep[Step]:
        return WholeStep(step, call, memory, self._requests, self._lent)
