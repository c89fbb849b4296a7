"""Threads that wait inside torch.distributed end before the interpreter does."""

import subprocess
import sys

SCRIPT = """
import atexit, threading

def left():
    print([thread.name for thread in threading.enumerate() if thread.name.startswith("epslots")])

atexit.register(left)  # before all others are, so it runs last
import torch.distributed as dist
from epslots.transport.gloo_operations import WaitingThread

store = dist.HashStore()
waiting = WaitingThread(dist.ProcessGroupGloo(store, 0, 1))
assert any(thread.name == "epslots-transfers" for thread in threading.enumerate())
"""


def test_no_thread_is_left_when_the_process_ends():
    """A thread that came back from C++ later would end the process with SIGABRT."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
