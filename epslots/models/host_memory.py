"""The plan of a node's RAM where it holds a part of the host store. Bytes in RAM, on disk, and read for a token.

Pure arithmetic, beside ``memory_plan.py``, which plans the device's memory.
"""

from __future__ import annotations

import msgspec

from epslots.cache.ram_cells import deal_cells, least_ram
from epslots.errors import ConfigError
from epslots.layout import RecordLayout
from epslots.models.memory_plan import MemoryPlan
from epslots.units import format_bytes


class HostMemoryPlan(msgspec.Struct, frozen=True):
    """The experts of one node in RAM and on disk; made by ``plan_host_memory``.

    Attributes:
        memory: the plan of each of its ranks.
        host_memory_bytes: RAM that the node may use for experts.
        ranks: ranks of the node, which have equal shares of that RAM.
    """

    memory: MemoryPlan
    host_memory_bytes: int
    ranks: int

    @property
    def cells(self) -> dict[RecordLayout, int]:
        """Records of each layout that a rank keeps in RAM."""
        shape = self.memory.shape
        return deal_cells(shape.layers, self.memory.quotas, shape.top_k, self.host_memory_bytes // self.ranks)

    @property
    def cell_bytes(self) -> int:
        """RAM of a rank's cells."""
        return sum(count * layout.stride for layout, count in self.cells.items())

    @property
    def ram_bytes(self) -> int:
        """Experts in the node's RAM, once its cells are full."""
        cells = sum(count * layout.nbytes for layout, count in self.cells.items())
        return min(self.memory.shape.expert_bytes, self.ranks * cells)

    @property
    def disk_bytes(self) -> int:
        """Experts that are only on disk."""
        return self.memory.shape.expert_bytes - self.ram_bytes

    @property
    def read_bytes_per_token(self) -> int:
        """Bytes read from the disk for a token, were all experts used equally often: an upper bound for steady traffic.

        A token's experts are missing from all slots with the share of those that have none, and a missing one is on disk with
        the share of the experts that RAM doesn't hold. Uneven use is what both caches live from.
        """
        shape = self.memory.shape
        used = sum(min(shape.top_k, layer.num_experts) * layer.layout.nbytes for layer in shape.layers)
        missing = max(0.0, 1 - self.memory.slots_per_expert)
        return round(used * missing * self.disk_bytes / shape.expert_bytes)


def plan_host_memory(memory: MemoryPlan, host_memory_bytes: int, ranks: int) -> HostMemoryPlan:
    """Plan a node's RAM for the experts.

    Args:
        memory: the plan of each rank.
        host_memory_bytes: RAM that the node may use for experts.
        ranks: ranks of the node.

    Raises:
        ConfigError: a rank's share doesn't hold the experts of one token in one layer.
    """
    shape = memory.shape
    least = ranks * least_ram(shape.layers, shape.top_k)
    if host_memory_bytes < least:
        each = f"{ranks} ranks of a node read" if ranks > 1 else "a step reads"
        raise ConfigError(
            f"host_memory is {format_bytes(host_memory_bytes)}: allowed are {least:,} bytes ({format_bytes(least)}) and more; "
            f"{each} the {shape.top_k} experts of a token in one layer at a time"
        )
    return HostMemoryPlan(memory, host_memory_bytes, ranks)
