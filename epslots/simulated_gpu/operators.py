"""torch's operations on simulated GPUs: values by the CPU; the refusals, waits, launches and times of CUDA.

``execute`` gets every operation of a thread (``cuda_api.py`` enters the mode), those on plain tensors too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import torch

from epslots.simulated_gpu.launching import TAKES_HOST_INDICES, kernel_work, launch, protect, refuse_mixed, transfer
from epslots.simulated_gpu.machine import DeviceWork, SimulatedMachine, current_machine
from epslots.simulated_gpu.streams import current_stream, device_number
from epslots.simulated_gpu.tensors import GpuTensor, memory_of, replace_tensors, tensors_in

# Operations that ask the device for a value or for the size of their result.
_WAITING = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim",
    "unique_consecutive", "bincount", "histc",
}  # fmt: skip
_MOST_ROWS = 64  # that a gathering or scattering is taken apart into
# Operations that read or write some rows of a table, of which they needn't move the others.
_GATHERS = {"index", "index_select", "embedding", "gather"}
_SCATTERS = {"index_copy_", "index_put_", "_index_put_impl_", "scatter_"}
_GROUPED = {"_grouped_mm", "grouped_mm_fallback"}
_MATMULS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}


def execute(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run one operation of torch as its tensors' devices would.

    Raises:
        RuntimeError: devices are mixed, or the operation is illegal in a capture.
    """
    machine = current_machine()
    if machine.in_kernel:
        return func(*memory_of(args), **{key: value for key, value in memory_of(kwargs).items() if key != "device"})
    device = kwargs.get("device")
    target = None if device is None else torch.device(device)
    tensors = tensors_in((args, kwargs))
    gpus = [tensor for tensor in tensors if isinstance(tensor, GpuTensor)]
    name = func._schema.name.partition("::")[2]
    if not gpus and (target is None or target.type != "cuda"):
        return _on_host(machine, name, func, args, kwargs, tensors)
    if name == "_to_copy":
        return _convert(machine, args[0], target, kwargs)
    if name == "copy_":
        blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        return _copy(machine, args[0], args[1], non_blocking=not blocking)
    refuse_mixed(name, gpus, tensors)
    number = gpus[0].number if gpus else device_number(target)
    if target is not None and target.type != "cuda":
        return func(*memory_of(args), **memory_of(kwargs))  # as "meta" for shapes
    return _on_device(machine, name, func, args, kwargs, gpus, number)


def _on_host(
    machine: SimulatedMachine,
    name: str,
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    tensors: Sequence[torch.Tensor],
) -> Any:
    """An operation of the CPU: it mustn't meet copies of the memory that it reads and writes."""
    pins = kwargs.get("pin_memory")
    if pins:
        kwargs = kwargs | {"pin_memory": False}
    result = func(*args, **kwargs)
    if pins:
        for tensor in tensors_in(result):
            machine.pin(tensor)
        return result
    if any(machine.block(tensor) is not None for tensor in tensors):
        writes = _written(func, args, kwargs)
        views = _is_view(func)
        if writes or not views:
            machine.host_accesses(name, [t for t in tensors if not any(t is w for w in writes)], writes)
    if name == "copy_":
        machine.spend(args[0].nbytes / machine.spec.copy_rate)
    return result


def _convert(machine: SimulatedMachine, source: torch.Tensor, target: torch.device | None, kwargs: dict[str, Any]) -> Any:
    """``_to_copy``: another dtype, another device, or both."""
    memory = source.memory if isinstance(source, GpuTensor) else source
    changes = {key: value for key, value in kwargs.items() if key in ("dtype", "memory_format") and value is not None}
    if isinstance(source, GpuTensor) and (target is None or target.type == "cpu"):
        number = source.number  # torch's C++ code takes it for a CPU tensor; ``GpuTensor.to`` goes another way
    else:
        number = device_number(target)
    converted = torch.ops.aten._to_copy(memory, **changes)
    result = _new(machine, converted, number)
    if isinstance(source, GpuTensor):
        compute = partial(torch.ops.aten._to_copy, memory, **changes)
        if source.number == number:
            launch(machine, kernel_work(machine, "_to_copy", number, [memory], [converted]), number, compute, [converted])
        else:
            transfer(machine, "P2P", number, [memory], [converted], None)
    else:
        hidden = not (kwargs.get("non_blocking") and machine.is_pinned(source))
        transfer(machine, "H2D", number, [memory], [converted], partial(converted.copy_, memory), hidden=hidden)
    return result


