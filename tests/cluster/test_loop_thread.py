"""The thread that runs a cluster's loop: every call ends, also one that comes in the thread's last moment."""

from __future__ import annotations

import asyncio
import threading

from cluster.driver.loop_thread import LoopThread
from tests.support.rank_helpers import PATIENCE_S


def test_a_call_that_ends_with_the_thread_has_its_result():
    """Its coroutine is done in the very round of the loop that finds nothing left to wait for."""
    thread, may_go_on = LoopThread("test"), threading.Event()
    loop, ends = thread._loop, list[asyncio.Task[None]]()
    thread.tell(may_go_on.wait, PATIENCE_S)
    call = thread.begin(asyncio.sleep(0, "its result"))
    thread.tell(lambda: loop.call_soon(lambda: ends.append(loop.create_task(thread._finish()))))
    may_go_on.set()
    assert call.result(PATIENCE_S) == "its result"
    thread._thread.join(PATIENCE_S)
    loop.close()
