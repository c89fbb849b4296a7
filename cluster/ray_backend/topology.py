"""Places near each other: the label by which Ray keeps a group's bundles within one rack, zone or region. Pure.

Ray packs bundles on few nodes, but doesn't know which nodes are near each other. Their labels say so, where there are any.
"""

from __future__ import annotations

from collections.abc import Sequence, Set

from cluster.ray_backend.nodes import Node, Resources, count_bundles

LEVELS = ("ray.io/gpu-domain", "epslots/rack", "ray.io/availability-zone", "ray.io/region")
"""Labels of nodes, whose values name the nodes' domains: the nearest first. The second one is for users to set."""


def near_labels(nodes: Sequence[Node], need: Resources, parts: Sequence[tuple[int, Sequence[str]]]) -> list[dict[str, str]]:
    """Ray's label selector for each group's bundles; empty = any node.

    A group that fits on a node gets none: Ray finds that node. Others get the smallest domain that has room for them, of
    several such ones the fullest, so that larger groups find room, too. Room is given to one group after the other.

    Args:
        nodes: that may be taken.
        need: resources of one bundle.
        parts: of each group the number of bundles, and the nodes of its present ones: it goes on there, if there is room.
    """
    free = {node.id: count_bundles(node.free, need) for node in nodes}
    found = []
    for count, present in parts:
        beside = free.keys() & set(present)
        label, domain = _domain(nodes, free, count, beside)
        _take(free, domain, count, beside)
        found.append(label)
    return found


def _domain(nodes: Sequence[Node], free: dict[str, int], count: int, beside: Set[str]) -> tuple[dict[str, str], list[str]]:
    """The label and the nodes of the smallest domain with room; without a label, all nodes."""
    single = [node.id for node in nodes if free[node.id] >= count]
    if single and not beside:
        return {}, [min(single, key=lambda node: (free[node], node))]
    for level in LEVELS:
        domains: dict[str, list[str]] = {}
        for node in nodes:
            if value := node.labels.get(level):
                domains.setdefault(value, []).append(node.id)
        roomy = [value for value, ids in domains.items() if sum(free[id] for id in ids) >= count]
        if beside:  # Ray knows nothing of the older bundles
            roomy = [value for value in roomy if set(domains[value]) >= beside]
        if roomy:
            value = min(roomy, key=lambda value: (sum(free[id] for id in domains[value]), value))
            return {level: value}, domains[value]
    return {}, [node.id for node in nodes]


def _take(free: dict[str, int], domain: Sequence[str], count: int, beside: Set[str]) -> None:
    """Give bundles of these nodes away, of the nodes with most room first, as "PACK" does."""
    for node in sorted(domain, key=lambda node: (node not in beside, -free[node], node)):
        given = min(count, free[node])
        free[node] -= given
        count -= given
