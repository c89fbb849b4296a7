"""The simulator's clock: how long a machine's operations take.

Ranks decide by ``Costs``; ``Timing`` adds links between nodes and the rest of a layer, such as attention. Device classes have
the bandwidths of data sheets, at the share that copies and matrix products usually reach: good enough to compare choices. To
predict a machine, give its measured costs. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from epslots.piece_sizes import PIECE_BYTES
from epslots.planner.cost_model import Costs


@dataclass(frozen=True)
class Device:
    """Bandwidths of one rank's device in GB/s, and its compute in TFLOP/s (bf16, dense).

    Attributes:
        memory: of the device's own memory.
        host: from the node's host memory.
        peer: to and from another rank of the node, one way.
        network: to and from another node, one way, for each rank.
        tflops: of the device's compute.
        latency_us: of an empty collective within a node.
        network_latency_us: added by other nodes.
    """

    memory: float
    host: float
    peer: float
    network: float
    tflops: float
    latency_us: float
    network_latency_us: float


# Data sheets: NVIDIA A100 SXM (NVLink 3, PCIe 4 x16, HDR 200), H100 and H200 SXM (NVLink 4, PCIe 5 x16, NDR 400),
# L40S (no NVLink: peers through PCIe 4 x16). "cpu" is a socket with gloo.
DEVICES = {
    "a100": Device(2039, 32, 300, 25, 312, 15, 15),
    "h100": Device(3350, 64, 450, 50, 989, 12, 12),
    "h200": Device(4800, 64, 450, 50, 989, 12, 12),
    "l40s": Device(864, 32, 16, 12.5, 362, 25, 20),
    "cpu": Device(40, 10, 2, 1, 0.5, 80, 100),
}
DEFAULT_DEVICE = "h100"
# The share of a link's bandwidth that copies reach, and of a device's compute that products of few rows reach.
LINK_SHARE, COMPUTE_SHARE = 0.8, 0.5
# bf16
_BYTES_PER_WEIGHT = 2


class Timing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Durations on the simulated clock, in nanoseconds.

    Attributes:
        costs: by which the ranks decide, and from which most of their time follows.
        far_pair: a pair's transfer to another node, one way.
        far_fetch: an expert's copy from another node's rank.
        far_exchange: added to a collective if there are other nodes.
        layer: the fixed part of a layer without its experts, such as attention.
        token: added to it for each of the rank's tokens.
    """

    costs: Costs
    far_pair: int
    far_fetch: int
    far_exchange: int
    layer: int
    token: int

    def __post_init__(self) -> None:
        for name in self.__struct_fields__[1:]:
            value = getattr(self, name)
            if not isinstance(value, int) or not 0 <= value < 2**40:
                raise ValueError(f"{name}={value!r}: allowed: nanoseconds, an int from 0 to {2**40 - 1}")


def timing_of(device: Device, expert_bytes: int, row_bytes: int, layer_ns: int = 0, token_ns: int = 0) -> Timing:
    """A device's timing for a model.

    Args:
        expert_bytes: of one expert's weights, in bf16.
        row_bytes: of one token's hidden state.
        layer_ns, token_ns: of a layer without its experts, see ``Timing``.
    """

    def carry(size: int, gigabytes: float) -> int:  # bytes / (GB/s) = ns
        return max(1, round(size / (gigabytes * LINK_SHARE)))

    flops = 2 * expert_bytes / _BYTES_PER_WEIGHT
    costs = Costs(
        host_fetch=carry(expert_bytes, device.host),
        peer_fetch=carry(expert_bytes, device.peer),
        pair_transfer=carry(row_bytes, device.peer),
        pair_compute=max(1, round(flops / (device.tflops * COMPUTE_SHARE * 1e3))),
        expert_compute=carry(expert_bytes, device.memory),
        exchange=round(device.latency_us * 1e3),
        gather=round(device.latency_us * 1e3),
    )
    far = round(device.network_latency_us * 1e3)
    return Timing(
        costs, carry(row_bytes, device.network), carry(expert_bytes, device.network), far, int(layer_ns), int(token_ns)
    )


HOST_COPY_BYTES_S = 10e9
"""Bytes a second of a thread's copy within a host's memory; typical of servers."""


@dataclass(frozen=True)
class HandOverTiming:
    """How long a request's cache takes from one rank to another, piece by piece.

    A piece goes out of its device, is copied into a connection's memory, crosses the network between two nodes, is copied out
    of that memory, and goes into the other device. While one is in a stage, another is in the next.

    Attributes:
        fixed_s: seconds of its messages.
        host_bytes_s, network_bytes_s: bytes a second between a device and its host's memory, and between two nodes.
        copy_bytes_s: bytes a second of a copy within a host's memory.
    """

    fixed_s: float
    host_bytes_s: float
    network_bytes_s: float
    copy_bytes_s: float = HOST_COPY_BYTES_S

    def piece_s(self, nbytes: int, *, same_node: bool) -> float:
        """Seconds of one piece: of all stages."""
        return sum(self._stages_s(nbytes, same_node))

    def busy_s(self, nbytes: int, *, same_node: bool) -> float:
        """Seconds until the next piece can follow: of the longest stage."""
        return max(self._stages_s(nbytes, same_node))

    def transfer_s(self, nbytes: int, *, same_node: bool) -> float:
        """Seconds of so many bytes, in pieces that follow one another."""
        first = min(nbytes, PIECE_BYTES)
        return self.piece_s(first, same_node=same_node) + self.busy_s(nbytes - first, same_node=same_node)

    def _stages_s(self, nbytes: int, same_node: bool) -> list[float]:
        device_s, copy_s = nbytes / self.host_bytes_s, nbytes / self.copy_bytes_s
        stages = [device_s, copy_s, copy_s, device_s]
        return stages if same_node else [*stages, nbytes / self.network_bytes_s]


HAND_OVER_FIXED_S = 0.02
"""Seconds of a hand-over's messages, before one was measured."""


def hand_over_of(device: Device, fixed_s: float = HAND_OVER_FIXED_S) -> HandOverTiming:
    """A device's hand-overs; they go through the host's memory."""
    return HandOverTiming(fixed_s, device.host * LINK_SHARE * 1e9, device.network * LINK_SHARE * 1e9)
