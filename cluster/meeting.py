"""How ranks meet: through a store on the network, over gloo on the CPU and NCCL on CUDA."""

from __future__ import annotations

from datetime import timedelta

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from cluster.messages import Form
from epslots.errors import PeerLost
from epslots.transport.rendezvous import BACKENDS
from epslots.transport.torch_transport import TorchTransport, form_group


def meet(form: Form, device: torch.device) -> TorchTransport:
    """Form the group of a generation with all ranks that are told to.

    Raises:
        PeerLost: they didn't all come in time, or the store is gone.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)  # it is the thread's, and this thread's is another than that of the imports
    try:
        store = TCPStore(form.host, form.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=form.form_s))
    except RuntimeError as error:  # torch's own kinds of it
        raise PeerLost(f"the ranks' store at {form.host}:{form.port} can't be reached: {error}") from error
    group = form_group(
        store,
        generation=form.generation,
        rank=form.rank,
        size=form.size,
        backend=BACKENDS[device.type],
        deadline_s=form.form_s,
    )
    return TorchTransport(group, device=device, generation=form.generation, deadline_s=form.deadline_s)
