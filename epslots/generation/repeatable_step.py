"""Makes the forward pass of a prepared batch of transformers' continuous batching repeatable.

transformers assumes that a forward pass that began also ends, and ends well. Here ``WindowBackup`` makes an interrupted step
repeatable, ``prepare_part`` lays it out again for some of its requests, and ``discard`` removes a request that fails.
``PagedBatcher`` calls them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.generation.continuous_batching.requests import FutureRequestState
from transformers.generation.continuous_batching.utils import stream_context


class WindowBackup:
    """The content of sliding windows that a prepared batch reads and overwrites.

    A repeated forward pass writes the same keys and values to the same places. With full attention this is harmless. A sliding
    window is a ring, though: the later tokens of a chunk take the place of tokens that its first ones attend to, read before
    they are overwritten. A step that stopped after that can't be repeated without the old content.

    Only chunks that continue a prompt need it: a prompt's first chunk reads nothing, and a single token takes the place of one
    that has just left its window.
    """

    def __init__(self, processor: Any) -> None:
        self._stream = processor.inputs_and_outputs.compute_stream
        # By request id: for each kind of window the cache, the request's blocks, and their content.
        self._saved: dict[str, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = {}
        for entry in processor.inputs_and_outputs.requests_in_batch:
            if _continues_a_prompt(entry):
                self._saved[entry.state.request_id] = [
                    self._save(allocator, entry.state.request_id)
                    for allocator in processor.cache.cache_allocators.values()
                    if hasattr(allocator, "sliding_window")
                ]

    def _save(self, allocator: Any, request_id: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        content = allocator._copy_view
        with stream_context(self._stream):
            blocks = torch.tensor(allocator.block_table[request_id], device=content.device)
            return content, blocks, content.index_select(0, blocks)

    def restore(self, batch: Sequence[FutureRequestState]) -> None:
        """Restore these requests' windows to their content when the batch was prepared."""
        with stream_context(self._stream):
            for entry in batch if self._saved else ():
                for content, blocks, saved in self._saved.get(entry.state.request_id, ()):
                    content.index_copy_(0, blocks, saved)


def _continues_a_prompt(entry: FutureRequestState) -> bool:
    # The position is the one after the batch: the scheduler counts a chunk as done once it is prepared.
    return entry.query_length > 1 and entry.state.position_offset > entry.query_length


def prepare_part(processor: Any, part: Sequence[FutureRequestState]) -> None:
    """Prepare the forward pass again for some requests of a prepared batch.

    Args:
        processor: transformers' batch processor.
        part: requests of its batch, whose step failed or is still to come.
    """
    for entry in part:
        state = entry.state
        state.position_offset -= entry.query_length
        known = state.initial_tokens + state.generated_tokens  # transformers replaced the tokens to compute by a token to come
        state.tokens_to_process = known[state.position_offset : state.position_offset + entry.query_length]
    batch = processor.inputs_and_outputs
    batch.prepare_batch_tensors(
        requests_in_batch=list(part),
        logits_processors=processor.logit_processor,
        use_decode_fast_path=batch.use_block_table,
        num_q_tokens=sum(entry.query_length for entry in part),
        max_kv_read=batch.max_kv_read,
        use_padding=processor.model_runner.pad_inputs,
    )


def discard(processor: Any, request_id: str) -> None:
    """Remove a running request without a trace: its pages are zeroed, and no other request finds them again."""
    scheduler, stream = processor.scheduler, processor.inputs_and_outputs.compute_stream
    for allocator in processor.cache.cache_allocators.values():
        blocks = allocator.block_table.get(request_id, [])
        own = [block for block in blocks if block not in allocator.ledger.shared_ref_counts]
        allocator.free_blocks(request_id, no_cache=True)
        with stream_context(stream):
            content = allocator._copy_view
            content.index_fill_(0, torch.tensor(own, dtype=torch.int64, device=content.device), 0)
    scheduler.finish_request(request_id)
    scheduler.block_new_requests = False
