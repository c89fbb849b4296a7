"""Captured decoding: a batcher's decoding steps as CUDA graphs, one for each padded size, replayed by one call.

A forward pass launches some thousand small kernels, and waits for the host once a layer where experts may be missing. A
captured one reads and writes tensors that stay in place (``static_step.py``, ``static_pages.py``), and lets the device decide
about slots (``cuda_graph/lent_slots.py``). The 1st step of a size runs uncaptured, which compiles kernels; the 2nd is captured
and replayed, like all later ones. Choosing tokens, delivering and stopping stay the batcher's, after the replay.

Only for one rank on CUDA, and while every running request decodes: prompts have no fixed shape. A step takes the usual path
where its rows could need more experts than a layer has slots (*crowded*), where it would read more positions than graphs have
memory for (*ragged*), while routes are observed, and for some time after a capture ran out of memory (``capture_pause.py``);
so do all steps where ``CapturedDecoding.obstacle`` is set.
Capturing follows PyTorch's notes on CUDA graphs; decisions and copies within the graph are an idea of FreeToken's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, Generic, Protocol, TypeVar

import torch
from transformers import PreTrainedModel

from epslots.config import EngineConfig
from epslots.cuda_graph.lent_slots import LentSlots, device_obstacle, most_rows
from epslots.generation.capture_pause import CapturePause
from epslots.generation.engine_stats import EngineCounters
from epslots.models.captured_sizes import CapturedSizes
from epslots.runtime import plan_of, runtime_of

logger = logging.getLogger(__name__)

# By the model type of the text model: some of its layers ask the host for values in each step.
_ASKS_THE_HOST = {"qwen4_exp_text"}

Call = Callable[[Mapping[str, Any]], torch.Tensor]
"""Calls the model by its inputs' names; returns the last tokens' logits, [B, 1, V] or [1, B, V]."""


class DecodingStep(Protocol):
    """One new token for each of B requests, from tensors that stay in place.

    Attributes:
        count_1: int64 [1], requests that are no repetition.
        row_B: int64 [B], a place for each request, the same in all steps: from 0, below the most requests.
        new_states: what the step leaves to be kept by ``keep_states``; empty if it keeps all by itself.
    """

    @property
    def count_1(self) -> torch.Tensor: ...
    @property
    def row_B(self) -> torch.Tensor: ...
    @property
    def new_states(self) -> list[Any]: ...

    def inputs(self) -> AbstractContextManager[Mapping[str, Any]]:
        """The model's arguments, by its own names; to be captured together with the call."""
        ...

    def keep_states(self) -> None:
        """Make the new states those of the requests; may be captured."""
        ...


Step = TypeVar("Step", bound=DecodingStep)


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
    """

    def __init__(self, model: PreTrainedModel, call: Call, config: EngineConfig, of_cache: str | None) -> None:
        self._model, self._call = model, call
        self._requests = config.max_requests
        self._sizes = CapturedSizes(config.max_requests, config.planned_tokens)
        self._lent: LentSlots | None = None
        self._graphs: dict[Hashable, _Graph[Step]] = {}
        self._latest: _Graph[Step] | None = None
        self._pool: Any = None
        self.obstacle = self._first_obstacle(of_cache) if config.capture else "it was asked for"
        self._present_obstacle: str | None = None
        self._pause = CapturePause()
        self.replays = self._crowded = self._ragged = self._graph_bytes = 0

    @property
    def reason(self) -> str | None:
        """Why steps aren't captured, as a sentence's end; None if they may be.

        Besides ``obstacle``, the state when a step was last asked for: layers have moved slots, a group has formed, or a
        capture ran out of memory.
        """
        return self.obstacle or self._present_obstacle or self._pause.reason

    def _first_obstacle(self, of_cache: str | None) -> str | None:
        model = self._model
        if model.device.type != "cuda":
            return f"the model is on {model.device}"
        if plan_of(model) is None:
            found: str | None = "epslots.load didn't return it"
        elif (found := model_obstacle(model, of_cache)) is None:
            found = device_obstacle(runtime_of(model), runtime_of(model).plan.shape.top_k)
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
        if self._lent is None or not self._lent.taken:
            self._open()
        if self._lent is None:
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
        counters.graph_bytes, counters.failed_captures = self._graph_bytes, self._pause.failures

    def _open(self) -> None:
        """Look at the layers' slots as they are now: layers may have moved some, and a group may have formed."""
        runtime = runtime_of(self._model)
        # Slots that have moved may serve more rows than planned: the memory plan counted the graphs of those.
        limits = (most_rows(runtime), runtime.plan.served_tokens)
        most = min([self._requests, *(limit for limit in limits if limit is not None)])
        pairs = max(most, 1) * runtime.plan.shape.top_k
        self._note(device_obstacle(runtime, pairs))
        if self._present_obstacle is not None:
            self._lent = None
        elif self._lent is None or most != self._sizes.rows:
            self._lent, self._sizes = LentSlots(runtime, pairs), replace(self._sizes, rows=most)
            self._free_graphs()

    def _note(self, obstacle: str | None) -> None:
        if obstacle is not None and obstacle != self._present_obstacle:
            logger.warning("%s decodes uncaptured for now: %s", type(self._model).__name__, obstacle)
        self._present_obstacle = obstacle

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
        assert self._lent is not None, "takes() comes first"
        with self._lent.lock:
            if not self._captured(size) and not self._pause.passes():
                self.give_back()
                return None
            if self._lent.take():
                self._free_graphs()
            try:
                graph = self._latest = self._graph(size, make)
                begin(graph.step)
                return graph.run()
            except _CaptureError as error:
                self._fail(error)
                self.give_back()
                return None

    def _captured(self, size: Hashable) -> bool:
        return size in self._graphs and self._graphs[size].captured

    def _graph(self, size: Hashable, make: Callable[[], Step]) -> _Graph[Step]:
        if size not in self._graphs:
            assert self._lent is not None
            try:
                self._graphs[size] = _Graph(self, make(), self._lent)
            except torch.OutOfMemoryError as error:
                raise _CaptureError(f"a decoding step has no memory for its numbers ({error})") from error
        return self._graphs[size]

    def _fail(self, error: _CaptureError) -> None:
        """Capture nothing for some steps if memory was short, and else never again."""
        again = ""
        if error.memory_was_short:
            self._pause.begin()
            again = " for now"
        else:
            self.obstacle = str(error)
        logger.warning("%s decodes uncaptured%s: %s", type(self._model).__name__, again, error)
        if not any(graph.captured for graph in self._graphs.values()):
            self._pool = None  # torch ends a pool with its last graph

    def keep_states(self) -> None:
        """Keep the states of the step that was made last."""
        assert self._latest is not None
        self._latest.keep_states()

    def give_back(self) -> None:
        """Let the host's plans decide about slots again, for a step of the usual kind; a no-op if they do."""
        if self._lent is not None:
            self._lent.give_back()

    def close(self) -> None:
        """Free the graphs, and give the slots back."""
        self.give_back()
        self._free_graphs()

    def _free_graphs(self) -> None:
        """The next ones share other memory: torch ends a pool with its last graph."""
        self._graphs.clear()
        self._latest = self._pool = None
        self._graph_bytes = 0
        self._pause.end()


