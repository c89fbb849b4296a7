"""``StepGraphs``: the CUDA graphs of decoding steps of one size, and what the two ways to capture them share.

A step is captured whole (``captured_whole.py``), or in pieces around its MoE layers (``captured_pieces.py``). Either way it
reads and writes tensors that stay in place (``static_step.py``, ``static_pages.py``). The 1st step of a size runs uncaptured,
which compiles kernels; the 2nd is captured and replayed, like all later ones. Capturing runs nothing: cache and slots stay
unchanged. It follows PyTorch's notes on CUDA graphs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Generic, Protocol, TypeVar

import torch

Call = Callable[[Mapping[str, Any]], torch.Tensor]
"""Calls the model by its inputs' names; returns the last tokens' logits, [B, 1, V] or [1, B, V]."""


class DecodingStep(Protocol):
    """One new token for each of B requests, from tensors that stay in place.

    Attributes:
        count: requests that are no repetition; they come first.
        count_1: the same on the device, int64 [1].
        row_B: int64 [B], a place for each request, the same in all steps: from 0, below the most requests.
        new_states: what the step leaves to be kept by ``keep_states``; empty if it keeps all by itself.
    """

    @property
    def count(self) -> int: ...
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


class CaptureError(Exception):
    """A step can't be captured."""

    @property
    def memory_was_short(self) -> bool:
        """Whether an allocation failed: the capture that it broke off may have raised a further error."""
        error: BaseException | None = self
        while error is not None and not isinstance(error, torch.OutOfMemoryError):
            error = error.__cause__ or error.__context__
        return error is not None


class GraphMemory:
    """The memory that an engine's graphs share: one of them is replayed at a time.

    Attributes:
        nbytes: device memory that their captures took.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None
        self.nbytes = 0

    @contextmanager
    def capturing(self, graph: torch.cuda.CUDAGraph) -> Iterator[None]:
        """Within the context, operations become those of a graph. Other threads may go on using the GPU."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        with (
            torch.cuda.device(self._device),
            torch.cuda.stream(torch.cuda.current_stream(self._device)),  # torch stays on its own if a capture's end fails
            torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
        ):
            before = torch.cuda.memory_reserved(self._device)  # entering the capture has emptied the cache
            yield
            self.nbytes += max(0, torch.cuda.memory_reserved(self._device) - before)

    @contextmanager
    def taken_by_a_step(self) -> Iterator[None]:
        """Within the context, all graphs of a step are captured; if one can't be, all of them are freed.

        Raises:
            CaptureError: one can't be.
        """
        before = self.nbytes
        try:
            yield
        except RuntimeError as error:
            self.nbytes = before
            raise CaptureError(f"a decoding step can't be captured ({error})") from error

    def end_pool(self) -> None:
        """No graph is left: torch ends a pool with its last graph. The next one begins another."""
        self._pool = None

    def clear(self) -> None:
        """All graphs have been freed."""
        self.end_pool()
        self.nbytes = 0


class StepGraphs(ABC, Generic[Step]):
    """The steps of one size.

    Args:
        requests: the most that run.

    Attributes:
        step: the tensors that stay in place.
        failure: why the latest step wasn't captured, though it was made; None if nothing failed.
    """

    def __init__(self, step: Step, call: Call, memory: GraphMemory, requests: int) -> None:
        self.step, self._call, self._memory, self._requests = step, call, memory, requests
        self._warm = False  # whether a step of this size has run uncaptured
        self.failure: CaptureError | None = None
        self._states: torch.cuda.CUDAGraph | None = None

    @property
    @abstractmethod
    def captured(self) -> bool:
        """Whether ``run`` replays."""

    @abstractmethod
    def run(self) -> torch.Tensor:
        """Make a step; returns the logits, which the next one overwrites.

        Raises:
            CaptureError: it can't be captured, and nothing was done.
        """

    def _capture_states(self) -> torch.cuda.CUDAGraph | None:
        """Capture ``keep_states``, if there is anything to keep."""
        if not self.step.new_states:
            return None
        graph = torch.cuda.CUDAGraph()
        with self._memory.capturing(graph):
            self.step.keep_states()
        return graph

    def keep_states(self) -> None:
        """Make the states of the step those of the requests."""
        if self._states is None:
            self.step.keep_states()
        else:
            self._states.replay()


class CapturingWay(Protocol):
    """One of the two ways to capture an engine's steps.

    Attributes:
        taken: whether steps are made in this way now.
        lock: held for a step.
    """

    @property
    def taken(self) -> bool: ...
    @property
    def lock(self) -> AbstractContextManager[Any]: ...

    def take(self) -> bool:
        """Make steps in this way from now on; a no-op if they are. Returns whether captured ones are void."""
        ...

    def give_back(self) -> None:
        """Make steps of the usual kind from now on; a no-op if they are."""
        ...

    def graphs(self, step: Any, call: Call, memory: GraphMemory) -> StepGraphs[Any]:
        """The graphs for the steps of one size."""
        ...
