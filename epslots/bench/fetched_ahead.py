"""What a captured step would take if it fetched the predicted experts of the next layer beside its computing. Pure.

Captured decoding copies a layer's missing experts by one kernel before the layer computes, and nothing runs meanwhile. Here
the same operations are served once more by the device's clock, with each such copy in three parts:

    predicted      on a stream of its own, as soon as the layer before has its experts; the layer waits for it
    wrong guesses  behind them, as many as experts that weren't predicted; nothing waits for them but the link
    the others     as ever
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from epslots.simulated_gpu.gpu_spec import GpuSpec
from epslots.simulated_gpu.timeline import Operation, Timeline

_COPY, _SIDE = "copy_missing", -1


def saved_seconds(operations: Sequence[Operation], spec: GpuSpec, recall: float) -> float:
    """Seconds that all replayed steps together would take less.

    Args:
        operations: of one device, served; those of a replayed graph were queued at one moment.
        recall: share of missing experts that were predicted.
    """
    return sum(_span(step) - _span(list(_ahead(step, spec, recall))) for step in replays(operations))


def replays(operations: Sequence[Operation]) -> Iterator[list[Operation]]:
    """The operations of each replayed graph that copies experts, to be served anew: each after the one before."""
    for _, group in groupby(operations, lambda operation: operation.queued_s):
        step = [replace(operation, after=()) for operation in group]
        if any(operation.name == _COPY for operation in step):
            yield step


def _ahead(step: Sequence[Operation], spec: GpuSpec, recall: float) -> Iterator[Operation]:
    before: tuple[Operation, ...] = ()
    for operation in step:
        if operation.name == _COPY and operation.engine.startswith("H2D"):  # some are missing
            link_s = operation.duration_s - spec.node_s
            guess = replace(operation, stream=_SIDE, duration_s=recall * link_s, after=before)
            wrong = replace(operation, name="wrong guesses", stream=_SIDE, duration_s=(1 - recall) * link_s, after=())
            yield from (guess, wrong)
            operation = replace(operation, duration_s=spec.node_s + (1 - recall) * link_s, after=(guess,))
        if operation.name == _COPY:
            before = (operation,)
        yield operation


def _span(step: Sequence[Operation]) -> float:
    """Serve operations: the seconds from their queueing to the end of all but wrong guesses."""
    timeline = Timeline()
    for operation in step:
        timeline.queue(operation)
    timeline.run(float("inf"))
    return max(operation.end_s or 0.0 for operation in step if operation.name != "wrong guesses") - step[0].queued_s
