"""The nodes of a Ray cluster: their resources, and the choice of nodes for bundles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import ray
import ray._private.state as ray_state

from cluster.errors import ClusterError
from cluster.ray_backend.connect import RANK_RESOURCE

NODE_LABEL = "ray.io/node-id"  # Ray gives each node this label

Resources = Mapping[str, float]


class NoRoom(ClusterError):
    """Bundles don't fit; ``later``: they would if all resources were free."""

    def __init__(self, message: str, later: bool) -> None:
        super().__init__(message)
        self.later = later


@dataclass(frozen=True)
class Node:
    """A node that is alive.

    Attributes:
        id: Ray's, in hexadecimal.
        host: the address by which Ray knows it.
        name: of the machine.
        total, free: its resources, by name. Ray updates ``free`` some tenths of a second late.
        labels: that Ray or the user gave it.
    """

    id: str
    host: str
    name: str
    total: Resources
    free: Resources
    labels: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        known_by = self.host if self.name in ("", self.host) else f"{self.host} ({self.name})"
        return f"node {known_by}"


def read_nodes() -> list[Node]:
    """All nodes that are alive."""
    free = ray_state.available_resources_per_node()
    return [
        Node(
            node["NodeID"],
            node["NodeManagerAddress"],
            node["NodeManagerHostname"],
            node["Resources"],
            free[node["NodeID"]],
            node["Labels"],
        )
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] in free
    ]


def lacks_model(path: str) -> bytes:
    """Why a checkpoint folder can't be used on this node, as msgpack; empty if it can."""
    try:
        if (Path(path) / "config.json").is_file():
            return b""
        reason = "has no config.json there" if Path(path).is_dir() else "has no such folder"
    except OSError as error:
        reason = f"can't look there: {error.strerror}"
    return msgspec.msgpack.encode(reason)


def need_of_bundle(nodes: Sequence[Node], device: str | None) -> dict[str, float]:
    """Resources of one bundle: a GPU if there are any, unless the CPU is asked for.

    Raises:
        ClusterError: GPUs are asked for, and there are none.
    """
    gpus = sum(node.total.get("GPU", 0) for node in nodes)
    if device is not None and device.startswith("cuda") and not gpus:
        raise ClusterError(
            f'device="{device}", and Ray knows of no GPU on {_list(nodes)}. If there are some: see that nvidia-smi lists them '
            f'there, and that Ray was started with --num-gpus or without it. To compute on CPUs: device="cpu"'
        )
    gpu = {"GPU": 1.0} if gpus and (device is None or device.startswith("cuda")) else {}
    share = RANK_RESOURCE if any(RANK_RESOURCE in node.total for node in nodes) else "CPU"
    return {**gpu, share: 1.0}


def count_bundles(resources: Resources, need: Resources) -> int:
    """The number of bundles that fit into these resources."""
    return int(min(resources.get(name, 0) // amount for name, amount in need.items()))


def choose_nodes(nodes: Sequence[Node], need: Resources, ranks: int, strategy: str, taken: Sequence[str]) -> str | None:
    """Ray's label selector for the nodes of further bundles; None = any node.

    Ray applies the strategy to the bundles of one reservation; the selector applies it to all.

    Args:
        need: resources of one bundle.
        ranks: number of bundles to reserve.
        taken: the node of each present bundle.

    Raises:
        NoRoom: they don't fit; the message has the numbers of every node, and says what to do.
    """
    free = {node.id: count_bundles(node.free, need) for node in nodes}
    total = {node.id: count_bundles(node.total, need) for node in nodes}
    allowed = set(free)
    if taken and strategy == "STRICT_PACK":
        allowed &= set(taken)
    if taken and strategy == "STRICT_SPREAD":
        allowed -= set(taken)
    if strategy == "STRICT_PACK":
        fits = any(free[node] >= ranks for node in allowed)
        could = any(total[node] >= ranks + taken.count(node) for node in allowed)
        rule = "on one node"
    elif strategy == "STRICT_SPREAD":
        fits = sum(free[node] > 0 for node in allowed) >= ranks
        could = sum(total[node] > 0 for node in allowed) >= ranks
        rule = "each on a node of its own"
    else:
        fits = sum(free.values()) >= ranks
        could = sum(total.values()) >= ranks + len(taken)
        rule = ""
    if not fits:
        raise NoRoom(_refusal(nodes, need, ranks, rule, taken, could), could)
    names = ",".join(sorted(set(taken)))
    unused = sum(free[node] for node in free.keys() - set(taken))
    if taken and (strategy == "STRICT_SPREAD" or (strategy == "SPREAD" and unused >= ranks)):
        return f"!in({names})"
    return f"in({names})" if taken and strategy == "STRICT_PACK" else None


def _refusal(
    nodes: Sequence[Node],
    need: Resources,
    ranks: int,
    rule: str,
    taken: Sequence[str],
    could: bool,
) -> str:
    what = "GPU" if "GPU" in need else "CPU"
    amount = f"{ranks} {'more ' if taken else ''}rank{'s' if ranks > 1 else ''}"
    each = " and ".join(f"{number:g} {name}" for name, number in need.items() if name != RANK_RESOURCE)
    lines = [f"no room for {amount}{', ' * bool(rule)}{rule}: each takes {each}, and the cluster has"]
    for node in nodes:
        ours = f", {taken.count(node.id)} taken by ranks of this cluster" if node.id in taken else ""
        amounts = " and ".join(
            f"{node.free.get(name, 0):g} of {node.total.get(name, 0):g} {name}s free" for name in need if name != RANK_RESOURCE
        )
        lines.append(f"  {node}: {amounts}{ours}")
    advice = ["ask for fewer ranks", "start more nodes (`ray start --address=...`)"]
    if could:
        advice.append("end what holds the rest (`ray status -v` shows it)")
    elif what == "CPU":
        advice.append("start Ray with more CPUs (`--num-cpus`: they are only counted)")
    if rule:
        advice.append('take strategy="PACK"')
    return "\n".join(lines) + f"\nWhat helps: {', or '.join(advice)}."


def _list(nodes: Sequence[Node]) -> str:
    return ", ".join(str(node) for node in nodes)
