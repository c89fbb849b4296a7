"""Fixtures of all tests of batches."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
from transformers import PreTrainedModel

from tests.support import zoo


@pytest.fixture(scope="module")
def built() -> Callable[[str], PreTrainedModel]:
    """Plain models by name, each built once; only for tests that leave them as they are."""
    return cache(lambda name: zoo.ZOO[name].build())
