"""Which process of pytest-xdist runs which module, and when: what waits longest begins first, and keeps no other waiting."""

from __future__ import annotations

from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

WAITING = {
    "ray nodes": (
        "tests/cluster/test_ray_cluster.py",
        "tests/cluster/test_ray_job.py",
        "tests/cluster/test_ray_nodes.py",
        "tests/cluster/test_ray_session.py",
    ),
    "ray": ("tests/cluster/test_ray_",),
}
"""The order of tests: modules that start Ray mostly wait, so they begin first; more than two Rays at once would be slow.

Modules whose Ray outlives its driver (test_ray_adoption, test_ray_driver_dies) are in one group: beside each other, one's Ray
didn't come up.
"""

GROUPS = WAITING | {
    "forking": (
        "tests/cache/test_host_store.py",
        "tests/cluster/test_processes.py",
        "tests/generation/test_balanced_ranks.py",
        "tests/generation/test_isolation_ranks.py",
        "tests/group/test_ranks_gloo.py",
        "tests/serve/test_kills.py",
        "tests/transport/",
    ),
}
"""Modules, or what their names begin with, whose tests run one after another in one process of pytest-xdist.

What runs ranks as processes shares a server that forks them, and has to import everything first (support/rank_helpers.py). A
module belongs to the first group that names it.
"""

LONG = (
    "tests/simulated_gpu/test_captured_decoding.py",
    "tests/simulated_gpu/test_captured_pieces.py",
    "tests/generation/test_rows.py",
    "tests/generation/test_batchers.py",
    "tests/equality/test_matrix.py",
    "forking",
    "tests/cluster/test_cluster.py",
    "tests/moe/test_batch_invariance.py",
    "tests/simulated_gpu/test_models.py",
    "tests/generation/test_engine.py",
    "tests/group/test_ranks_driver.py",
    "tests/cluster/test_controlled_cluster.py",
    "tests/cli/test_cli.py",
    "tests/generation/test_isolation.py",
    "tests/cuda_graph/test_triton_kernels.py",
    "tests/models/test_known_shapes.py",
    "tests/simulation/test_simulated_group.py",
    "tests/host/test_compiled.py",
    "tests/generation/test_paged_next_token.py",
    "tests/serve/test_fuzz.py",
)
"""Modules and groups that take more than ten seconds, or more than five with few tests: one that began last would keep a core
idle.

What forks ranks waits for them half of its time. So it begins when what waits for Ray is nearly done, and another computes
beside it.
"""

_COMPUTING = 2
"""Processes that a machine of two cores needs, beside those that wait."""


def unit_of(nodeid: str) -> str:
    """A test's group, or its module."""
    return next((name for name, modules in GROUPS.items() if nodeid.startswith(modules)), nodeid.partition("::")[0])


class GroupScheduling(LoadScopeScheduling):
    """Modules that wait for Ray, then those that take long, each in their order; then others, those with most tests first.

    With enough processes, one that has waited for Ray gets nothing else: it has left the cores to the others until then, and
    processes beyond the cores slow each other down.
    """

    def _split_scope(self, nodeid: str) -> str:
        return unit_of(nodeid)

    def _assign_work_unit(self, node: WorkerController) -> None:
        for name in reversed((*WAITING, *LONG)):
            if name in self.workqueue:
                self.workqueue.move_to_end(name, last=False)
        super()._assign_work_unit(node)

    def _reschedule(self, node: WorkerController) -> None:
        waits = not WAITING.keys().isdisjoint(self.assigned_work[node])
        if waits and self.numnodes >= len(WAITING) + _COMPUTING:
            if not node.shutting_down:
                node.shutdown()
        else:
            super()._reschedule(node)
