"""Lock-step: all ranks run the same layers in the same order, whatever their batches; one with nothing to do takes part with
zero tokens.

Everything that ranks tell each other about a step is a row of int32 of one width, gathered from all: the header before the
step, and each layer's counts in it. A row says what it is, so that ranks which got out of step find out at once, from rows
that always match in size, before a byte of anything else moves.

    row       kind (-1 = header, else the layer), step, model, guard, top_k, whether the rank's link is busy, then the words of
              the header; or the layer's counts, and behind them bytes that tell what is predicted of the next layer
    guard     a digest of all that the layer's plan follows from but the counts: ranks that differ in it would plan differently
    header    epoch, digest of the residency table, has work, wants to stop, newest placement that has come
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from epslots.arrays import IntArray
from epslots.compiled import compiled
from epslots.errors import ConfigError, ExchangeError, StaleEpoch
from epslots.transport.transport import Transport

_HEADER = -1
_PREFIX = 6
_HEADER_WORDS = 2 * 5
# Rows of all models are as long, up to this many experts: one who calls the wrong model is told so.
_USUAL_EXPERTS = 500
_STEP_LIMIT = 2**31
_WORD_BYTES = 4


@dataclass(frozen=True)
class Header:
    """What all ranks said before a step: whether any has work, whether any wants to stop, the placement that all have."""

    work: bool
    stop: bool
    placement: int = 0


@dataclass(frozen=True)
class Gathered:
    """What all ranks said of a layer.

    Attributes:
        counts_R: int64 [R, E + 1].
        top_k: K.
        busy_R: whether each rank's link has something to do, bool [R].
        predicted_R: uint8 [R, at least as many as were given]; of ranks that gave none it means nothing.
    """

    counts_R: IntArray
    top_k: int
    busy_R: NDArray[np.bool_]
    predicted_R: NDArray[np.uint8]


class LockStep:
    """Keeps one rank in step with the others.

    Attributes:
        header: what all ranks said before the latest step.
        stopping: set it to tell the others, with the next step's header, that this rank wants to stop.
        steps: steps that this rank has begun.
        exchanging: set from the header's exchange to its end, and from a layer's first exchange to its last: the others wait
            for this rank. It stays set where that fails.
        computing: set while it computes in between; likewise.
        completes: whether a step in which this rank fails elsewhere is completed without its tokens: see ``completing``.
        placement: set it to tell them of the newest placement's version that has come to this rank.

    Args:
        most_experts: experts of the largest layer.
        idle_layers: takes part in each layer with zero tokens, in the order of the layers.
        model: 31 bits that tell this model from others.
        digest: 63 bits that tell whether ranks agree about who holds what.
        explain_divergence: called on all ranks if they don't; what differs, in words.
        on_header: called with what all ranks said, before a step in which any has work.
    """

    alone = False

    def __init__(
        self,
        transport: Transport,
        *,
        model: int,
        most_experts: int,
        idle_layers: Sequence[Callable[[], object]],
        digest: Callable[[], int],
        explain_divergence: Callable[[], str],
        on_header: Callable[[Header], object],
    ) -> None:
        self.transport = transport
        self._idle_layers = tuple(idle_layers)
        self._digest = digest
        self._explain_divergence = explain_divergence
        self._on_header = on_header
        self._model = model
        self._words = _PREFIX + 1 + max(most_experts, _USUAL_EXPERTS)
        width = self._words + -(-max(most_experts, _USUAL_EXPERTS) // _WORD_BYTES)
        self._row = torch.zeros(width, dtype=torch.int32, device=transport.device)
        self._predicted = self._row[self._words :].view(torch.uint8)
        # What the host writes into the row; on a device in one copy that nobody waits for: the gathering that follows is.
        head = torch.zeros(_PREFIX + _HEADER_WORDS, dtype=torch.int32, pin_memory=transport.device.type == "cuda")
        self._head = self._row[: len(head)] if transport.device.type == "cpu" else head
        self._words_of_head = self._head.numpy()
        self.steps = 0
        self.exchanging = self.computing = self.completes = False
        self._layer: int | None = None
        self.stopping = False
        self.placement = 0
        self.header = Header(work=False, stop=False)

    @property
    def agreed(self) -> bool:
        """Whether sizes that ranks derive from the same plan go unchecked: from the second step of a epoch on."""
        return self.steps > 1

    def begin(self, *, work: bool = True) -> Header:
        """Exchange the header of the next step, which stays in ``header``.

        Raises:
            StaleEpoch: a rank belongs to another epoch.
            ExchangeError: a rank is elsewhere, or holds another residency table.
            PeerLost: a rank is gone.
        """
        self.steps += 1
        self._layer, self.exchanging, self.computing = 0, True, False
        said = self.transport.epoch, self._digest(), int(work), int(self.stopping), self.placement
        mine = np.array(said, np.int64)
        self._words_of_head[_PREFIX:] = mine.view(np.int32)
        rows = self._gather(_HEADER, 0, 0, len(self._head))
        words = np.ascontiguousarray(rows[:, _PREFIX : _PREFIX + _HEADER_WORDS]).view(np.int64)
        epochs, digests = words[:, 0], words[:, 1]
        if (epochs != epochs[0]).any():
            stale = np.flatnonzero(epochs < epochs.max()).tolist()
            raise StaleEpoch(f"ranks {stale} belong to an older epoch of the group: epochs by rank are {epochs.tolist()}")
        if (digests != digests[0]).any():
            raise ExchangeError(f"ranks no longer agree: {self._explain_divergence()}")
        self.header = Header(work=bool(words[:, 2].any()), stop=bool(words[:, 3].any()), placement=int(words[:, 4].min()))
        if self.header.work:
            self._on_header(self.header)
        self.exchanging = False
        return self.header

    def arrive(self, layer: int) -> None:
        """Called before each layer: takes part in those that this rank's model left out."""
        if self._layer is None or layer < self._layer:
            raise ConfigError(
                "in a group of ranks the whole model is called, so that all ranks run the same layers: MoE layer "
                f"{layer} was called {'outside of a step' if self._layer is None else 'twice in a step, or out of order'}"
            )
        while self._layer < layer:
            self._pass()

    def take_part(self, layer: int) -> None:
        """Called as a layer begins to deal with all ranks, with tokens or without."""
        self._layer = layer + 1

    def end(self) -> None:
        """Called after the model's forward pass: takes part in the layers that are left."""
        while self._layer is not None and self._layer < len(self._idle_layers):
            self._pass()
        self._layer = None

    @contextmanager
    def completing(self) -> Iterator[None]:
        """Inside, a forward pass that fails between exchanges costs the others nothing: the rank goes on without tokens.

        For a caller that makes one step here whatever happens, and goes on making steps.
        """
        before, self.completes = self.steps, True
        try:
            yield
            if self.steps == before:  # it failed before it began the step that the others are in
                self.idle_step(work=True)
        finally:
            self.completes = False

    def idle_step(self, *, work: bool = False) -> Header:
        """A step without tokens; or no step at all, if no rank has work."""
        header = self.begin(work=work)
        if header.work:
            self.end()
        else:
            self._layer = None
        return header

    def gather_counts(
        self,
        layer: int,
        counts: torch.Tensor,
        top_k: int,
        guard: int,
        predicted: torch.Tensor | None = None,
        *,
        busy: bool = False,
    ) -> Gathered:
        """Tell all ranks what this one has of a layer, and learn what they have.

        Args:
            counts: int64 [E + 1], this rank's.
            top_k: K, or 0 without tokens.
            guard: a digest of what the layer's plan follows from, the same on all ranks.
            predicted: numbers from 0 to 255, no more than the largest layer has experts.
            busy: whether this rank's link has something to do.

        Raises:
            ExchangeError: ranks are in different places, or would plan differently.
            PeerLost: a rank is gone.
        """
        self._row[_PREFIX : _PREFIX + len(counts)] = counts
        if predicted is not None:
            self._predicted[: len(predicted)] = predicted
        rows = self._gather(layer, top_k, guard & 0x7FFFFFFF, _PREFIX, busy=busy)
        if not _alike(rows, 4):
            raise ExchangeError(f"ranks no longer agree: {self._explain_divergence()}")
        counts_R = rows[:, _PREFIX : _PREFIX + len(counts)].astype(np.int64)
        return Gathered(counts_R, int(rows[:, 4].max()), rows[:, 5] > 0, rows[:, self._words :].view(np.uint8))

    def fail(self, error: BaseException) -> None:
        """This rank's step ends with an error of its own: nobody must wait for it."""
        self.transport.abort(f"rank {self.transport.rank} failed in a step: {type(error).__name__}: {error}")

    def _pass(self) -> None:
        assert self._layer is not None
        layer = self._layer
        self._idle_layers[layer]()
        assert self._layer == layer + 1, "an idle layer takes part"

    def _gather(self, kind: int, top_k: int, guard: int, words: int, *, busy: bool = False) -> NDArray[np.int32]:
        """All ranks' rows; the first ``words`` of this rank's come from the host."""
        self._words_of_head[:_PREFIX] = kind, self.steps % _STEP_LIMIT, self._model, guard, top_k, busy
        if self._row.device.type != "cpu":
            self._row[:words].copy_(self._head[:words], non_blocking=True)
        rows: NDArray[np.int32] = self.transport.to_host(self.transport.all_gather(self._row))
        if not _alike(rows, 3):
            places = [f"rank {r} {_place(*row[:3].tolist())}" for r, row in enumerate(rows)]
            raise ExchangeError(f"ranks are out of step: {', '.join(places)}")
        return rows


@compiled("b1(int32[:, ::1], int64)")
def _alike(rows: NDArray[np.int32], words: int) -> bool:
    """Whether all ranks' rows begin with the same words."""
    for row in rows:
        for word in range(words):
            if row[word] != rows[0, word]:
                return False
    return True


def _place(kind: int, step: int, model: int) -> str:
    where = f"begins step {step}" if kind == _HEADER else f"is in MoE layer {kind} of step {step}"
    return f"{where} of model {model:08x}"