class _CaptureError(Exception):
    """A step can't be captured."""

    @property
    def memory_was_short(self) -> bool:
        """Whether an allocation failed: the capture that it broke off may have raised a further error."""
        error: BaseException | None = self
        while error is not None and not isinstance(error, torch.OutOfMemoryError):
            error = error.__cause__ or error.__context__
        return error is not None


class _Graph(Generic[Step]):
    """The steps of one size."""

    def __init__(self, owner: CapturedDecoding[Step], step: Step, lent: LentSlots) -> None:
        self._owner, self.step, self._lent = owner, step, lent
        self._warm = False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._states: torch.cuda.CUDAGraph | None = None
        self._logits: torch.Tensor | None = None

    @property
    def captured(self) -> bool:
        """Whether ``run`` replays it."""
        return self._graph is not None

    def run(self) -> torch.Tensor:
        if not self._warm:
            self._warm = True
            return self._forward()
        if self._graph is None:
            self._capture()
        else:
            self._lent.count_replay()
            self._owner.replays += 1
        assert self._graph is not None and self._logits is not None
        self._graph.replay()
        return self._logits

    @torch.no_grad()
    def _forward(self) -> torch.Tensor:
        step = self.step
        with self._lent.step(step.count_1, step.row_B, self._owner._requests), step.inputs() as inputs:
            return self._owner._call(inputs)

    def _capture(self) -> None:
        """Capturing runs nothing: cache and slots stay unchanged."""
        graph_bytes = self._owner._graph_bytes
        try:
            whole, states = torch.cuda.CUDAGraph(), None
            with self._capturing(whole):
                logits = self._forward()
            if self.step.new_states:
                states = torch.cuda.CUDAGraph()
                with self._capturing(states):
                    self.step.keep_states()
        except RuntimeError as error:
            self._owner._graph_bytes = graph_bytes  # a graph that was whole is freed
            raise _CaptureError(f"a decoding step can't be captured ({error})") from error
        self._graph, self._states, self._logits = whole, states, logits
        self._owner._pause.reset()

    @contextmanager
    def _capturing(self, graph: torch.cuda.CUDAGraph) -> Iterator[None]:
        """All graphs share their memory: one is replayed at a time. Other threads may go on using the GPU."""
        owner = self._owner
        if owner._pool is None:
            owner._pool = torch.cuda.graph_pool_handle()
        with (
            torch.cuda.device(owner._model.device),
            torch.cuda.graph(graph, pool=owner._pool, capture_error_mode="thread_local"),
        ):
            before = torch.cuda.memory_reserved(owner._model.device)  # entering the capture has emptied the cache
            yield
            owner._graph_bytes += max(0, torch.cuda.memory_reserved(owner._model.device) - before)

    def keep_states(self) -> None:
        """Make the states of the step those of the requests."""
        if self._states is None:
            self.step.keep_states()
        else:
            self._states.replay()
