"""``GpuTensor``: a tensor that says ``cuda:N`` and keeps its values in host memory.

torch's C++ code takes it for a CPU tensor. So what would look at its device there is overridden here, and all else comes to
``operators.py`` as operations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, ClassVar

import torch


class GpuTensor(torch.Tensor):
    """A tensor of a simulated GPU.

    Attributes:
        memory: its values, a plain tensor.
        number: of its device.
        execute, copy_to_host: set by ``operators.py``.
    """

    memory: torch.Tensor
    number: int
    execute: ClassVar[Callable[..., Any]]
    copy_to_host: ClassVar[Callable[..., torch.Tensor]]

    @staticmethod
    def __new__(cls, memory: torch.Tensor, number: int) -> GpuTensor:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            memory.size(),
            strides=memory.stride(),
            storage_offset=memory.storage_offset(),
            dtype=memory.dtype,
            device=torch.device("cpu"),
        )

    def __init__(self, memory: torch.Tensor, number: int) -> None:
        self.memory, self.number = memory, number

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return cls.execute(func, args, kwargs or {})

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", self.number)

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return False

    def get_device(self) -> int:
        return self.number

    def is_pinned(self, *_: Any) -> bool:
        return False

    def cpu(self, *_: Any, **__: Any) -> torch.Tensor:
        return self.copy_to_host(self)

    def cuda(self, *_: Any, **__: Any) -> GpuTensor:
        return self

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        device, dtype, copies = kwargs.get("device"), kwargs.get("dtype"), kwargs.get("copy", False)
        for value in args:
            if isinstance(value, torch.dtype):
                dtype = value
            elif isinstance(value, str | torch.device | int) and not isinstance(value, bool):
                device = value
            elif isinstance(value, torch.Tensor):
                device, dtype = value.device, value.dtype
        target = self.device if device is None else torch.device(device)
        if target.type == "cuda" and target.index is None:
            target = self.device
        result: torch.Tensor = self
        if dtype is not None and dtype != self.dtype:
            result, copies = torch.ops.aten._to_copy(self, dtype=dtype), False
        if target.type == "cpu":
            return result.cpu()
        if target != self.device:
            return torch.ops.aten._to_copy(result, device=target)
        return torch.ops.aten._to_copy(result) if copies else result

    def numpy(self, *, force: bool = False) -> Any:
        if force:
            return self.cpu().numpy()
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first.")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        return self.memory.data_ptr()

    def untyped_storage(self) -> Any:
        return self.memory.untyped_storage()

    def record_stream(self, stream: Any) -> None:
        """Its memory isn't reused before what the stream has is done; here it never is."""

    def __deepcopy__(self, memo: Any) -> torch.Tensor:
        twin = self.clone()
        return torch.nn.Parameter(twin, self.requires_grad) if isinstance(self, torch.nn.Parameter) else twin

    def __repr__(self, *, tensor_contents: Any = None) -> Any:  # type: ignore[override]
        return f"GpuTensor({self.memory}, device='{self.device}')"


# The types of most arguments of operations, beside tensors; others that aren't nests are leaves, too.
_LEAVES = {int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format}


def replace_tensors(value: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """A nest of tuples, lists, dicts and dataclasses with every tensor changed."""
    if type(value) in _LEAVES:
        return value
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, tuple):
        changed = [replace_tensors(item, change) for item in value]
        return type(value)(*changed) if hasattr(value, "_fields") else tuple(changed)
    if isinstance(value, list):
        return [replace_tensors(item, change) for item in value]
    if isinstance(value, dict):
        return {key: replace_tensors(item, change) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{f.name: replace_tensors(getattr(value, f.name), change) for f in fields(value)})
    return value


def memory_of(value: Any) -> Any:
    """A nest with the memory in place of each ``GpuTensor``."""
    return replace_tensors(value, lambda tensor: tensor.memory if isinstance(tensor, GpuTensor) else tensor)


def tensors_in(value: Any) -> list[torch.Tensor]:
    """All tensors of a nest."""
    found: list[torch.Tensor] = []
    replace_tensors(value, found.append)
    return found


def byte_range(tensor: torch.Tensor) -> tuple[int, int]:
    """The range of its storage's bytes that a tensor covers."""
    size, first, last = tensor.element_size(), int(tensor.storage_offset()), 0
    for n, stride in zip(tensor.shape, tensor.stride(), strict=True):
        last += (n - 1) * stride
    return first * size, (first + last + 1) * size
