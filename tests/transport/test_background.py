"""Threads of ours and of gloo end before the interpreter does: one that came back later would end the process with SIGABRT."""

import subprocess
import sys

OURS = """
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

OF_GLOO = """
import atexit, os

def left():
    print(len(os.listdir("/proc/self/task")) - alone)

atexit.register(left)
import torch, torch.distributed as dist
from epslots.transport.torch_transport import TorchTransport

torch.set_num_threads(1)
alone = len(os.listdir("/proc/self/task"))
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
transport = TorchTransport(dist.group.WORLD, device=torch.device("cpu"))
transport.itself = transport  # models and their groups refer to each other
transport.all_gather(torch.ones(4))
assert len(os.listdir("/proc/self/task")) > alone
"""


def _printed(script: str) -> str:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout


def test_no_thread_is_left_when_the_process_ends():
    """Threads that wait inside torch.distributed."""
    assert _printed(OURS) == "[]\n"


def test_no_thread_of_gloo_is_left_when_the_process_ends():
    """It needs the interpreter to drop an operation's tensors."""
    assert _printed(OF_GLOO) == "0\n"
