"""Answers that are the same for every test: computed once a session, by the first process that needs them."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from tests.support import zoo

Value = TypeVar("Value")

_here: dict[str, Any] = {}


def remembered(key: object, make: Callable[[], Value]) -> Value:
    """The result of ``make``; from memory, or from another process's file.

    Args:
        key: everything that the value depends on, as an object with a ``repr`` of its own.
    """
    name = hashlib.sha256(repr(key).encode()).hexdigest()
    if name not in _here:
        path = Path(os.environ["EPSLOTS_TESTS_SHARED"]) / name
        if path.exists():
            _here[name] = pickle.loads(path.read_bytes())
        else:
            _here[name] = make()
            part = path.with_name(f"{name}.{os.getpid()}")
            part.write_bytes(pickle.dumps(_here[name]))
            part.rename(path)  # whole or absent
    value: Value = _here[name]
    return value


class Reference:
    """Answers of a checkpoint in plain transformers; it is loaded for the first new answer."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @cached_property
    def _model(self) -> PreTrainedModel:
        return zoo.reference(self._folder)

    @cached_property
    def _content(self) -> str:
        files = sorted(path for path in self._folder.iterdir() if path.is_file())
        return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()

    def _remembered(self, inputs: dict[str, Any], compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        values = {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
        return remembered((self._content, sorted(values.items())), compute)

    def __call__(self, **inputs: torch.Tensor) -> SimpleNamespace:
        with torch.no_grad():
            return SimpleNamespace(logits=self._remembered(inputs, lambda: self._model(**inputs).logits))

    def generate(self, ids: torch.Tensor, **settings: Any) -> torch.Tensor:
        return self._remembered({"generate": ids, **settings}, lambda: self._model.generate(ids, **settings))
