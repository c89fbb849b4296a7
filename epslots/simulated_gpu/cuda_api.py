"""``simulated_gpus``: within it ``torch.cuda`` and ``torch.accelerator`` show simulated GPUs, which this thread computes on.

torch's modes belong to a thread: those that are started within it enter them by themselves, others by ``on_this_thread``.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace, TracebackType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from epslots import device_copy
from epslots.cuda_graph import lent_slots
from epslots.cuda_graph.torch_kernels import TorchKernels
from epslots.moe import expert_compute, product_choice
from epslots.moe.pair_kernels import TorchPairKernels
from epslots.prefetch import predictor
from epslots.prefetch.usage import usage_by_torch
from epslots.simulated_gpu import machine as machine_module
from epslots.simulated_gpu.capture import CapturingStep, SimulatedGraph
from epslots.simulated_gpu.gpu_spec import GPUS, GpuSpec
from epslots.simulated_gpu.launching import attention, mapped
from epslots.simulated_gpu.machine import SimulatedMachine, current_machine
from epslots.simulated_gpu.operators import execute
from epslots.simulated_gpu.own_kernels import SimulatedKernels, SimulatedPairKernels, SimulatedProducts, simulated_usage
from epslots.simulated_gpu.streams import SimulatedEvent, SimulatedStream, current_stream, default_stream, device_number
from epslots.simulated_gpu.tensors import GpuTensor

_thread_run = threading.Thread.run
_PINNED_READS = {torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.__getitem__}
_FROM_LISTS = {torch.tensor, torch.as_tensor, torch.asarray}
_CAUGHT = {torch.Tensor.to, torch.Tensor.cuda, torch.nn.functional.scaled_dot_product_attention, *_FROM_LISTS, *_PINNED_READS}


@contextmanager
def simulated_gpus(gpu: str | GpuSpec = "h100", count: int = 1, memory_bytes: int | None = None) -> Iterator[SimulatedMachine]:
    """Simulate GPUs until the end of the context.

    Args:
        gpu: a name of ``GPUS``, or a kind of GPU.
        count: GPUs of this process.
        memory_bytes: of each; by default the kind's.
    """
    spec = GPUS[gpu] if isinstance(gpu, str) else gpu
    machine = SimulatedMachine(spec, count, memory_bytes)
    machine_module._machines.append(machine)
    try:
        with ExitStack() as patches:
            for owner, name, value in _replacements(machine):
                patches.enter_context(replaced(owner, name, value))
            with on_this_thread():
                yield machine
    finally:
        machine_module._machines.remove(machine)


@contextmanager
def on_this_thread() -> Iterator[None]:
    """Let this thread's operations of torch go to the simulated GPUs."""
    current_machine().begin_thread()
    with _Operations(), _Functions():
        yield


def _run_thread(thread: threading.Thread) -> None:
    """``Thread.run``: a thread's clock begins at that of the thread that is furthest."""
    with on_this_thread():
        _thread_run(thread)


class _Operations(TorchDispatchMode):
    """Brings all operations to ``execute``, also those without a tensor of a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not machine_module._machines:  # a thread that outlives the simulation
            return func(*args, **kwargs or {})
        return execute(func, args, kwargs or {})

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here; torch would guard against it in each call, which takes longer than most operations."""
        return False


class _Functions(TorchFunctionMode):
    """Catches what never becomes an operation: tensors from lists, and looks at pinned memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _CAUGHT or not machine_module._machines:
            return func(*args, **kwargs)
        if func is torch.Tensor.to or func is torch.Tensor.cuda:
            args, kwargs = (
                _with_index(args),
                kwargs | ({} if "device" not in kwargs else {"device": _indexed(kwargs["device"])}),
            )
            if func is torch.Tensor.cuda:
                return args[0].to(torch.device("cuda", device_number(args[1] if len(args) > 1 else None)), **kwargs)
        if func is torch.nn.functional.scaled_dot_product_attention and isinstance(args[0], GpuTensor):
            return attention(*args, **kwargs)
        if func is torch.as_tensor and hasattr(args[0], "__cuda_array_interface__") and not isinstance(args[0], torch.Tensor):
            return mapped(args[0].__cuda_array_interface__, device_number(kwargs["device"]))
        if func in _FROM_LISTS and kwargs.get("device") is not None:
            device = torch.device(_indexed(kwargs["device"]))
            if device.type == "cuda" and not isinstance(args[0], GpuTensor):
                rest = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory")}
                return func(*args, **rest).to(device)
            if isinstance(args[0], GpuTensor):
                return args[0].to(device)
        if func in _PINNED_READS and type(args[0]) is torch.Tensor:
            machine = current_machine()
            if not machine.in_kernel and machine.block(args[0]) is not None:
                machine.host_accesses(func.__name__, [args[0]], [])
        return func(*args, **kwargs)


def _indexed(value: Any) -> Any:
    """A device with its number: torch's C++ code would ask a driver for it."""
    if isinstance(value, str | torch.device) and torch.device(value).type == "cuda":
        return torch.device("cuda", device_number(value))
    return value


def _with_index(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0], *map(_indexed, args[1:]))


class _CurrentDevice:
    """``torch.cuda.device``."""

    def __init__(self, device: Any) -> None:
        self._number = current_machine().device if device is None else device_number(device)
        self._before = 0

    def __enter__(self) -> None:
        machine = current_machine()
        self._before, machine.device = machine.device, self._number

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        current_machine().device = self._before


