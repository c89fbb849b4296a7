"""One rank's steps: its own requests, or nothing, always together with all other ranks.

    from epslots.engine.requests import Request

    engine = Engine(model, kv_tokens=4096)
    engine.batcher.add(Request("a", prompt=(5, 6, 7), max_new_tokens=20))  # of token ids; greedy, unless it has a Sampling
    for output in engine.run():  # all ranks call it; each gets the outputs of its own requests
        ...

A rank with a batch runs the model over it, and one without takes part with zero tokens; the model's forward pass exchanges the
step's header by itself (``join.py``). With no work anywhere ``run`` ends, and nobody spins.

A request that the model fails with, or whose logits come out as NaN, ends with an error. The other ranks don't notice, and its
batch mates only that there are more steps: a forward pass that raises takes part in the rest of its step without tokens.

If a peer is lost, ``step`` raises PeerLost and the batch stands. When the survivors have formed the next generation and joined
again (``ranks.join``), the next ``step`` does the interrupted one again.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from epslots.config import DEFAULT_BATCH_TOKENS
from epslots.cpu_threads import ThreadGovernor
from epslots.engine.paged_batcher import batcher_for
from epslots.engine.requests import Batcher, Output
from epslots.group.rank_group import group_of
from epslots.host_limits import usable_cores
from epslots.runtime import runtime_of
from epslots.transport.lockstep import Header


class Engine:
    """Steps one rank's model.

    Attributes:
        batcher: takes requests and hands out what came of them.

    Args:
        model: from ``epslots.load``, alone or one of several ranks.
        kv_tokens: tokens that the KV cache keeps for all requests together.
        max_batch_tokens: the most tokens of one step.

    Raises:
        ConfigError: the model was not loaded by ``epslots.load``.
    """

    def __init__(self, model: PreTrainedModel, *, kv_tokens: int, max_batch_tokens: int = DEFAULT_BATCH_TOKENS) -> None:
        runtime_of(model)  # refuses other models
        self.model = model
        self.batcher: Batcher = batcher_for(model, kv_tokens=kv_tokens, max_batch_tokens=max_batch_tokens)
        self._threads = ThreadGovernor(usable_cores(), torch.get_num_threads, torch.set_num_threads)

    def step(self) -> Header:
        """Make one step together with all ranks, or none if nobody has work; returns what the ranks said before it.

        Raises:
            PeerLost: a rank is gone. Nothing of the step counts.
            StepFailed: the model failed where other ranks wait for its result. As if a rank was gone.
            GroupError: ranks don't match, or are out of step.
        """
        self._threads.adjust()
        group, work = group_of(self.model), self.batcher.prepare()
        if group is None:
            if work:
                self.batcher.step()
            return Header(work=work, stop=False)
        if not work:
            return group.lockstep.idle_step()
        with group.lockstep.completing():
            self.batcher.step()
        return group.lockstep.header

    def run(self) -> Iterator[Output]:
        """Step until no rank has work, or one wants to stop; yields the outputs of this rank's requests as they come."""
        header = Header(work=True, stop=False)
        while header.work and not header.stop:
            header = self.step()
            yield from self.batcher.outputs()
