"""The simulator's clock: how long a machine's operations take.

Ranks decide by ``Costs``; ``Timing`` adds links between nodes and the rest of a layer, such as attention. Device classes have
the bandwidths of data sheets, at the share that copies and matrix products usually reach: good enough to compare choices. To
predict a machine, give its measured costs. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from epslots.planner.cost_model import Costs


@dataclass(frozen=True)
class Device:
    """Bandwidths of one rank's device in GB/s, and its compute in TFLOP/s (bf16, dense).

    Attributes:
        memory: of the device's own memory.
        host: from the node's host memory.
        peer: to and from another rank of the node, one way.
        network: to and from another node, one way, for each rank.
        tflops: see above.
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


@dataclass(frozen=True)
class HandOverTiming:
    """How long a request's cache takes from one rank to another.

    Attributes:
        fixed_s: seconds of its messages.
        host_bytes_s, network_bytes_s: bytes a second between a device and its host's memory, and between two nodes.
    """

    fixed_s: float
    host_bytes_s: float
    network_bytes_s: float

    def transfer_s(self, nbytes: int, *, same_node: bool) -> float:
        """Seconds of the bytes: out of one device, and into the other. If they are apart, over the network in between.

        The stages are taken to follow one another.
        """
        seconds = 2 * nbytes / self.host_bytes_s
        return seconds if same_node else seconds + nbytes / self.network_bytes_s


HAND_OVER_FIXED_S = 0.02
"""Seconds of a hand-over's messages, before one was measured."""


def hand_over_of(device: Device, fixed_s: float = HAND_OVER_FIXED_S) -> HandOverTiming:
    """A device's hand-overs; they go through the host's memory."""
    return HandOverTiming(fixed_s, device.host * LINK_SHARE * 1e9, device.network * LINK_SHARE * 1e9)
