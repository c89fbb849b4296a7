"""epslots runs Mixture-of-Experts models from a bounded pool of expert slots, on one device or many.

model = epslots.load("path/or/id", slots="25%")   # a transformers model; .generate() and all else as usual
with epslots.sync_ranks(model):                   # on several ranks (torchrun): each generates for its own prompts
    output = model.generate(**inputs)
stats = epslots.stats(model)                      # hits, misses, bytes by source, stall time, per layer
print(stats.hit_rate, stats.layers[0].misses)
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from epslots._version import __version__ as __version__
from epslots.cpu_threads import limit_spinning
from epslots.importing import without_collections

if TYPE_CHECKING:
    from epslots.errors import (
        CheckpointError,
        ConfigError,
        CorruptExpertError,
        DoesNotFitError,
        EpslotsError,
        ExchangeError,
        GroupError,
        PeerLost,
        RankMismatchError,
        StaleEpoch,
        StoreError,
        UnsupportedModelError,
    )
    from epslots.group.join import sync_ranks
    from epslots.loading import load
    from epslots.planner.cost_model import Costs
    from epslots.runtime import stats, verify
    from epslots.trace import Trace, record_trace


limit_spinning(os.environ)  # here, because torch's threads read it when torch is imported

__all__ = [
    "CheckpointError",
    "ConfigError",
    "CorruptExpertError",
    "Costs",
    "DoesNotFitError",
    "EpslotsError",
    "ExchangeError",
    "GroupError",
    "PeerLost",
    "RankMismatchError",
    "StaleEpoch",
    "StoreError",
    "Trace",
    "UnsupportedModelError",
    "load",
    "record_trace",
    "stats",
    "sync_ranks",
    "verify",
]

_MODULES = {
    "Costs": "planner.cost_model",
    "Trace": "trace",
    "sync_ranks": "group.join",
    "load": "loading",
    "record_trace": "trace",
    "stats": "runtime",
    "verify": "runtime",
}


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    """Import a public name on its first use: torch and transformers take seconds, which ``epslots --help`` doesn't need."""
    if name not in __all__:
        raise AttributeError(f"module 'epslots' has no attribute {name!r}")
    with without_collections():
        return getattr(import_module(f"epslots.{_MODULES.get(name, 'errors')}"), name)
