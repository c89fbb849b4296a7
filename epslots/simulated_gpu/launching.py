"""Kernels and copies on a simulated GPU's current stream, or in its capture.

``operators.py`` comes here with torch's operations; ``launch_kernel`` is for kernels of our own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch

from epslots.simulated_gpu.machine import DeviceWork, SimulatedMachine, current_machine
from epslots.simulated_gpu.streams import current_stream
from epslots.simulated_gpu.tensors import GpuTensor, memory_of, replace_tensors, tensors_in
from epslots.simulated_gpu.timeline import Operation

T = TypeVar("T")

# Operations on a device's tensor that may have others of the host beside it: numbers, and indices, which are copied.
TAKES_HOST_INDICES = {"index", "index_put", "index_put_", "_index_put_impl_", "lift_fresh"}


def kernel_work(
    machine: SimulatedMachine,
    name: str,
    number: int,
    reads: Sequence[torch.Tensor],
    writes: Sequence[torch.Tensor],
    flops: float = 0.0,
    moves: Sequence[torch.Tensor] | None = None,
    *,
    beside: bool = False,
) -> DeviceWork:
    """A kernel's work. It lasts for the longer of its bytes' and its flops' time.

    Args:
        beside: whether it leaves the multiprocessors to others: it waits for the link most of the time.
        moves: the memory that it really moves, where that is less than all of ``reads`` and ``writes``: rows of a table.
    """
    spec, nbytes = machine.spec, sum(map(machine.sizes.nbytes, (*reads, *writes) if moves is None else moves))
    seconds = max(spec.kernel_s, nbytes / spec.memory_rate, flops / spec.flops)
    return DeviceWork(name, f"{'beside' if beside else 'SM'}:{number}", seconds, reads, writes, nbytes)


def launch(
    machine: SimulatedMachine, work: DeviceWork, number: int, compute: Callable[[], Any], results: Sequence[torch.Tensor]
) -> None:
    """Launch a kernel on the current stream of a device.

    Args:
        number: of the device.
        compute: does the work once more; returns ``results``, in new memory.
    """
    stream = current_stream(number).stream_id
    if machine.capture is not None:
        machine.capture.record(work, stream, compute, results)
        return
    machine.kernels[machine.operate(work, stream).owner, work.name] += 1


def transfer(
    machine: SimulatedMachine,
    kind: str,
    number: int,
    reads: Sequence[torch.Tensor],
    writes: Sequence[torch.Tensor],
    compute: Callable[[], Any] | None,
    *,
    hidden: bool = False,
) -> None:
    """A copy by a copy engine on the device's current stream.

    Args:
        kind: "H2D", "D2H" or "P2P".
        compute: repeats it, for captures; None if it isn't allowed in a capture.
        hidden: whether the host waits for it, as it does for pageable memory.
    """
    if hidden:
        machine.refuse_in_capture(f"{kind} of pageable memory, or blocking")
    stream = current_stream(number).stream_id
    nbytes = max(sum(map(machine.sizes.nbytes, tensors)) for tensors in (reads, writes))
    seconds = machine.spec.copy_s + nbytes / machine.spec.link_rate
    work = DeviceWork(kind, f"{kind}:{number}", seconds, reads, writes, nbytes)
    if machine.capture is not None:
        machine.capture.record(work, stream, compute)
        return
    machine.copies[kind, machine.operate(work, stream).site] += 1
    if hidden:
        machine.wait_for_stream(f"{kind}, blocking or pageable", stream)


@dataclass(frozen=True)
class LinkRead:
    """Pinned memory that a kernel reads by the link.

    Attributes:
        nbytes: after it is computed, how much that was.
        beside: told of the operation, at each replay, too, if it runs beside other kernels; None = it doesn't.
    """

    nbytes: Callable[[], float]
    beside: Callable[[Operation], None] | None = None


def launch_kernel(
    name: str,
    function: Callable[..., T],
    *arguments: Any,
    reads: Sequence[torch.Tensor] = (),
    writes: Sequence[torch.Tensor] = (),
    moves: Sequence[torch.Tensor] | None = None,
    link: LinkRead | None = None,
    flops: float = 0.0,
) -> T:
    """Simulate one kernel of our own, which would be Triton's, by a function that computes its values.

    Args:
        function: called with the arguments' memory; may look at any value. In a captured step it is called at each replay.
        reads, writes: tensors of the device that it accesses, and pinned ones.
        moves: the memory that it really moves, where that is less than all of ``reads`` and ``writes``.
        link: its reads of pinned memory; None = none.
        flops: multiplications and additions.

    Returns:
        Its result, with tensors of the device.
    """
    machine = current_machine()
    gpus = [t for t in [*tensors_in(arguments), *reads, *writes] if isinstance(t, GpuTensor)]
    number = gpus[0].number
    written = memory_of(list(writes))
    protect(machine, written)
    compute = partial(function, *memory_of(arguments))
    with machine.computing_kernel():
        result = compute()
    given = {t.memory.untyped_storage()._cdata for t in gpus}
    made = [t for t in tensors_in(result) if t.untyped_storage()._cdata not in given]
    for memory in made:
        machine.allocate(memory, number, current_stream(number).stream_id)
    moved = None if moves is None else memory_of(list(moves))
    beside = link is not None and link.beside is not None
    work = kernel_work(machine, name, number, memory_of(list(reads)), [*made, *written], flops, moved, beside=beside)

    if link is not None:

        def seconds(read: Callable[[], float] = link.nbytes, least: float = work.seconds) -> float:
            return max(least, read() / machine.spec.link_rate)

        with machine.computing_kernel():
            work = replace(work, seconds=seconds(), again=seconds, over_link=True, queued=link.beside)
    launch(machine, work, number, compute, made)
    return replace_tensors(result, lambda tensor: GpuTensor(tensor, number))


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """``F.scaled_dot_product_attention`` as one kernel, which CUDA has for every shape and mask that transformers gives."""
    tensors = tensors_in((query, key, value, args, kwargs))
    gpus = [tensor for tensor in tensors if isinstance(tensor, GpuTensor)]
    refuse_mixed("scaled_dot_product_attention", gpus, tensors)
    compute = partial(torch.nn.functional.scaled_dot_product_attention, **memory_of(kwargs))
    flops = 4.0 * current_machine().sizes.numel(query.shape) * key.shape[-2]
    return launch_kernel("scaled_dot_product_attention", compute, query, key, value, *args, reads=gpus, flops=flops)


def mapped(interface: dict[str, Any], number: int) -> torch.Tensor:
    """Pinned memory as a tensor of a device, whose kernels read it over the link.

    Args:
        interface: ``__cuda_array_interface__`` of contiguous memory.

    Raises:
        RuntimeError: it isn't pinned, so a device can't address it.
    """
    memory = current_machine().pinned_at(interface["data"][0])
    if memory is None:
        raise RuntimeError("The specified pointer resides on host memory and is not registered with any CUDA device.")
    dtype = torch.from_numpy(np.empty(0, interface["typestr"])).dtype
    with current_machine().computing_kernel():
        return GpuTensor(memory.view(dtype).view(interface["shape"]), number)


def refuse_mixed(name: str, gpus: Sequence[GpuTensor], tensors: Sequence[torch.Tensor]) -> None:
    """Raise what CUDA raises where tensors are on several devices."""
    numbers = {tensor.number for tensor in gpus}
    strangers = [t for t in tensors if not isinstance(t, GpuTensor) and t.dim() > 0]
    takes_host = name in TAKES_HOST_INDICES and not all(t.is_floating_point() for t in strangers)
    if len(numbers) > 1 or (gpus and strangers and not takes_host):
        found = sorted({f"{tensor.device} {list(tensor.shape)}" for tensor in tensors})
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {' and '.join(found)}! ({name})"
        )


def protect(machine: SimulatedMachine, written: Sequence[torch.Tensor]) -> None:
    """Let a capture keep what these tensors hold, before they are written."""
    if machine.capture is not None:
        machine.capture.protect(written)
