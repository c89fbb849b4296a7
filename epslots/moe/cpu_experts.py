"""Experts computed on the CPU, straight from the host store: the cheapest way for few tokens of a large expert.

No expert enters or leaves a slot. A few rows of hidden states cross the link instead of an expert's weights, and their results
come back (as in KTransformers and Fiddler). The arithmetic is that of the slots' own kernel on the CPU, so results are exact;
only the order of their sums may differ from a GPU's.

    begin    gather the rows of the experts computed on the CPU, and start their copy to the host
    finish   apply each expert to its rows; copy the results back to the device

Work that is queued on the device between the two runs beside the CPU's.

Legend of shape suffixes: M pairs of a step, J rows given, P pairs computed on the CPU, H hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from types import MethodType

import torch
from torch import nn

from epslots.cache.host_store import HostStore
from epslots.cache.unpacking import Weight, record_views, weights_of
from epslots.device_copy import to_device, to_host
from epslots.moe.grouped_gemm import GroupedGemm
from epslots.transport.host_wait import HostWait, wait_until


@dataclass(frozen=True)
class CpuRows:
    """Pairs on their way to the host.

    Attributes:
        experts: the experts computed on the CPU, and pairs of each; pairs are in this order.
        pair_P: int64 on the device, the number of each pair among the step's.
        rows_PH: their rows on the host; complete after ``arrived`` (None: complete now).
    """

    experts: tuple[tuple[int, int], ...]
    pair_P: torch.Tensor
    rows_PH: torch.Tensor
    arrived: torch.cuda.Event | None


class CpuExperts:
    """Computes experts of one layer on the CPU.

    Args:
        module: the layer's experts module; its activation and norm are copied to the CPU if they are elsewhere.
        store: holds the records.
        layer: the layer's number in the store.
        device: the source of rows and the target of results.
        gemm: the class that computes: ``GroupedGemm``, or ``BatchInvariantGemm`` for a batch-invariant model.
    """

    def __init__(
        self,
        module: nn.Module,
        store: HostStore,
        layer: int,
        device: torch.device,
        *,
        gemm: type[GroupedGemm] = GroupedGemm,
    ) -> None:
        spec = store.manifest.layers[layer]
        self._store, self._layer, self._device = store, layer, device
        self._spec = spec
        self.num_experts = spec.num_experts
        shapes = torch.empty(spec.layout.nbytes, dtype=torch.uint8, device="meta")
        module = module if device.type == "cpu" else on_cpu(module)
        self._kernel = gemm(module, self._one_of(shapes))
        self.dtype, self.hidden_size = self._kernel.dtype, self._kernel.hidden_size
        self._host_wait: HostWait = wait_until

    def wait_by(self, host_wait: HostWait) -> None:
        """Let the host wait for rows as a group's transport does, from now on."""
        self._host_wait = host_wait

    def begin(self, rows_JH: torch.Tensor, ids_M: torch.Tensor, experts: Sequence[int], pairs: Sequence[int]) -> CpuRows:
        """Gather the rows of the pairs of these experts. On CUDA everything is queued, and nothing waits.

        Args:
            rows_JH: hidden states; M is a multiple of J, and each row serves M / J neighbouring pairs.
            ids_M: int64, the expert of each pair.
            experts: the experts to compute on the CPU, each once.
            pairs: the number of pairs of each of them in ``ids_M``.
        """
        total = sum(pairs)
        order_E = torch.full((self.num_experts + 1,), len(experts), device="cpu")
        order_E[list(experts)] = torch.arange(len(experts), device="cpu")
        # Pairs of the first of these experts come first, all other pairs last: their number is known on the host.
        order_M = to_device(order_E, self._device)[ids_M]
        pair_P = torch.sort(order_M, stable=True).indices[:total]
        rows_PH = rows_JH[pair_P // (len(ids_M) // len(rows_JH))].to(self.dtype)
        rows_PH, arrived = to_host(rows_PH)
        return CpuRows(tuple(zip(experts, pairs, strict=True)), pair_P, rows_PH, arrived)

    def finish(self, begun: CpuRows, result_MH: torch.Tensor) -> None:
        """Compute the experts, and enter their results into those of the step, in place.

        Args:
            begun: from ``begin``.
            result_MH: [M, H] in the weights' dtype, on the device.

        Raises:
            CorruptExpertError: a record differs from its digest.
        """
        if begun.arrived is not None:
            self._host_wait(begun.arrived.query)
        computed_PH = torch.empty(begun.rows_PH.shape, dtype=self.dtype, device="cpu")
        start = 0
        for expert, pairs in begun.experts:
            rows = slice(start, start + pairs)
            computed_PH[rows] = self._compute(expert, begun.rows_PH[rows])
            start = rows.stop
        result_MH.index_copy_(0, begun.pair_P, to_device(computed_PH, self._device).to(result_MH.dtype))

    def compute(
        self, rows_JH: torch.Tensor, ids_M: torch.Tensor, experts: Sequence[int], pairs: Sequence[int]
    ) -> torch.Tensor:
        """``begin`` and ``finish`` at once: [M, H], zeros for pairs of other experts."""
        result_MH = torch.zeros(len(ids_M), self.hidden_size, dtype=self.dtype, device=self._device)
        self.finish(self.begin(rows_JH, ids_M, experts, pairs), result_MH)
        return result_MH

    def _compute(self, expert: int, rows_NH: torch.Tensor) -> torch.Tensor:
        """One expert's results [N, H] for its rows, on the CPU."""
        ends = torch.full((1,), len(rows_NH), dtype=torch.int32, device="cpu")
        with self._store.lend(self._layer, expert) as record:
            self._kernel.use(self._one_of(record))
            return self._kernel(rows_NH, ends, torch.zeros(len(rows_NH), dtype=torch.int64, device="cpu"))

    def _one_of(self, record: torch.Tensor) -> dict[str, Weight]:
        """The weights of a record, as a pool of one slot."""
        return weights_of(self._spec, {name: t[None] for name, t in record_views(record, self._spec.layout).items()})


def on_cpu(module: nn.Module) -> nn.Module:
    """A copy of a module whose activation and norm are on the CPU. The original stays as it is."""
    twin = copy.copy(module)
    twin._modules = {name: None if m is None else copy.deepcopy(m).to("cpu") for name, m in module._modules.items()}
    twin._buffers = {name: None if b is None else b.to("cpu") for name, b in module._buffers.items()}
    for name, value in list(vars(twin).items()):
        if isinstance(value, MethodType) and value.__self__ is module:  # experts.py binds what a class lacks
            vars(twin)[name] = MethodType(value.__func__, twin)
    return twin
