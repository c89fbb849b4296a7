"""Lock-step: all ranks run the same layers in the same order, with zero tokens where they have no work.

Before a step all ranks gather each other's header; in each layer, each other's counts of tokens. All of these are rows of
int32 of one width, and a row names its kind: ranks that are out of step find out from rows that always match in size, before a
byte of anything else moves. ``sync_ranks`` and the engine call ``begin`` and ``end``; MoE layers call the rest.

    row       kind (-1 = header, else the layer), step, model, guard, top_k, the state of the rank's link and the parts that it
              needs; then the words of the header, or the layer's counts; then, in a layer, bytes of predicted usage of the
              next layer
    guard     a digest of all that the layer's plan depends on besides the counts: ranks that differ would plan differently
    header    epoch, digest of the residency table, has work, wants to stop, newest placement that has arrived, tokens of the
              step, tokens of prompts in the next one, slots that each layer cedes to the rank's KV cache
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from epslots.arrays import BoolArray, IntArray
from epslots.compiled import compiled
from epslots.device_copy import copy_to_device
from epslots.errors import ConfigError, ExchangeError, StaleEpoch
from epslots.transport.transport import Transport

_HEADER_KIND = -1
_PREFIX_WORDS = 6
_HEADER_WORDS = 2 * 8
# Rows of all models with up to so many experts have one length: ranks that call different models get an error that says so.
_USUAL_EXPERTS = 500
_STEP_LIMIT = 2**31
_WORD_BYTES = 4
# Of the word that has it and the parts. More prefetches that no link has begun count as so many.
_MOST_UNBEGUN = (1 << 10) - 1


@dataclass(frozen=True)
class Header:
    """All ranks' headers as one.

    Attributes:
        work: whether any rank has work.
        stop: whether any wants to stop.
        placement: the newest version that has arrived at all ranks.
        tokens_R: tokens of the step, by rank.
        waiting_R: tokens of prompts that each rank could compute in the next step.
        levels_R: slots that each layer cedes to the rank's KV cache from this step on, by rank.
    """

    work: bool
    stop: bool
    placement: int = 0
    tokens_R: tuple[int, ...] = ()
    waiting_R: tuple[int, ...] = ()
    levels_R: tuple[int, ...] = ()


class LinkState(NamedTuple):
    """A rank's link as a layer begins.

    Attributes:
        busy: whether it has something to do.
        unbegun: how many of the rank's prefetches for the layer, counted from the last, it hasn't begun.
    """

    busy: bool
    unbegun: int


IDLE_LINK = LinkState(busy=False, unbegun=0)


class Gathered(msgspec.Struct, frozen=True):
    """All ranks' counts of a layer.

    Attributes:
        counts_R: pairs of each rank's tokens, int64 [R, E + 1].
        top_k: K, the largest of all ranks.
        busy_R, unbegun_R: each rank's ``LinkState``, bool and int64 [R].
        predicted_R: predicted usage of the next layer, 0 to 255, [R, as many as given]; undefined of ranks without one.
        parts: in how many the step is divided, the most that any rank needs.
        arrived: the event after which ``predicted_R`` is on the host; None = it is.
    """

    counts_R: IntArray
    top_k: int
    busy_R: NDArray[np.bool_]
    unbegun_R: IntArray
    predicted_R: NDArray[Any]
    parts: int = 1
    arrived: torch.cuda.Event | None = None


class LockStep:
    """Keeps one rank in step with the others.

    Attributes:
        header: all ranks' headers of the latest step.
        steps: steps that this rank has begun.
        exchanging: whether this rank is in the header's exchange, or between a layer's first and last exchange: the others
            wait for it. Stays so after a failure there; ``note`` changes it.
        computing: whether it computes between a layer's exchanges. Stays so after a failure there; ``note`` changes it.
        completes: whether a step in which this rank fails elsewhere is completed without its tokens (``completing``).

    Args:
        model: 31 bits that identify the model.
        most_experts: experts of the largest layer.
        idle_layers: one function per layer, in order, which takes part in it with zero tokens.
        offered: makes the version of the newest placement that was offered to this rank.
        digest: makes 63 bits that are equal on ranks that agree about which rank holds which expert.
        explain_divergence: called on all ranks where they disagree; returns the differences in words.
        on_header: called with all ranks' headers before a step in which any rank has work.
    """

    alone = False

    def __init__(
        self,
        transport: Transport,
        *,
        model: int,
        most_experts: int,
        idle_layers: Sequence[Callable[[], object]],
        offered: Callable[[], int],
        digest: Callable[[], int],
        explain_divergence: Callable[[], str],
        on_header: Callable[[Header], object],
    ) -> None:
        self.transport = transport
        self._idle_layers = tuple(idle_layers)
        self._offered, self._digest = offered, digest
        self._explain_divergence = explain_divergence
        self._on_header = on_header
        self._model = model
        self._words = _PREFIX_WORDS + 1 + max(most_experts, _USUAL_EXPERTS)
        width = self._words + -(-max(most_experts, _USUAL_EXPERTS) // _WORD_BYTES)
        self._row = torch.zeros(width, dtype=torch.int32, device=transport.device)
        self._predicted = self._row[self._words :].view(torch.uint8)
        # The row's words that the host writes. On a device they are copied at once, and the host waits only for the gathering.
        head = torch.zeros(_PREFIX_WORDS + _HEADER_WORDS, dtype=torch.int32)
        self._head = self._row[: len(head)] if transport.device.type == "cpu" else head
        self._words_of_head = self._head.numpy()
        self.steps = 0
        self.exchanging = self.computing = self.completes = False
        self._layer: int | None = None
        self._stopping = False
        self._load = (0, 0)
        self._levels = 0
        self.header = Header(work=False, stop=False)

    @property
    def agreed(self) -> bool:
        """Whether sizes derived from the same plan go unchecked: from the second step of an epoch on."""
        return self.steps > 1

    def announce(self, load: tuple[int, int]) -> None:
        """Send this rank's load with the next header: the step's tokens, and those of prompts that wait."""
        self._load = load

    def cede(self, levels: int) -> None:
        """Send with every header from now on: slots that each layer of this rank shall cede to its KV cache."""
        self._levels = levels

    def ask_to_stop(self) -> None:
        """Send with every header from now on that this rank wants to stop."""
        self._stopping = True

    def begin(self, *, work: bool = True) -> Header:
        """Exchange the header of the next step, which stays in ``header``.

        Raises:
            StaleEpoch: a rank belongs to another epoch.
            ExchangeError: a rank is at another place of a step, or holds another residency table.
            PeerLost: a rank is gone.
        """
        self.steps += 1
        self._layer, self.exchanging, self.computing = 0, True, False
        words = self.transport.epoch, self._digest(), work, self._stopping, self._offered(), *self._load, self._levels
        mine, self._load = np.array(words, np.int64), (0, 0)
        self._words_of_head[_PREFIX_WORDS:] = mine.view(np.int32)
        rows = self._gather(_HEADER_KIND, 0, 0, len(self._head))
        headers = np.ascontiguousarray(rows[:, _PREFIX_WORDS : _PREFIX_WORDS + _HEADER_WORDS]).view(np.int64)
        epochs, digests = headers[:, 0], headers[:, 1]
        if (epochs != epochs[0]).any():
            stale = np.flatnonzero(epochs < epochs.max()).tolist()
            raise StaleEpoch(f"ranks {stale} belong to an older epoch of the group: epochs by rank are {epochs.tolist()}")
        if (digests != digests[0]).any():
            raise ExchangeError(f"ranks no longer agree: {self._explain_divergence()}")
        self.header = Header(
            work=bool(headers[:, 2].any()),
            stop=bool(headers[:, 3].any()),
            placement=int(headers[:, 4].min()),
            tokens_R=tuple(headers[:, 5].tolist()),
            waiting_R=tuple(headers[:, 6].tolist()),
            levels_R=tuple(headers[:, 7].tolist()),
        )
        if self.header.work:
            self._on_header(self.header)
        self.exchanging = False
        return self.header

    def arrive(self, layer: int) -> None:
        """Take part in the layers before ``layer`` that this rank's model left out; called before each layer.

        Raises:
            ConfigError: the layer was called outside of a step, or out of order.
        """
        if self._layer is None or layer < self._layer:
            raise ConfigError(
                "in a group of ranks the whole model is called, so that all ranks run the same layers: MoE layer "
                f"{layer} was called {'outside of a step' if self._layer is None else 'twice in a step, or out of order'}"
            )
        while self._layer < layer:
            self._run_idle()

    def take_part(self, layer: int) -> None:
        """Note that this rank is in ``layer``; called before the layer's first exchange, with tokens or without."""
        self._layer = layer + 1

    def note(self, *, exchanging: bool, computing: bool = False) -> None:
        """Note where this rank is in a layer; called by the layer."""
        self.exchanging, self.computing = exchanging, computing

    def end(self) -> None:
        """Take part in the layers that are left; called after the model's forward pass."""
        while self._layer is not None and self._layer < len(self._idle_layers):
            self._run_idle()
        self._layer = None

    @contextmanager
    def completing(self) -> Iterator[None]:
        """Within the context, a forward pass may fail between exchanges: the rank goes on without tokens.

        For a caller that makes exactly one step inside, and makes further steps after a failure.
        """
        before, self.completes = self.steps, True
        try:
            yield
            if self.steps == before:  # it failed before it began the step that the others are in
                self.idle_step(work=True)
        finally:
            self.completes = False

    def idle_step(self, *, work: bool = False) -> Header:
        """Make a step without tokens; none if no rank has work. Returns all ranks' headers."""
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
        link: LinkState = IDLE_LINK,
        parts: int = 1,
    ) -> Gathered:
        """All ranks' counts of a layer.

        Args:
            counts: this rank's, int64 [E + 1].
            top_k: K, or 0 without tokens.
            guard: a digest of all that the layer's plan depends on besides the counts.
            predicted: predicted usage of the next layer, 0 to 255, [at most experts of the largest layer].
            link: of this rank.
            parts: in how many this rank has to divide the step.

        Raises:
            ExchangeError: ranks are at different places of a step, or would plan differently.
            PeerLost: a rank is gone.
        """
        self._row[_PREFIX_WORDS : _PREFIX_WORDS + len(counts)] = counts
        if predicted is not None:
            self._predicted[: len(predicted)] = predicted
        rows = self._gather(layer, top_k, guard & 0x7FFFFFFF, _PREFIX_WORDS, last_word=pack_link(link, parts))
        if not _alike(rows, 4):
            raise ExchangeError(f"ranks no longer agree: {self._explain_divergence()}")
        counts_R = rows[:, _PREFIX_WORDS : _PREFIX_WORDS + len(counts)].astype(np.int64)
        predicted_R = rows[:, self._words :].view(np.uint8)[:, : 0 if predicted is None else len(predicted)]
        busy_R, unbegun_R, parts = unpack_links(rows[:, 5])
        return Gathered(counts_R, int(rows[:, 4].max()), busy_R, unbegun_R, predicted_R, parts)

    def fail(self, error: BaseException) -> None:
        """Abort the group, because this rank's step failed and the others would wait for it."""
        self.transport.abort(f"rank {self.transport.rank} failed in a step: {type(error).__name__}: {error}")

    def _run_idle(self) -> None:
        """Take part in the next layer without tokens."""
        assert self._layer is not None
        layer = self._layer
        self._idle_layers[layer]()
        assert self._layer == layer + 1, "an idle layer calls take_part"

    def _gather(self, kind: int, top_k: int, guard: int, words: int, *, last_word: int = 0) -> NDArray[np.int32]:
        """All ranks' rows, int32 [R, width].

        Args:
            words: number of the row's first words that the host has written.
            last_word: the sixth of them.
        """
        self._words_of_head[:_PREFIX_WORDS] = kind, self.steps % _STEP_LIMIT, self._model, guard, top_k, last_word
        if self._row.device.type != "cpu":
            copy_to_device(self._words_of_head[:words], self._row[:words])
        rows: NDArray[np.int32] = self.transport.to_host(self.transport.all_gather(self._row))
        if not _alike(rows, 3):
            places = [f"rank {r} {_describe_place(*row[:3].tolist())}" for r, row in enumerate(rows)]
            raise ExchangeError(f"ranks are out of step: {', '.join(places)}")
        return rows


def pack_link(link: LinkState, parts: int) -> int:
    """A row's word for the state of a rank's link and the parts that the rank needs."""
    return (parts * (_MOST_UNBEGUN + 1) + min(link.unbegun, _MOST_UNBEGUN)) * 2 + link.busy


def unpack_links(words_R: NDArray[np.int32]) -> tuple[BoolArray, IntArray, int]:
    """All ranks' ``LinkState``, bool and int64 [R], and the most parts that any needs, by ``pack_link``'s words."""
    word_R: IntArray = words_R.astype(np.int64)
    return word_R % 2 > 0, word_R // 2 % (_MOST_UNBEGUN + 1), int(word_R.max()) // (2 * (_MOST_UNBEGUN + 1))


@compiled("b1(int32[:, ::1], int64)")
def _alike(rows: NDArray[np.int32], words: int) -> bool:
    """Whether all ranks' rows begin with the same words."""
    for row in rows:
        for word in range(words):
            if row[word] != rows[0, word]:
                return False
    return True


def _describe_place(kind: int, step: int, model: int) -> str:
    where = f"begins step {step}" if kind == _HEADER_KIND else f"is in MoE layer {kind} of step {step}"
    return f"{where} of model {model:08x}"
