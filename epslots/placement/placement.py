"""A placement: the home, the wanted copies and the slots of every layer's experts. A hint: any rank can compute any expert.

    home      the rank that comes first to fetch an expert that no rank holds
    wanted    a copy that should stay resident on a rank: at home, or a replica
    quota     slots of a layer on a rank; slots without a wanted copy are the cache's

Pure. Legend of shape suffixes: L MoE layers, R ranks, E experts of the largest layer.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from epslots.arrays import BoolArray, IntArray
from epslots.errors import ConfigError

MOST_VERSIONS = 2**40
MOST_RANKS = 1024
MOST_LAYERS = 4096
# Entries of tables: experts of all layers, each layer counted as the largest; and the same times the ranks.
MOST_EXPERTS = 2**20
MOST_COPIES = 2**26


@dataclass(frozen=True)
class Placement:
    """Homes, wanted copies and slots of all layers.

    Attributes:
        version: only grows; 0 = dealt by slots, without knowledge of the traffic.
        num_experts_L: int64, experts of each layer. Entries of the arrays below beyond them are meaningless.
        home_LE: int64, the rank that fetches an expert which no rank holds.
        wanted_LRE: bool, the copies that should stay resident. If any copy of an expert is wanted, one is wanted at home. The
            other slots are left to the caches.
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
        if not 0 <= self.version <= MOST_VERSIONS:
            raise ConfigError(f"a placement's version is {self.version}; allowed: 0 to {MOST_VERSIONS}")
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
    """Refuse sizes whose tables would be too large to make, send or keep.

    Raises:
        ConfigError: the sizes exceed the limits.
    """
    of_layers = layers * experts
    if ranks > MOST_RANKS or layers > MOST_LAYERS or of_layers > MOST_EXPERTS or of_layers * ranks > MOST_COPIES:
        raise ConfigError(
            f"{layers} layers of up to {experts} experts on {ranks} ranks: allowed: {MOST_LAYERS} layers, {MOST_RANKS} ranks, "
            f"{MOST_EXPERTS:,} experts of all layers, {MOST_COPIES:,} of all layers and ranks"
        )


def default_homes(num_experts: int, quota_R: IntArray, layer: int) -> IntArray:
    """The home rank of each expert without knowledge of the traffic, int64 [E].

    Ranks get consecutive experts in proportion to their slots. Where these don't divide evenly, some ranks get one expert
    less; which ones rotates from layer to layer.

    Args:
        quota_R: slots of the layer on each rank.
        layer: the layer's index.
    """
    ranks = len(quota_R)
    turned = (np.arange(ranks) + layer) % ranks
    ends = quota_R[turned].cumsum()
    middle = (2 * np.arange(num_experts) + 1) * int(ends[-1])
    homes: IntArray = turned[np.searchsorted(2 * num_experts * ends, middle, side="right")]
    return homes


def default_placement(num_experts_L: Sequence[int], quota_LR: IntArray) -> Placement:
    """The placement at the start, version 0: homes dealt by slots, no copy wanted.

    Args:
        num_experts_L: experts of each layer.
        quota_LR: slots of each layer on each rank.
    """
    layers, experts = len(num_experts_L), max(num_experts_L)
    check_size(layers, quota_LR.shape[1], experts)
    home_LE = np.full((layers, experts), -1)
    for layer, count in enumerate(num_experts_L):
        home_LE[layer, :count] = default_homes(count, quota_LR[layer], layer)
    wanted_LRE = np.zeros((layers, quota_LR.shape[1], experts), bool)
    return Placement(0, np.array(num_experts_L, np.int64), home_LE, wanted_LRE, quota_LR.astype(np.int64))


def first_residents(placement: Placement) -> BoolArray:
    """The experts that ranks load before they serve, bool [L, R, E].

    These are the wanted copies; and the experts at home, in layers of which all ranks together have a slot for every expert.
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
    """The placement for a group in which ranks were lost, joined or renumbered; the next version.

    Wanted copies of remaining ranks stay. An expert whose home is lost gets one where a copy is wanted, else the default home.

    Args:
        rank_of_old: the new number of each rank of the placement, -1 = lost.
        quota_LR: slots of the new ranks.
    """
    layers, _, experts = placement.wanted_LRE.shape
    ranks = quota_LR.shape[1]
    old = np.array(rank_of_old)
    wanted_LRE = np.zeros((layers, ranks, experts), bool)
    wanted_LRE[:, old[old >= 0]] = placement.wanted_LRE[:, old >= 0]
    # Wanted copies that no longer fit are dropped, last experts first: for a hint that is good enough.
    wanted_LRE &= wanted_LRE.cumsum(2) <= quota_LR[:, :, None]
    kept_LE = np.where(placement.home_LE >= 0, old[placement.home_LE], -1)
    fresh_LE = default_placement(placement.num_experts_L.tolist(), quota_LR).home_LE
    home_LE = np.where(kept_LE >= 0, kept_LE, fresh_LE)
    copied_LE = wanted_LRE.any(1)
    at_home_LE = np.take_along_axis(wanted_LRE, np.maximum(home_LE, 0)[:, None], 1)[:, 0]
    home_LE = np.where(copied_LE & ~at_home_LE, wanted_LRE.argmax(1), home_LE)
    return Placement(placement.version + 1, placement.num_experts_L, home_LE, wanted_LRE, quota_LR.astype(np.int64))


class _Packed(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """A placement as a message: arrays as little-endian bytes, booleans as bits."""

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
        ConfigError: the bytes are not a placement, or it breaks a rule of ``Placement``.
    """
    try:
        packed = msgspec.msgpack.decode(message, type=_Packed)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ConfigError("this is no placement, as `epslots placement plan` writes them") from error
    layers, ranks = len(packed.num_experts), packed.ranks
    experts = max(packed.num_experts, default=0)
    entries = layers * ranks * experts
    if min(packed.num_experts, default=0) < 1 or ranks < 1:
        raise ConfigError(f"a placement of {layers} layers, {ranks} ranks and {experts} experts is impossible")
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
