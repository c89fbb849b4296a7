"""A window of load: one rank's counters over a stretch of steps, from which placements are decided.

``telemetry.py`` makes it, ranks send it to the controller, and ``check`` refuses windows that can't be right there.

Pure. Legend of shape suffixes: L MoE layers, E experts of the largest layer.
"""

from __future__ import annotations

import math

import msgspec
import numpy as np

from epslots.arrays import IntArray
from epslots.errors import ConfigError

# Larger counts or times in one window are errors, and would overflow sums.
LARGEST_COUNT = 2**44
_LONGEST_S = 1e6


class LoadWindow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Counters of one rank over a window; arrays are int64, little-endian, row by row.

    Attributes:
        steps: steps in which any rank had tokens, by the layer with most of them.
        seconds: their duration, pauses included.
        tokens: [L, E], (token, k) pairs of this rank's own tokens.
        uses: [L, E], steps in which any rank used the expert; equal on all ranks.
        reuse: [L, E + 1], a sample of the experts' stack distances over all ranks (``reuse_distance.py``); equal on all ranks.
        hits, misses: uses of experts that this rank computed, by layer.
        pairs_sent, pairs_received: own pairs that other ranks computed, and theirs that this rank did, by layer.
        compute_s: seconds in which this rank computed experts, by layer; 0 where that isn't known.
        placement: version of the placement that is followed at the end.
        pending_migrations: copies and slots that have yet to be moved for it.
        dropped: windows before this one that the rank could not send.
    """

    steps: int
    seconds: float
    tokens: bytes
    uses: bytes
    reuse: bytes
    hits: tuple[int, ...]
    misses: tuple[int, ...]
    pairs_sent: tuple[int, ...]
    pairs_received: tuple[int, ...]
    compute_s: tuple[float, ...]
    placement: int = 0
    pending_migrations: int = 0
    dropped: int = 0

    def tokens_LE(self, layers: int, experts: int) -> IntArray:
        return np.frombuffer(self.tokens, "<i8").reshape(layers, experts)

    def uses_LE(self, layers: int, experts: int) -> IntArray:
        return np.frombuffer(self.uses, "<i8").reshape(layers, experts)

    def reuse_LD(self, layers: int, experts: int) -> IntArray:
        return np.frombuffer(self.reuse, "<i8").reshape(layers, experts + 1)

    def check(self, num_experts_L: IntArray) -> None:
        """Raise ConfigError, naming the field, if this can't be a window of a model with these experts in its layers."""
        layers, experts = len(num_experts_L), int(num_experts_L.max())
        sizes = {"tokens": experts, "uses": experts, "reuse": experts + 1}
        for name, width in sizes.items():
            given, allowed = len(getattr(self, name)), 8 * layers * width
            if given != allowed:
                raise ConfigError(f"{name} has {given} bytes; allowed: {allowed}, int64 [{layers}, {width}]")
            array = np.frombuffer(getattr(self, name), "<i8").reshape(layers, width)
            self._check_range(name, int(array.min()), int(array.max()))
            if (array[:, :experts] * (np.arange(experts) >= num_experts_L[:, None])).any() and name != "reuse":
                raise ConfigError(f"{name} counts experts that don't exist")
        if (self.uses_LE(layers, experts) > self.steps).any():
            raise ConfigError(f"uses exceed the {self.steps} steps of the window")
        for name in _INTEGERS_BY_LAYER:
            values = getattr(self, name)
            if len(values) != layers:
                raise ConfigError(f"{name} has {len(values)} layers; allowed: {layers}")
            self._check_range(name, min(values), max(values))
        for name in _SECONDS_BY_LAYER:
            values = getattr(self, name)
            if len(values) != layers or not all(math.isfinite(s) and 0 <= s <= _LONGEST_S for s in values):
                raise ConfigError(f"{name} is {values!r:.80}; allowed: {layers} numbers from 0 to {_LONGEST_S:g}")
        if not (math.isfinite(self.seconds) and 0 <= self.seconds <= _LONGEST_S):
            raise ConfigError(f"seconds is {self.seconds!r}; allowed: 0 to {_LONGEST_S:g}")
        for name in ("steps", "placement", "pending_migrations", "dropped"):
            self._check_range(name, getattr(self, name), getattr(self, name))

    @staticmethod
    def _check_range(name: str, least: int, most: int) -> None:
        if least < 0 or most > LARGEST_COUNT:
            raise ConfigError(f"{name} has {least if least < 0 else most}; allowed: 0 to {LARGEST_COUNT}")


_INTEGERS_BY_LAYER, _SECONDS_BY_LAYER = (
    [field.name for field in msgspec.structs.fields(LoadWindow) if field.type == kind]
    for kind in (tuple[int, ...], tuple[float, ...])
)
