"""Operations on meta tensors within a ``MetaRun``: the forms that they have without it, though each is worked out once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from epslots.models import meta_run
from epslots.models.meta_run import MetaRun


def of(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def form(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    return tuple(map(form, value))


# Each differs from another in one thing that its result depends on.
CALLS: list[Callable[[], Any]] = [
    lambda: of(3, 4) + of(4),
    lambda: of(3, 4) + of(4, dtype=torch.float64),
    lambda: of(5, 4) + of(4),
    lambda: of(4, 3).T + of(4),
    lambda: of(3, 4, dtype=torch.int64) + 1,
    lambda: of(3, 4, dtype=torch.int64) + 1.0,
    lambda: of(3, 4, dtype=torch.bool) + True,
    lambda: of(3, 4, dtype=torch.bool) + 1,
    lambda: torch.cat([of(3, 4), of(3, 4)]),
    lambda: torch.cat([of(3, 4), of(3, 4)], dim=1),
    lambda: torch.cat([of(3, 4), of(2, 4)]),
    lambda: of(3, 4).topk(2),
    lambda: of(3, 4).sum(-1, dtype=torch.float64),
    lambda: of(3, 4).sum(-1),
    lambda: of(3, 4) + torch.tensor(1, dtype=torch.int64),
    lambda: of(3, 4, dtype=torch.int64) * torch.tensor([2.0]).squeeze(),
    lambda: torch.zeros(3) + torch.arange(3),
    lambda: torch.ones(3, dtype=torch.float64) + torch.arange(3),
]


@pytest.mark.parametrize("again", [False, True])
def test_forms_are_the_same_within(again: bool):
    plain = [form(call()) for call in CALLS]
    with MetaRun():
        assert [form(call()) for call in CALLS] == plain, again


def test_an_operation_is_worked_out_once(monkeypatch: pytest.MonkeyPatch):
    """Each layer of a model makes the same."""
    worked_out = list[object]()
    remember = meta_run._remember

    def watched(call: tuple[Any, ...], result: Any) -> None:
        worked_out.append(call[0])
        remember(call, result)

    monkeypatch.setattr(meta_run, "_remember", watched)
    monkeypatch.setattr(meta_run, "_known", {})
    with MetaRun():
        hidden = of(3, 4)
        for _ in range(5):
            hidden = hidden.cos() @ of(4, 4)
    assert worked_out.count(torch.ops.aten.cos.default) == 1
    assert worked_out.count(torch.ops.aten.mm.default) == 1


def test_the_default_dtype_counts():
    with MetaRun():
        before = (of(3, dtype=torch.int64) / 2).dtype
        torch.set_default_dtype(torch.float64)
        try:
            assert before is torch.float32
            assert (of(3, dtype=torch.int64) / 2).dtype is torch.float64
        finally:
            torch.set_default_dtype(torch.float32)


def test_what_is_changed_or_looked_at_stays_one_tensor():
    with MetaRun():
        for _ in range(2):
            whole = of(3, 4)
            assert whole.add_(1) is whole
            assert whole.view(12).untyped_storage()._cdata == whole.untyped_storage()._cdata
            assert (whole.sum() > 0).item() is False
            assert whole.sum().item() == 0.0


def test_other_devices_keep_their_values():
    ones = torch.ones(3)
    with MetaRun():
        assert (of(3) * 2).is_meta
        assert [(ones * factor).tolist() for factor in (2, 3)] == [[2, 2, 2], [3, 3, 3]]
