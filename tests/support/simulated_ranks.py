"""Ranks on simulated GPUs in threads of this process, joined by the stand-in for NCCL."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from epslots.generation.engine import Engine
from epslots.generation.requests import Request
from epslots.group.join import join
from epslots.simulated_gpu.nccl_group import NcclHub, SimulatedNcclGroup, simulated_dist
from epslots.transport import nccl, torch_transport
from epslots.transport.torch_transport import TorchTransport
from tests.support.rank_helpers import PATIENCE_S, run_threads
from tests.support.simulated import load_gpu


@contextmanager
def nccl_stand_in() -> Iterator[None]:
    """Within the context, ``torch_transport`` works on fake groups, and NCCL's variables are as epslots sets them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in nccl.ENVIRONMENT:
            patch.setenv(name, "another")
        nccl.set_environment()
        patch.setattr(torch_transport, "dist", simulated_dist(dist))
        yield


def on_ranks(hub: NcclHub, work: Callable[[TorchTransport], Any], deadline_s: float = PATIENCE_S) -> list[Any]:
    """The results of ``work`` on each rank, a thread with a GPU of its own."""

    def one(local: Any) -> Any:
        device = torch.device("cuda", local.rank)
        torch.cuda.set_device(device)
        transport = TorchTransport(SimulatedNcclGroup(hub, local.rank, device), device=device, deadline_s=deadline_s)  # type: ignore[arg-type]
        return work(transport)

    return run_threads(one, hub.size)


class SimulatedRanks:
    """Ranks that are one model, each with an engine.

    Attributes:
        logprobs: of the tokens that ``serve`` returned, for requests that ask for them.

    Args:
        costs: of ``join``.
        engine: settings of ``Engine``.
        settings: of ``load``.
    """

    def __init__(
        self, folder: Path, store_dir: Path, *, ranks: int = 2, costs: Any, engine: dict[str, Any], **settings: Any
    ) -> None:
        self.models = [load_gpu(folder, store_dir, device=f"cuda:{rank}", **settings) for rank in range(ranks)]
        self._costs, self._engine = costs, {"kv_tokens": 512} | engine
        self.hub = NcclHub(ranks)
        self.engines: list[Engine] = []
        self.logprobs: dict[str, list[float]] = {}

    def join(self, transport: TorchTransport) -> None:
        """Make this rank's model one with the others'."""
        join(self.models[transport.rank], transport, settings={}, costs=self._costs)

    def open(self, model: PreTrainedModel) -> Engine:
        """An engine for a rank's model."""
        return Engine(model, **self._engine)

    def serve(self, requests: Sequence[Sequence[Request]]) -> dict[str, list[int]]:
        """The tokens of each rank's requests; the engines stay open."""

        def work(transport: TorchTransport) -> tuple[Engine, dict[str, list[int]]]:
            self.join(transport)
            engine = self.open(self.models[transport.rank])
            return engine, run_engine(engine, requests[transport.rank], self.logprobs)

        found = on_ranks(self.hub, work)
        self.engines = [engine for engine, _ in found]
        return {id: tokens for _, of_rank in found for id, tokens in of_rank.items()}

    def open_all(self, steps: int, *requests: Request) -> None:
        """Join, open an engine on each rank with the request of its number, and make so many steps together."""

        def work(transport: TorchTransport) -> Engine:
            self.join(transport)
            engine = self.open(self.models[transport.rank])
            engine.batcher.add(requests[transport.rank])
            for _ in range(steps):
                engine.step()
            return engine

        self.engines = on_ranks(self.hub, work)

    def run(self, work: Callable[[Engine], Any]) -> list[Any]:
        """The results of ``work`` with each rank's engine, in threads."""

        def one(local: Any) -> Any:
            torch.cuda.set_device(self.models[local.rank].device)
            return work(self.engines[local.rank])

        return run_threads(one, len(self.engines))

    def close(self) -> None:
        """Close the engines."""
        for engine in self.engines:
            engine.batcher.close()


def run_engine(
    engine: Engine, requests: Sequence[Request], logprobs: dict[str, list[float]] | None = None
) -> dict[str, list[int]]:
    """The tokens of a rank's requests, while the group has work; their log-probabilities are entered."""
    tokens: dict[str, list[int]] = {}
    for request in requests:
        engine.batcher.add(request)
    for output in engine.run():
        assert output.error is None
        tokens.setdefault(output.id, []).extend(output.tokens)
        if logprobs is not None:
            logprobs.setdefault(output.id, []).extend(one.logprob for one in output.logprobs)
    return tokens
