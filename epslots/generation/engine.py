"""One rank's steps. The life of a request, in reading order:

1. queue       ``add`` checks the request, which then waits for room in the cache (batcher.py)
2. grammar     compiled beside the steps, if there is one (grammar.py, grammar_queue.py); meanwhile others go on
3. admission   ``prepare`` takes requests into the next batch (page_scheduler.py; row_admission.py for rows)
4. prompt      computed in chunks (chunk_size.py); what layers keep of it stays in pages or rows (paged_cache.py, row_cache.py)
5. decoding    one token a step (next_token.py), drawn by the request's seed and position (sampling.py)
6. end         a stop token, ``max_new_tokens``, ``cancel``, or an error of only this request (isolation.py)
7. outputs     ``outputs`` returns the new tokens after every step, and the end once

``text.py``, ``chat_template.py`` and ``end_tokens.py`` turn text into prompts and tokens into text.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import torch
from transformers import PreTrainedModel

from epslots.cpu_threads import ThreadGovernor
from epslots.generation.batcher import Batcher
from epslots.generation.batchers import batcher_for
from epslots.generation.chunk_balance import balanced_chunk
from epslots.generation.requests import Output
from epslots.group.rank_group import group_of
from epslots.host_limits import usable_cores
from epslots.runtime import runtime_of
from epslots.transport.lockstep import Header

# A rank that has nothing to do but wait for a grammar begins a step this often: other ranks may have work.
_GRAMMAR_WAIT_S = 0.002


class Engine:
    """Steps one rank's model: its own requests, or none, always together with all other ranks.

        engine = Engine(model, kv_tokens=4096)
        engine.batcher.add(Request("a", prompt=(5, 6, 7), max_new_tokens=20))  # token ids; greedy, unless it has a Sampling
        for output in engine.run():  # all ranks call it; each gets the outputs of its own requests
            ...

    The model's forward pass exchanges the step's header by itself (``group/join.py``). A forward pass that raises takes part
    in the rest of its step without tokens, so other ranks don't notice a failed request.

    After PeerLost the batch is kept. When the survivors have formed the next epoch and joined again (``group.join``), the next
    ``step`` repeats the interrupted one.

    Args:
        model: from ``epslots.load``, alone or one of several ranks.
        settings: fields of ``EngineConfig``; by default those that the model was loaded with, and its memory planned for.

    Attributes:
        batcher: takes requests and returns their outputs.

    Raises:
        ConfigError: the model was not loaded by ``epslots.load``; or a setting is not one of those allowed.
    """

    def __init__(self, model: PreTrainedModel, **settings: Any) -> None:
        config = msgspec.structs.asdict(runtime_of(model).engine) | settings
        self.model = model
        self.batcher: Batcher = batcher_for(model, **config)
        self._threads = ThreadGovernor(usable_cores(), torch.get_num_threads, torch.set_num_threads)

    def step(self) -> Header:
        """Make one step together with all ranks; none if no rank has work. Returns the ranks' header of the step.

        Raises:
            PeerLost: a rank is gone. Nothing of the step counts.
            StepFailed: the model failed where other ranks wait for its result. Nothing of the step counts.
            GroupError: ranks don't match, or are out of step.
        """
        with self._threads.step():
            return self._step()

    def _step(self) -> Header:
        group = group_of(self.model)
        balanced = None if group is None else balanced_chunk(group.lockstep.header.waiting_R)
        work = self.batcher.prepare(balanced)
        if not work and len(self.batcher.grammars):
            self.batcher.grammars.wait(_GRAMMAR_WAIT_S)
            work = self.batcher.prepare(balanced)
        unfinished = work or bool(len(self.batcher.grammars)) or self.batcher.waits_for_room
        if group is None:
            mine = self.batcher.load.tokens
            if work:
                self.batcher.step()
                self.batcher.count_tokens(mine, mine)
            return Header(work=unfinished, stop=False)
        group.lockstep.announce(self.batcher.load)
        if work:
            with group.lockstep.completing():
                self.batcher.step()
        else:
            group.lockstep.idle_step(work=unfinished)
        header = group.lockstep.header
        self.batcher.count_tokens(header.tokens_R[group.transport.rank], max(header.tokens_R))
        return header

    def run(self) -> Iterator[Output]:
        """Step until no rank has work, or one asks to stop. Yields the outputs of this rank's requests as they come."""
        header = Header(work=True, stop=False)
        while header.work and not header.stop:
            header = self.step()
            yield from self.batcher.outputs()
