"""Where experts should live: a hint to the caches, never a rule (any rank can compute any expert).

Pure: integer arrays in, integer arrays out. Legend of shape suffixes: L MoE layers, R ranks, E experts of the largest layer.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from epslots.arrays import BoolArray, IntArray
from epslots.errors import ConfigError

MOST_GENERATIONS = 2**40
MOST_RANKS = 1024
MOST_LAYERS = 4096
# Experts of all layers, each layer counted as the largest; and the same times the ranks. Tables have so many entries.
MOST_EXPERTS = 2**20
MOST_COPIES = 2**26


@dataclass(frozen=True)
class Placement:
    """Where the experts of all layers should live.

    Attributes:
        version: only ever grows; 0 = dealt by slots, knowing nothing of the traffic.
        num_experts_L: int64, experts of each layer. Entries of the arrays below beyond them mean nothing.
        home_LE: int64, the rank that fetches an expert which nobody holds.
        wanted_LRE: bool, the copies that should stay resident. Where any of an expert is wanted, one is at home. The rest of
            the slots is left to the caches.
        quota_LR: int64, slots of each layer on each rank, at least 1 and at most the layer's experts.
    """

    version: int
    num_experts_L: IntArray
    home_LE: IntArray
    wanted_LRE: BoolArray
    quota_LR: IntArray

    @property
    def ranks(self) -> int:
        return int(self.quota_LR.shape[1])

    def check(self) -> None:
        """Raise ConfigError, naming the first layer that breaks a rule of the attributes above."""
        layers, ranks, experts = self.wanted_LRE.shape
        if self.home_LE.shape != (layers, experts) or self.quota_LR.shape != (layers, ranks) or not (layers and ranks):
            raise ConfigError(
                f"a placement's arrays must agree: home {list(self.home_LE.shape)}, wanted {list(self.wanted_LRE.shape)}, "
                f"slots {list(self.quota_LR.shape)}; allowed: [layers, experts], [layers, ranks, experts], [layers, ranks]"
            )
        for name, array in (("home", self.home_LE), ("slots", self.quota_LR), ("experts", self.num_experts_L)):
            if array.dtype != np.int64:
                raise ConfigError(f"a placement's {name} are {array.dtype}; allowed: int64")
        if not 0 <= self.version <= MOST_GENERATIONS:
            raise ConfigError(f"a placement's version is {self.version}; allowed: 0 to {MOST_GENERATIONS}")
        if self.num_experts_L.shape != (layers,) or int(self.num_experts_L.max()) != experts or self.num_experts_L.min() < 1:
            raise ConfigError(f"a placement of {layers} layers has experts {self.num_experts_L.tolist()}, widest {experts}")
        own_LE = np.arange(experts) < self.num_experts_L[:, None]
        rules = {
            f"a home outside of ranks 0 to {ranks - 1}": (own_LE & ((self.home_LE < 0) | (self.home_LE >= ranks))).any(1),
            "slots below 1 or above its experts": ((self.quota_LR < 1) | (self.quota_LR > self.num_experts_L[:, None])).any(1),
            "a wanted copy of an expert that there is not": (self.wanted_LRE.any(1) & ~own_LE).any(1),
            "more wanted copies on a rank than slots": (self.wanted_LRE.sum(2) > self.quota_LR).any(1),
        }
        if not rules[f"a home outside of ranks 0 to {ranks - 1}"].any():
            homes_LE = np.where(own_LE, self.home_LE, 0)
            at_home_LE = np.take_along_axis(self.wanted_LRE, homes_LE[:, None], 1)[:, 0]
            rules["wanted copies of an expert, none at its home"] = (self.wanted_LRE.any(1) & ~at_home_LE).any(1)
        for rule, broken_L in rules.items():
            if broken_L.any():
                raise ConfigError(f"a placement's layer {int(broken_L.argmax())} has {rule}")


def check_size(layers: int, ranks: int, experts: int) -> None:
    """Refuse numbers whose tables would be too large to be made, sent or kept.

    Raises:
        ConfigError: with what is allowed.
    """
    of_layers = layers * experts
    if ranks > MOST_RANKS or layers > MOST_LAYERS or of_layers > MOST_EXPERTS or of_layers * ranks > MOST_COPIES:
        raise ConfigError(
            f"{layers} layers of up to {experts} experts on {ranks} ranks: allowed: {MOST_LAYERS} layers, {MOST_RANKS} ranks, "
            f"{MOST_EXPERTS:,} experts of all layers, {MOST_COPIES:,} of all layers and ranks"
        )


def default_homes(num_experts: int, quota_R: IntArray, layer: int) -> IntArray:
    """The home rank of each expert when nothing is known of the traffic, int64 [E].

    Ranks get neighbouring experts in proportion to their slots. With more ranks than experts, or numbers that don't divide,
    some ranks get one less; which ones goes round from layer to layer.
    """
    ranks = len(quota_R)
    turned = (np.arange(ranks) + layer) % ranks
    ends = quota_R[turned].cumsum()
    middle = (2 * np.arange(num_experts) + 1) * int(ends[-1])
    homes: IntArray = turned[np.searchsorted(2 * num_experts * ends, middle, side="right")]
    return homes


def default_placement(num_experts_L: Sequence[int], quota_LR: IntArray) -> Placement:
    """What ranks begin with: homes dealt by slots, no copy wanted. Generation 0."""
    layers, experts = len(num_experts_L), max(num_experts_L)
    check_size(layers, quota_LR.shape[1], experts)
    home_LE = np.full((layers, experts), -1)
    for layer, count in enumerate(num_experts_L):
        home_LE[layer, :count] = default_homes(count, quota_LR[layer], layer)
    wanted_LRE = np.zeros((layers, quota_LR.shape[1], experts), bool)
    return Placement(0, np.array(num_experts_L, np.int64), home_LE, wanted_LRE, quota_LR.astype(np.int64))


def first_residents(placement: Placement) -> BoolArray:
    """What ranks fill their slots with before they serve, bool [L, R, E].

    What the placement wants; besides, where all ranks together have a slot for every expert of a layer, what is at home.
    """
    _, ranks, experts = placement.wanted_LRE.shape
    own_LE = np.arange(experts) < placement.num_experts_L[:, None]
    at_home_LRE = (placement.home_LE[:, None] == np.arange(ranks)[:, None]) & own_LE[:, None]
    at_home_LRE &= (placement.quota_LR.sum(1) >= placement.num_experts_L)[:, None, None]
    at_home_LRE |= (placement.quota_LR == placement.num_experts_L[:, None])[:, :, None] & own_LE[:, None]
    others_LRE = at_home_LRE & ~placement.wanted_LRE
    room_LR1 = (placement.quota_LR - placement.wanted_LRE.sum(2))[:, :, None]
    residents: BoolArray = placement.wanted_LRE | (others_LRE & (others_LRE.cumsum(2) <= room_LR1))
    return residents


def carry_over(placement: Placement, rank_of_old: Sequence[int], quota_LR: IntArray) -> Placement:
    """The placement for a group in which ranks were lost, joined, or have other numbers. The next version.

    Wanted copies stay where their rank stays. An expert whose home is gone gets one where a copy is wanted, else as if nothing
    were known.

    Args:
        rank_of_old: the new number of each rank of the placement, -1 = lost.
        quota_LR: slots of the new ranks.
    """
    layers, _, experts = placement.wanted_LRE.shape
    ranks = quota_LR.shape[1]
    old = np.array(rank_of_old)
    wanted_LRE = np.zeros((layers, ranks, experts), bool)
    wanted_LRE[:, old[old >= 0]] = placement.wanted_LRE[:, old >= 0]
    # What no longer fits goes, last experts first: a hint needs no better reason.
    wanted_LRE &= wanted_LRE.cumsum(2) <= quota_LR[:, :, None]
    kept_LE = np.where(placement.home_LE >= 0, old[placement.home_LE], -1)
    fresh_LE = default_placement(placement.num_experts_L.tolist(), quota_LR).home_LE
    home_LE = np.where(kept_LE >= 0, kept_LE, fresh_LE)
    copied_LE = wanted_LRE.any(1)
    at_home_LE = np.take_along_axis(wanted_LRE, np.maximum(home_LE, 0)[:, None], 1)[:, 0]
    home_LE = np.where(copied_LE & ~at_home_LE, wanted_LRE.argmax(1), home_LE)
    return Placement(placement.version + 1, placement.num_experts_L, home_LE, wanted_LRE, quota_LR.astype(np.int64))


class _Packed(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """A placement as a message: arrays as little-endian bytes, booleans packed."""

    version: int
    num_experts: list[int]
    ranks: int
    home: bytes
    wanted: bytes
    quota: bytes
    checksum: int


def pack(placement: Placement) -> bytes:
    """The placement as a message, or as a file."""
    home = placement.home_LE.astype("<i4").tobytes()
    wanted = np.packbits(placement.wanted_LRE).tobytes()
    quota = placement.quota_LR.astype("<i4").tobytes()
    experts = placement.num_experts_L.tolist()
    checksum = zlib.crc32(home + wanted + quota)
    return msgspec.msgpack.encode(_Packed(placement.version, experts, placement.ranks, home, wanted, quota, checksum))


def unpack(message: bytes) -> Placement:
    """A placement from its message.

    Raises:
        ConfigError: it is none, or breaks a rule of ``Placement``.
    """
    try:
        packed = msgspec.msgpack.decode(message, type=_Packed)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ConfigError("this is no placement, as `epslots placement plan` writes them") from error
    layers, ranks = len(packed.num_experts), packed.ranks
    experts = max(packed.num_experts, default=0)
    entries = layers * ranks * experts
    if min(packed.num_experts, default=0) < 1 or ranks < 1:
        raise ConfigError(f"a placement of {layers} layers, {ranks} ranks and {experts} experts can't be")
    check_size(layers, ranks, experts)
    sizes = {"home": 4 * layers * experts, "wanted": -(-entries // 8), "quota": 4 * layers * ranks}
    if any(len(getattr(packed, name)) != size for name, size in sizes.items()):
        raise ConfigError(f"a placement's arrays have the wrong sizes; these were expected, in bytes: {sizes}")
    if zlib.crc32(packed.home + packed.wanted + packed.quota) != packed.checksum:
        raise ConfigError("a placement's arrays were damaged on their way")
    placement = Placement(
        version=packed.version,
        num_experts_L=np.array(packed.num_experts, np.int64),
        home_LE=np.frombuffer(packed.home, "<i4").reshape(layers, experts).astype(np.int64),
        wanted_LRE=np.unpackbits(np.frombuffer(packed.wanted, np.uint8), count=entries)
        .astype(bool)
        .reshape(layers, ranks, experts),
        quota_LR=np.frombuffer(packed.quota, "<i4").reshape(layers, ranks).astype(np.int64),
    )
    placement.check()
    return placement
