"""A link that is as late as it may be, and predictions that are as wrong: a read that comes too early reads garbage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from epslots.cache.copy_engine import WriteSlot
from epslots.moe.prefetcher import Prefetcher
from epslots.runtime import Runtime
from epslots.transport.host_wait import HostWait


@dataclass
class Late:
    slot: torch.Tensor
    record: torch.Tensor
    write: WriteSlot


class LateLink:
    """Until it must have landed a slot holds nonsense, and what isn't waited for never comes."""

    concurrent = True

    def __init__(self) -> None:
        self._looks = 0

    def wait_by(self, host_wait: HostWait) -> None:
        pass

    @property
    def busy(self) -> bool:
        """Now and then."""
        self._looks += 1
        return self._looks % 3 == 0

    def start(
        self, slots: Sequence[torch.Tensor], records: Sequence[torch.Tensor], write: WriteSlot, *, urgent: bool
    ) -> list[Late]:
        for slot in slots:
            slot.fill_(0x7E)  # about 1e38 as a float
        return [Late(slot, record, write) for slot, record in zip(slots, records, strict=True)]

    def wait(self, transfer: Late) -> None:
        transfer.write(transfer.slot, transfer.record)

    def set_urgent(self, transfer: Late) -> None:
        pass

    def poll(self, transfer: Late) -> bool:
        return False

    def wait_cancelled(self, slots: Any = None) -> None:
        pass

    def begun(self, transfer: Late) -> bool:
        """Every fifth, so that ranks have begun with different numbers of them."""
        self._looks += 1
        return self._looks % 5 == 0

    def cancel(self, transfer: Late) -> bool:
        return False


class Guesses:
    """Predictions at random, of which some are right by chance.

    Args:
        experts: of every layer.
        seed: another one for each rank.
    """

    def __init__(self, experts: int, seed: int) -> None:
        self._experts = experts
        self._generator = torch.Generator().manual_seed(seed)

    def predicts(self, layer: int) -> bool:
        return True

    def usage(self, layer: int, hidden_TH: torch.Tensor, index_TK: torch.Tensor) -> torch.Tensor | None:
        if len(index_TK) > 20:
            return None
        certain = torch.rand(self._experts, generator=self._generator) ** 4 * 300
        return certain.clamp(max=255).to(torch.int32)

    def skip(self, layer: int, hidden_TH: torch.Tensor) -> None:
        pass

    def ids(self, layer: int, hidden_TH: torch.Tensor, k: int) -> torch.Tensor:
        return torch.rand(len(hidden_TH), self._experts, generator=self._generator).topk(k).indices


class Echo(Guesses):
    """Predictions that come true: the next layer's choice is this one's."""

    def usage(self, layer: int, hidden_TH: torch.Tensor, index_TK: torch.Tensor) -> torch.Tensor | None:
        used = torch.zeros(self._experts, dtype=torch.int32)
        return used.index_fill_(0, index_TK.reshape(-1).clamp(max=self._experts - 1), 255)


def mislead(runtime: Runtime, seed: int = 0) -> None:
    """Predictions at random, over a link that brings nothing before it must."""
    link = LateLink()
    for loader in runtime.loaders:
        loader.link = link
    for runner, following in zip(runtime.runners, runtime.runners[1:], strict=False):
        guesses = Guesses(following.cache.num_experts, seed)
        runner.prefetch_by(Prefetcher(runner.index, following.prefetch_target, guesses))
