"""Decoding steps captured in pieces: a CUDA graph for all that is between two MoE layers, which run as ever.

For ranks of a group, and where else the host plans a layer's step. A captured pass calls no layer: each call ends a piece, and
the next one begins by reading the layer's result where it will be. So peers notice nothing of a capture, and it may fail;
ranks needn't agree about captures, since a replayed step's exchanges are those of all others. Layers are given the requests
without their repetitions, and the next piece repeats their results.

What a graph leaves for a layer is overwritten by the next replay. The layer has read it by then, on the same stream. Others
capture in pieces around attention: vLLM ("piecewise", its PR 10059) and SGLang ("breakable CUDA graphs", its PR 19102).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from transformers import PreTrainedModel

from epslots.generation.step_graphs import Call, CaptureError, DecodingStep, GraphMemory, Step, StepGraphs
from epslots.group.join import step_of_all_ranks
from epslots.models.layer_calls import Layer, calls_taken_by
from epslots.runtime import predictor_of


@dataclass(frozen=True, eq=False)
class _CapturedPiece:
    """A graph, and the layer after it.

    Attributes:
        hidden_BH, index_BK, weights_BK: the layer's arguments; the graph leaves them here.
        result_BH: where the next piece reads the layer's result.
    """

    graph: torch.cuda.CUDAGraph
    layer: Layer
    hidden_BH: torch.Tensor
    index_BK: torch.Tensor
    weights_BK: torch.Tensor
    result_BH: torch.Tensor

    def run(self, count: int) -> None:
        """Replay the graph, and make the layer's step with so many requests."""
        self.graph.replay()
        given = (tensor[:count] for tensor in (self.hidden_BH, self.index_BK, self.weights_BK))
        self.result_BH[:count].copy_(self.layer(*given))


class _Recorder:
    """Captures a pass of the model as pieces; within its context, ``take`` gets the calls of the layers.

    Attributes:
        pieces: those that end at a layer.
        rest: the graph after all layers; the running one until then.
    """

    def __init__(self, step: DecodingStep, memory: GraphMemory) -> None:
        self._step, self._memory = step, memory
        self._capture = ExitStack()
        self._picked_B: torch.Tensor | None = None
        self.pieces: list[_CapturedPiece] = []
        # By shape and dtype: the hidden states that a layer is given, and its result. Layers use them one after another, and
        # the model gets a copy: it may keep a result beyond the next layer.
        self._shared: dict[tuple[torch.Size, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = {}

    def __enter__(self) -> _Recorder:
        self._begin()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._capture.__exit__(kind, error, trace)

    def _begin(self) -> None:
        self.rest = torch.cuda.CUDAGraph()
        self._capture.enter_context(self._memory.capturing(self.rest))

    def take(self, layer: Layer, hidden_BH: torch.Tensor, index_BK: torch.Tensor, weights_BK: torch.Tensor) -> torch.Tensor:
        """End a piece at a call of a layer; returns what will be its result, within the next piece."""
        picked_B = self._picked()
        if len(hidden_BH) != len(picked_B):
            raise RuntimeError(f"an MoE layer is given {len(hidden_BH)} rows for {len(picked_B)} requests")
        if len(hidden_BH) == 1:  # a few KB a layer are worth two kernels
            given_BH, result_BH = hidden_BH, torch.empty_like(hidden_BH)
        else:
            given_BH, result_BH = self._shared_like(hidden_BH)
            given_BH.copy_(hidden_BH)
        self._capture.close()
        self.pieces.append(_CapturedPiece(self.rest, layer, given_BH, index_BK, weights_BK, result_BH))
        self._begin()
        return result_BH if given_BH is hidden_BH else result_BH.index_select(0, picked_B)

    def _picked(self) -> torch.Tensor:
        """The request that each place stands for, int64 [B]; found in the first piece."""
        if self._picked_B is None:
            row_B = self._step.row_B
            number_B = torch.arange(len(row_B), device=row_B.device)
            self._picked_B = torch.where(number_B < self._step.count_1, number_B, 0)
        return self._picked_B

    def _shared_like(self, hidden_BH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        key = hidden_BH.shape, hidden_BH.dtype
        if key not in self._shared:
            hidden, result = (torch.empty(key[0], dtype=key[1], device=hidden_BH.device) for _ in range(2))
            self._shared[key] = hidden, result
        return self._shared[key]


class PiecewiseStep(StepGraphs[Step]):
    """The steps of one size, in pieces."""

    def __init__(self, step: Step, call: Call, memory: GraphMemory, requests: int, model: PreTrainedModel) -> None:
        super().__init__(step, call, memory, requests)
        self._model = model
        self._recorded: tuple[list[_CapturedPiece], torch.cuda.CUDAGraph, torch.Tensor] | None = None

    @property
    def captured(self) -> bool:
        return self._recorded is not None

    @torch.no_grad()
    def run(self) -> torch.Tensor:
        # Once the step's header has come back from all ranks, the device waits for none: capturing waits for the device.
        with step_of_all_ranks(self._model):
            self.failure = None
            if self._warm and self._recorded is None:
                try:
                    self._capture()
                except CaptureError as error:
                    self.failure = error
            with self._rows_in_place():
                return self._forward() if self._recorded is None else self._replay(*self._recorded)

    def _replay(self, pieces: list[_CapturedPiece], rest: torch.cuda.CUDAGraph, logits: torch.Tensor) -> torch.Tensor:
        count = self.step.count
        for piece in pieces:
            piece.run(count)
        rest.replay()
        return logits

    def _forward(self) -> torch.Tensor:
        with self.step.inputs() as inputs, calls_taken_by(self._without_repetitions):
            logits = self._call(inputs)
        self._warm = True
        return logits

    def _without_repetitions(
        self, layer: Layer, hidden_BH: torch.Tensor, index_BK: torch.Tensor, weights_BK: torch.Tensor
    ) -> torch.Tensor:
        count = self.step.count
        result = layer(hidden_BH[:count], index_BK[:count], weights_BK[:count])
        return torch.cat([result, result[:1].expand(len(hidden_BH) - count, -1)])

    def _capture(self) -> None:
        with self._memory.taken_by_a_step():
            recorder = _Recorder(self.step, self._memory)
            with recorder, self.step.inputs() as inputs, calls_taken_by(recorder.take):
                logits = self._call(inputs)
            states = self._capture_states()
        self._recorded, self._states = (recorder.pieces, recorder.rest, logits), states

    @contextmanager
    def _rows_in_place(self) -> Iterator[None]:
        """Within the context, the predictor keeps each request's rows at its place."""
        predictor = predictor_of(self._model)
        if predictor is None:
            yield
            return
        predictor.keep_rows_at(self.step.row_B[: self.step.count], self._requests)
        try:
            yield
        finally:
            predictor.keep_rows_at(None)


class PiecewiseSteps:
    """The way of ``PiecewiseStep``.

    Args:
        requests: the most that run.
    """

    def __init__(self, model: PreTrainedModel, requests: int) -> None:
        self._model, self._requests = model, requests
        self.taken = False

    @property
    def lock(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def take(self) -> bool:
        self.taken = True
        return False

    def give_back(self) -> None:
        self.taken = False

    def graphs(self, step: Step, call: Call, memory: GraphMemory) -> PiecewiseStep[Step]:
        return PiecewiseStep(step, call, memory, self._requests, self._model)