class _OnStream:
    """``torch.cuda.stream``."""

    def __init__(self, stream: SimulatedStream | None) -> None:
        self._stream = stream
        self._before: tuple[int, SimulatedStream | None] = 0, None

    def __enter__(self) -> SimulatedStream | None:
        machine = current_machine()
        if self._stream is not None:
            number = self._stream.device_index
            self._before = machine.device, machine.current_streams.get(number)
            machine.device = number
            machine.current_streams[number] = self._stream
        return self._stream

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        machine = current_machine()
        if self._stream is not None:
            machine.device, stream = self._before
            if stream is None:
                del machine.current_streams[self._stream.device_index]
            else:
                machine.current_streams[self._stream.device_index] = stream


class _Cudart:
    """``torch.cuda.cudart()``: the calls that pin memory."""

    def __init__(self) -> None:
        self._machine = current_machine()

    def cudaHostRegister(self, address: int, nbytes: int, _flags: int) -> int:
        self._machine.register(address, nbytes)
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        self._machine.unregister(address)
        return 0


def _synchronize(device: Any = None) -> None:
    machine = current_machine()
    machine.wait_for_device("device.synchronize", device_number(device))


def _pin_memory(tensor: torch.Tensor, *_: Any) -> torch.Tensor:
    machine = current_machine()
    with machine.computing_kernel():
        return machine.pin(tensor.contiguous().clone())


def _set_device(device: Any) -> None:
    number = device_number(device)
    machine = current_machine()
    machine.device = number
    machine.contexts.add(number)


def _set_stream(stream: SimulatedStream) -> None:
    current_machine().current_streams[stream.device_index] = stream


def _properties(machine: SimulatedMachine) -> SimpleNamespace:
    major, minor = machine.spec.capability
    return SimpleNamespace(
        name=machine.spec.name, major=major, minor=minor, total_memory=machine.memory_bytes, multi_processor_count=132
    )


def _cuda_replacements(machine: SimulatedMachine) -> dict[str, Any]:
    """The functions in ``torch.cuda`` while GPUs are simulated, by name."""

    def free(device: Any = None) -> tuple[int, int]:
        number = device_number(device)
        machine.contexts.add(number)
        return machine.memory_bytes - machine.allocated[number], machine.memory_bytes

    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "init": lambda: None,
        "current_device": lambda: machine.device,
        "device_count": lambda: machine.count,
        "set_device": _set_device,
        "mem_get_info": free,
        "memory_reserved": lambda device=None: machine.allocated[device_number(device)],
        "memory_allocated": lambda device=None: machine.allocated[device_number(device)],
        "max_memory_allocated": lambda device=None: machine.peak[device_number(device)],
        "empty_cache": lambda: None,
        "get_device_capability": lambda device=None: machine.spec.capability,
        "get_device_properties": lambda device=None: _properties(machine),
        "get_device_name": lambda device=None: machine.spec.name,
        "is_bf16_supported": lambda *_, **__: True,
        "Stream": SimulatedStream,
        "Event": SimulatedEvent,
        "stream": _OnStream,
        "set_stream": _set_stream,
        "current_stream": current_stream,
        "default_stream": default_stream,
        "synchronize": _synchronize,
        "device": _CurrentDevice,
        "cudart": _Cudart,
        "CUDAGraph": SimulatedGraph,
        "graph": CapturingStep,
        "graph_pool_handle": lambda: (0, len(machine.graph_pools) + 1),
        "is_current_stream_capturing": lambda: machine.capture is not None,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
    }


def _replacements(machine: SimulatedMachine) -> list[tuple[Any, str, Any]]:
    """(owner, name, value) of everything that stands in another place while GPUs are simulated."""
    return [
        *((torch.cuda, name, value) for name, value in _cuda_replacements(machine).items()),
        (threading.Thread, "run", _run_thread),
        (device_copy, "_by_device", {}),
        (lent_slots, "kernels_for", lambda loader: _own(loader.pool.device, SimulatedKernels, TorchKernels)(loader)),
        (product_choice, "kernel_products", SimulatedProducts),
        (expert_compute, "pair_kernels_for", _pair_kernels_for),
        (predictor, "usage_kernel_for", lambda device: _own(device, simulated_usage, usage_by_torch)),
        (torch.accelerator, "is_available", lambda: True),
        (torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda")),
        # ``Module.to`` puts new parameters in the place of a device's, whose Python objects can't become plain.
        (torch.__future__, "_overwrite_module_params_on_conversion", True),
        (torch, "get_device_module", lambda device=None: torch.cuda),
        (torch.Tensor, "pin_memory", _pin_memory),
        (torch.Tensor, "is_pinned", lambda tensor, *_: machine.is_pinned(tensor)),
    ]


def _own(device: torch.device, on_gpu: Any, on_cpu: Any) -> Any:
    """The functions in place of our kernels on a device."""
    return on_cpu if device.type == "cpu" else on_gpu


def _pair_kernels_for(experts: int, device: torch.device) -> Any:
    return _own(device, SimulatedPairKernels, TorchPairKernels)(experts, device)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Within the context an attribute has another value."""
    missing = object()
    before = vars(owner).get(name, missing)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