def _copy(machine: SimulatedMachine, into: torch.Tensor, source: torch.Tensor, *, non_blocking: bool) -> torch.Tensor:
    """``copy_`` with a device at one end, or both."""
    target, memory = (t.memory if isinstance(t, GpuTensor) else t for t in (into, source))
    if isinstance(into, GpuTensor):
        protect(machine, [target])
        target.copy_(memory)
        if not isinstance(source, GpuTensor):
            hidden = not (non_blocking and machine.is_pinned(source)) and source.dim() > 0
            transfer(machine, "H2D", into.number, [memory], [target], partial(target.copy_, memory), hidden=hidden)
        elif machine.is_pinned(memory):  # CUDA looks at the address: the copy engine reads pinned memory, mapped or not
            transfer(machine, "H2D", into.number, [memory], [target], partial(target.copy_, memory))
        elif source.number == into.number:
            work = kernel_work(machine, "copy_", into.number, [memory], [target])
            launch(machine, work, into.number, partial(target.copy_, memory), [])
        else:
            transfer(machine, "P2P", into.number, [memory], [target], None)
        return into
    assert isinstance(source, GpuTensor)
    target.copy_(memory)
    hidden = not (non_blocking and machine.is_pinned(into))
    transfer(machine, "D2H", source.number, [memory], [target], partial(target.copy_, memory), hidden=hidden)
    return into


def to_host(tensor: GpuTensor) -> torch.Tensor:
    """``Tensor.cpu``: the host waits for the copy."""
    machine = current_machine()
    if machine.in_kernel:
        return tensor.memory
    transfer(machine, "D2H", tensor.number, [tensor.memory], [], None, hidden=True)
    return tensor.memory.clone()


def _on_device(
    machine: SimulatedMachine,
    name: str,
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    gpus: Sequence[GpuTensor],
    number: int,
) -> Any:
    """An operation whose tensors are all on one device."""
    inner_args = memory_of(args)
    inner = {key: value for key, value in memory_of(kwargs).items() if key not in ("device", "pin_memory")}
    hidden = _hidden_wait(machine, name, args, kwargs, inner_args)
    if hidden:
        machine.refuse_in_capture(hidden)
    writes = [t.memory for t in _written(func, args, kwargs) if isinstance(t, GpuTensor)]
    protect(machine, writes)
    result = func(*inner_args, **inner)
    by_memory = {id(tensor.memory): tensor for tensor in gpus}
    outputs = [t for t in tensors_in(result) if id(t) not in by_memory]
    mine = {tensor.memory.untyped_storage()._cdata for tensor in gpus}
    made = [t for t in outputs if t.untyped_storage()._cdata not in mine]
    stream = current_stream(number)
    for memory in made:
        machine.allocate(memory, number, stream.stream_id)
    creates = name.startswith(("empty", "new_empty"))
    if not creates and (made or writes or not outputs):  # else views, which cost nothing on the device
        reads = [t.memory for t in gpus if not any(t.memory is w for w in writes)]
        if name in _GROUPED:
            reads = _grouped_reads(inner_args, inner)
        elif name in ("index", "index_select") and inner_args[0].dim():
            reads = _rows_read(name, inner_args, reads)
        elif name == "index_copy_" and inner_args[1] == 0:
            writes = _rows_of(inner_args[0], inner_args[2]) or writes
        compute = partial(func, *inner_args, **inner)
        flops, moves = _flops(machine, name, inner_args, made), _rows_moved(name, inner_args, made)
        work = kernel_work(machine, name, number, reads, [*made, *writes], flops, moves=moves)
        if hidden and name in _GROUPED:
            machine.wait_for_stream(hidden, stream.stream_id)
            hidden, work = "", _loop(machine, work, inner_args[1].shape[0])
        launch(machine, work, number, compute, made)
    if hidden:
        machine.wait_for_stream(hidden, stream.stream_id)
    return replace_tensors(result, lambda t: by_memory[id(t)] if id(t) in by_memory else GpuTensor(t, number))


