"""Captured decoding: a batcher's decoding steps as CUDA graphs, for each padded size, replayed from the 3rd step on.

A forward pass launches some thousand small kernels. A captured one (``step_graphs.py``) has them launched at once: whole,
where the device can decide about slots (``captured_whole.py``); else in pieces around the MoE layers
(``captured_pieces.py``): in a group, and where ``device_obstacle`` has a reason. Choosing tokens, delivering and stopping
stay the batcher's.

Only on CUDA, and while all running requests decode. A step takes the usual path where its rows could need more experts than
a layer has slots (*crowded*; not in pieces), where it would read more positions than graphs have memory for (*ragged*), while
routes are observed, and after a capture ran out of memory (``capture_pause.py``); so do all where ``obstacle`` is set.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Generic

import torch
from transformers import PreTrainedModel

from epslots.config import EngineConfig
from epslots.cuda_graph.lent_slots import device_obstacle, most_rows
from epslots.generation.capture_pause import CapturePause
from epslots.generation.captured_pieces import PiecewiseSteps
from epslots.generation.captured_whole import WholeSteps
from epslots.generation.engine_stats import EngineCounters
from epslots.generation.step_graphs import Call, CaptureError, CapturingWay, GraphMemory, Step, StepGraphs
from epslots.models.captured_sizes import CapturedSizes
from epslots.runtime import plan_of, runtime_of

logger = logging.getLogger(__name__)

# By the model type of the text model: some of its layers ask the host for values in each step.
_ASKS_THE_HOST = {"qwen4_exp_text"}


def model_obstacle(model: PreTrainedModel, of_cache: str | None) -> str | None:
    """The part of ``CapturedDecoding.obstacle`` that is true of a model on any GPU; memory plans ask it, too.

    Args:
        model: may be on the meta device.
        of_cache: the obstacle in the cache that serves the model; None = none.
    """
    asks = model.config.get_text_config().model_type in _ASKS_THE_HOST
    return of_cache or ("some of its layers ask the host for values" if asks else None)


class CapturedDecoding(Generic[Step]):
    """The decoding steps of one batcher.

    Args:
        call: runs the model.
        config: of the engine.
        of_cache: why steps on the cache that serves the model can't be captured; None if they can.

    Attributes:
        obstacle: why nothing is captured, as a sentence's end; None if nothing is known to be in the way. Found at the start,
            or by a capture that failed for another reason than memory.
        whole_obstacle: why steps are captured in pieces and not whole; None if they are captured whole, or none was yet.
    """

    def __init__(self, model: PreTrainedModel, call: Call, config: EngineConfig, of_cache: str | None) -> None:
        self._model, self._call = model, call
        self._requests = config.max_requests
        self._sizes = CapturedSizes(config.max_requests, config.planned_tokens)
        self._way: CapturingWay | None = None
        self._memory = GraphMemory(model.device)
        self._graphs: dict[Hashable, StepGraphs[Step]] = {}
        self._latest: StepGraphs[Step] | None = None
        self.obstacle = self._first_obstacle(of_cache) if config.capture else "it was asked for"
        self.whole_obstacle: str | None = None
        self._present_obstacle = self._few_slots() if self.obstacle is None else None
        self._pause = CapturePause()
        self.replays = self._crowded = self._ragged = 0

    @property
    def reason(self) -> str | None:
        """Why steps aren't captured, as a sentence's end; None if they may be.

        Besides ``obstacle``, the state when a step was last asked for: a layer has too few slots, or a capture ran out of
        memory.
        """
        return self.obstacle or self._present_obstacle or self._pause.reason

    def _first_obstacle(self, of_cache: str | None) -> str | None:
        model = self._model
        if model.device.type != "cuda":
            return f"the model is on {model.device}"
        found = "epslots.load didn't return it" if plan_of(model) is None else model_obstacle(model, of_cache)
        if found is not None:
            logger.warning("%s decodes uncaptured: %s", type(model).__name__, found)
        return found

    def takes(self, rows: int, longest: int | None) -> bool:
        """Whether the next step can be made here; where its size is in the way, that is counted.

        Args:
            rows: requests, each of which has one new token.
            longest: positions that the longest of them reads; None = too many for them to be read by rows.
        """
        if self.obstacle is not None or any(runner.observed for runner in runtime_of(self._model).runners):
            return False
        if self._way is None or not self._way.taken:
            self._open()
        if self._way is None:
            return False
        crowded = rows > self._sizes.rows
        ragged = not crowded and (longest is None or not self._sizes.serves(rows, longest))
        self._crowded += crowded
        self._ragged += ragged
        return not crowded and not ragged

    def count_in(self, counters: EngineCounters) -> None:
        """Bring an engine's counters of captured steps up to date."""
        counters.replayed_steps = self.replays
        counters.crowded_steps, counters.ragged_steps = self._crowded, self._ragged
        counters.graph_bytes, counters.failed_captures = self._memory.nbytes, self._pause.failures

    def _few_slots(self) -> str | None:
        """Why the device can't decide about one token's experts, though it decides; None if it can, or the host decides."""
        runtime = runtime_of(self._model)
        return None if device_obstacle(runtime, 0) is not None else device_obstacle(runtime, runtime.plan.shape.top_k)

    def _open(self) -> None:
        """Choose the way by the layers' slots as they are now: layers may have moved some, and a group may have formed."""
        if (few := self._few_slots()) is not None:
            if few != self._present_obstacle:
                logger.warning("%s decodes uncaptured for now: %s", type(self._model).__name__, few)
            self._present_obstacle, self._way = few, None
            return
        runtime, most = runtime_of(self._model), self._requests
        if (found := device_obstacle(runtime, 0)) is None:
            # Slots that have moved may serve more rows than planned: the memory plan counted the graphs of those.
            limits = (most_rows(runtime), runtime.plan.served_tokens)
            most = min([most, *(limit for limit in limits if limit is not None)])
        elif found != self.whole_obstacle:
            logger.info("%s decodes by CUDA graphs in pieces: %s", type(self._model).__name__, found)
        if self._way is None or most != self._sizes.rows or (found is None) != (self.whole_obstacle is None):
            pairs = max(most, 1) * runtime.plan.shape.top_k
            whole = found is None
            self._way = WholeSteps(runtime, pairs, self._requests) if whole else PiecewiseSteps(self._model, self._requests)
            self._sizes = replace(self._sizes, rows=most)
            self._free_graphs()
        self._present_obstacle, self.whole_obstacle = None, found

    def padded(self, rows: int) -> int:
        """Requests of the graph that serves so many, B."""
        return self._sizes.padded(rows)

    def logits(self, size: Hashable, make: Callable[[], Step], begin: Callable[[Step], None]) -> torch.Tensor | None:
        """The logits after one new token of each request; overwritten by the next step. Its states aren't kept yet.

        Args:
            size: of the step: one graph serves all steps of a size.
            make: makes the first one.
            begin: sets its requests and their new tokens.

        Returns:
            ``Call``'s, those of repeated requests at the end; None if the step can't be captured: it has to be made in the
            usual way.
        """
        way = self._way
        assert way is not None, "takes() comes first"
        with way.lock:
            if not self._captured(size) and not self._pause.passes():
                self.give_back()
                return None
            if way.take():
                self._free_graphs()
            try:
                graphs = self._latest = self._graphs_of(size, make, way)
                begin(graphs.step)
                return self._run(graphs)
            except CaptureError as error:
                self._fail(error)
                self.give_back()
                return None

    def _captured(self, size: Hashable) -> bool:
        return size in self._graphs and self._graphs[size].captured

    def _graphs_of(self, size: Hashable, make: Callable[[], Step], way: CapturingWay) -> StepGraphs[Step]:
        if size not in self._graphs:
            try:
                self._graphs[size] = way.graphs(make(), self._call, self._memory)
            except torch.OutOfMemoryError as error:
                raise CaptureError(f"a decoding step has no memory for its numbers ({error})") from error
        return self._graphs[size]

    def _run(self, graphs: StepGraphs[Step]) -> torch.Tensor:
        before = graphs.captured
        logits = graphs.run()
        self.replays += before
        if graphs.captured and not before:
            self._pause.reset()
        if graphs.failure is not None:
            self._fail(graphs.failure)
        return logits

    def _fail(self, error: CaptureError) -> None:
        """Capture nothing for some steps if memory was short, and else never again."""
        again = ""
        if error.memory_was_short:
            self._pause.begin()
            again = " for now"
        else:
            self.obstacle = str(error)
        logger.warning("%s decodes uncaptured%s: %s", type(self._model).__name__, again, error)
        if not any(graphs.captured for graphs in self._graphs.values()):
            self._memory.end_pool()

    def keep_states(self) -> None:
        """Keep the states of the step that was made last."""
        assert self._latest is not None
        self._latest.keep_states()

    def give_back(self) -> None:
        """Let the host's plans decide about slots again, for a step of the usual kind; a no-op if they do."""
        if self._way is not None:
            self._way.give_back()

    def close(self) -> None:
        """Free the graphs, and give the slots back."""
        self.give_back()
        self._free_graphs()

    def _free_graphs(self) -> None:
        """The next ones share other memory."""
        self._graphs.clear()
        self._latest = None
        self._memory.clear()
        self._pause.end()
