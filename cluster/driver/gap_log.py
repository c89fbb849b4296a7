"""``log_gaps``: warns while no rank serves. Callers only see that no token comes."""

from __future__ import annotations

import logging
import time
from typing import NoReturn

from cluster.driver.loop_thread import Notifier
from cluster.driver.request_router import RequestRouter
from cluster.driver.worker_groups import WorkerGroups
from cluster.driver.worker_pool import WorkerPool

logger = logging.getLogger("epslots.cluster")

_GAP_S = 5.0  # without a rank that serves, until the first warning
_GAP_AGAIN_S = 60.0  # until the next


async def log_gaps(groups: WorkerGroups, pool: WorkerPool, router: RequestRouter, changes: Notifier) -> NoReturn:
    """Warn when no rank has served for some seconds, again and again until one does.

    Args:
        changes: is notified when a group forms or breaks.
    """
    while True:
        await changes.wait_for(lambda: pool.started and not groups.any_formed)
        began_s = time.monotonic()
        warned = False
        while not await changes.wait_for(lambda: groups.any_formed, _GAP_AGAIN_S if warned else _GAP_S):
            warned = True
            logger.warning(
                "no rank has served for %.0f s, and %d requests wait: %s",
                time.monotonic() - began_s,
                router.unfinished,
                "; ".join(pool.missing()),
            )
        if warned:
            logger.warning("%d ranks serve again after %.0f s", groups.serving, time.monotonic() - began_s)
