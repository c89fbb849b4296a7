"""The baseline: DeepSeek's EPLB, its published rules written anew (github.com/deepseek-ai/EPLB, README and its description).

Global: experts get their redundant replicas one by one, each where load per replica is largest; the replicas, largest
first, go to the rank with least load that has a free slot. Hierarchical: groups of experts are packed onto nodes first, each
node replicates its own experts, and packs the replicas onto its ranks. Two replicas of an expert may meet on a rank.

Legend of shape suffixes: L layers, R ranks, E experts, S slots of all ranks, rank by rank.
"""

from __future__ import annotations

import numpy as np

from epslots.arrays import FloatArray, IntArray
from epslots.errors import ConfigError


def eplb(tokens_LE: IntArray | FloatArray, ranks: int, slots: int, groups: int = 1, nodes: int = 1) -> IntArray:
    """The expert of each slot, int64 [L, S], ``slots`` slots for each rank in turn.

    Args:
        tokens_LE: load of each expert.
        slots: per rank and layer.
        groups, nodes: more than one node: hierarchical, if the groups of experts divide over nodes; else global.

    Raises:
        ConfigError: fewer slots than experts, or numbers that don't divide where they must.
    """
    layers, experts = tokens_LE.shape
    total = ranks * slots
    if total < experts:
        raise ConfigError(f"EPLB places all experts: {ranks} ranks x {slots} slots are fewer than {experts} experts")
    if nodes == 1 or groups % nodes:
        groups = nodes = 1
    if experts % groups or ranks % nodes:
        raise ConfigError(f"EPLB's hierarchy takes groups that divide {experts} experts and nodes that divide {ranks} ranks")
    load_LE = np.asarray(tokens_LE, np.float64)
    rows = np.arange(layers)[:, None]
    size = experts // groups
    node_LG, _ = _pack(load_LE.reshape(layers, groups, size).sum(2), nodes)
    # Experts in the order of their nodes, [L, nodes, experts of a node].
    by_node_LG = np.argsort(node_LG, axis=1, kind="stable")
    by_node_LE = (by_node_LG[:, :, None] * size + np.arange(size)).reshape(layers * nodes, experts // nodes)
    part_LE = load_LE[np.repeat(rows, nodes, 0), by_node_LE]
    expert_LS, copies_LE = _replicate(part_LE, total // nodes)
    part_rows = np.arange(layers * nodes)[:, None]
    rank_LS, _ = _pack((part_LE / copies_LE)[part_rows, expert_LS], ranks // nodes)
    order_LS = np.argsort(rank_LS, axis=1, kind="stable")
    placed_LS = by_node_LE[part_rows, np.take_along_axis(expert_LS, order_LS, 1)]
    return placed_LS.reshape(layers, total)


def _replicate(load_LE: FloatArray, total: int) -> tuple[IntArray, IntArray]:
    """The expert of each replica, int64 [L, total]; and each expert's replicas, int64 [L, E]."""
    layers, experts = load_LE.shape
    rows = np.arange(layers)
    copies_LE = np.ones((layers, experts), np.int64)
    expert_LS = np.empty((layers, total), np.int64)
    expert_LS[:, :experts] = np.arange(experts)
    for number in range(experts, total):
        hottest_L = (load_LE / copies_LE).argmax(1)
        expert_LS[:, number] = hottest_L
        copies_LE[rows, hottest_L] += 1
    return expert_LS, copies_LE


def _pack(load_LS: FloatArray, packs: int) -> tuple[IntArray, FloatArray]:
    """The pack of each item, int64 [L, S], all packs alike; and each pack's load: largest items first."""
    layers, items = load_LS.shape
    rows = np.arange(layers)
    room = items // packs
    pack_LS = np.empty((layers, items), np.int64)
    load_LP, count_LP = np.zeros((layers, packs)), np.zeros((layers, packs), np.int64)
    for item_L in np.argsort(-load_LS, axis=1, kind="stable").T:
        pack_L = np.where(count_LP < room, load_LP, np.inf).argmin(1)
        pack_LS[rows, item_L] = pack_L
        load_LP[rows, pack_L] += load_LS[rows, item_L]
        count_LP[rows, pack_L] += 1
    return pack_LS, load_LP


def copies_held(expert_LS: IntArray, ranks: int, experts: int) -> IntArray:
    """How many slots of each rank hold each expert, int64 [L, R, E]."""
    layers, total = expert_LS.shape
    held_LRE = np.zeros((layers, ranks, experts), np.int64)
    np.add.at(held_LRE, (np.arange(layers)[:, None], np.arange(total) // (total // ranks), expert_LS), 1)
    return held_LRE