def _hidden_wait(
    machine: SimulatedMachine, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], inner: tuple[Any, ...]
) -> str:
    """Why the host waits for this operation, on CUDA; "" if it doesn't."""
    if name in _WAITING:
        return name
    if name == "repeat_interleave" and kwargs.get("output_size") is None:
        return "repeat_interleave without output_size"
    if name in TAKES_HOST_INDICES and len(args) > 1:
        indices = [index for index in args[1] or () if index is not None]
        if any(not isinstance(index, GpuTensor) for index in indices):
            return f"{name} by indices on the host"
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            return f"{name} by a mask"
    if name in _GROUPED:
        if name == "_grouped_mm" and machine.spec.fast_grouped_mm and inner[0].dtype == torch.bfloat16:
            return ""
        return f"{name} without a fast kernel (offs.cpu())"
    return ""


def _loop(machine: SimulatedMachine, work: DeviceWork, groups: int) -> DeviceWork:
    """A grouped product where torch has no kernel for it: the host launches a product for each group, empty ones too."""
    machine.spend((groups - 1) * machine.spec.launch_s)
    return replace(work, seconds=max(work.seconds, groups * machine.spec.kernel_s))


def _new(machine: SimulatedMachine, memory: torch.Tensor, number: int) -> GpuTensor:
    machine.allocate(memory, number, current_stream(number).stream_id)
    return GpuTensor(memory, number)


class _Arguments(NamedTuple):
    written: tuple[tuple[int, str], ...]
    views: bool


@cache
def _arguments(func: Any) -> _Arguments:
    """The places and names of the arguments that an operation writes, and whether its results are views."""
    schema = func._schema
    written = tuple(
        (place, argument.name)
        for place, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    views = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    return _Arguments(written, views)


def _is_view(func: Any) -> bool:
    return _arguments(func).views


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors that an operation writes."""
    found: list[torch.Tensor] = []
    for place, name in _arguments(func).written:
        found += tensors_in(args[place] if place < len(args) else kwargs.get(name))
    return found


def _grouped_reads(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The reads of a grouped product: the weights of groups that have rows."""
    ends = kwargs.get("offs", args[2] if len(args) > 2 else None)
    if ends is None:
        return [args[0], args[1]]
    rows = torch.diff(ends, prepend=ends.new_zeros(1))
    return [args[0], ends, *(args[1][group] for group in rows.nonzero().flatten().tolist())]


def _rows_read(name: str, args: tuple[Any, ...], reads: list[torch.Tensor]) -> list[torch.Tensor]:
    """The reads of a gathering of rows: the rows, where they are few and not the whole tensor's."""
    indices = args[1] if name == "index" else [args[2]] if args[1] == 0 else []
    index = indices[0] if len(indices) == 1 else None
    if index is None or index.dtype == torch.bool:
        return reads
    rows = _rows_of(args[0], index)
    return [index, *rows] if rows else reads


def _rows_of(table: torch.Tensor, index: torch.Tensor) -> list[torch.Tensor]:
    """The rows of a table that an index names, where they are few; else none."""
    rows = index.flatten().unique().tolist()
    return [] if len(rows) > _MOST_ROWS else [table[row] for row in rows]


def _rows_moved(name: str, args: tuple[Any, ...], made: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
    """The rows of a table that an operation moves, in and out; None if it moves all of its tensors."""
    if name in _GATHERS and made:
        return [*made, *made, *(t for t in tensors_in(args[1:]) if not t.is_floating_point())]
    if name in _SCATTERS:
        rows = tensors_in(args[1:])
        return [*rows, *(t for t in rows if t.is_floating_point())]
    return None


def _flops(machine: SimulatedMachine, name: str, args: tuple[Any, ...], made: Sequence[torch.Tensor]) -> float:
    """Multiplications and additions of a matrix product, or of attention; 0 for all else."""
    if not made or (name not in _MATMULS and name != "_grouped_mm"):
        return 0.0
    left = args[_MATMULS.get(name, (0, 1))[0]]
    return 2.0 * machine.sizes.numel(made[0].shape) * machine.sizes.numel(left.shape[-1:])


GpuTensor.execute, GpuTensor.copy_to_host = staticmethod(execute), staticmethod(to_host)
