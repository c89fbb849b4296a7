"""``SimulatedRank``: a rank's requests, admitted and batched by the rules of ``RowBatcher``, with nothing computed.

Admission, shared beginnings, preemption and batches are the real ones (``row_admission.py``, ``row_plan.py``,
``chunk_size.py``). While a rank does nothing but decode, its steps are all alike: ``coasts`` says for how many, and
``catch_up`` enters them together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.simulation.counted_rows import CountedRows
from epslots.config import EngineConfig
from epslots.generation.cache_image import CacheImage
from epslots.generation.cache_layout import CacheLayout
from epslots.generation.chunk_size import ChunkSize
from epslots.generation.engine_stats import EngineCounters
from epslots.generation.requests import Output, Request
from epslots.generation.row_admission import RowAdmission, RunningRow
from epslots.generation.row_plan import RowBatch, RowState, decodes, following_prompt_tokens, next_batch
from epslots.generation.row_support import RowSupport
from epslots.generation.tracked_request import PromptState, TrackedRequest

_PLAIN = RowSupport((), (), whole_prompts=False, replays=False, together=True, restart=None)
# As ``Batcher`` times prompts.
_TIMED_TOKENS, _TIME_KEPT = 16, 0.8
_TOKEN = 0
"""Every new token. A request ends by their number."""


@dataclass(frozen=True)
class RankStep:
    """A rank's part of a step.

    Attributes:
        rows: in the order of turns.
        width: new tokens of each.
        decodes: they are single tokens that continue texts.
    """

    rows: tuple[RunningRow, ...]
    width: int
    decodes: bool

    @property
    def tokens(self) -> int:
        return len(self.rows) * self.width


@dataclass(frozen=True)
class StepNews:
    """The news of a rank's step.

    Attributes:
        first: a request has its first token.
        ended: a request has ended.
        tokens: some request has a further token.
        paused: texts that could go on waited for the step's prompts.
    """

    first: bool
    ended: bool
    tokens: bool
    paused: bool


class SimulatedRank:
    """One rank's engine.

    Args:
        engine: its settings.

    Attributes:
        counters: of its engine.
        served: requests that it was given, those that were handed over included.
        waiting: tokens of its prompts that it could compute in the next step but one (``StepLoad``).
        prompt_token_s: simulated seconds of a prompt's token, lately; 0 = none was timed.
    """

    def __init__(self, engine: EngineConfig) -> None:
        self.counters = EngineCounters()
        self.served = 0
        self.prompt_token_s = 0.0
        self.waiting = 0
        self._rows = CountedRows(engine.planned_tokens, engine.max_requests)
        self._admission = RowAdmission(self._rows, engine, _PLAIN, self.counters)
        self._chunk = ChunkSize(
            engine.max_batch_tokens, None if engine.step_target_ms is None else engine.step_target_ms / 1e3
        )
        self._entries: dict[str, TrackedRequest] = {}
        self._arrived = 0
        self._most_requests, self._most_tokens = engine.max_requests, engine.max_batch_tokens
        self._step: RankStep | None = None
        """The step under way; while the rank coasts, each of its steps."""
        self._prompt_was_last = False

    @property
    def shares_prefixes(self) -> bool:
        return self._admission.shares_prefixes

    @property
    def has_work(self) -> bool:
        """Whether a request is unfinished, and not held."""
        return any(entry.reason is None and not entry.held for entry in self._entries.values())

    # Commands, between two steps.

    def add(self, request: Request) -> None:
        """Queue a request."""
        entry = self._entries[request.id] = TrackedRequest(request, number=self._arrived)
        self._arrived += 1
        self.served += 1
        self._admission.queue(entry)

    def forget(self, id: str) -> None:
        """End a request that goes on elsewhere, without an output."""
        entry = self._entries.pop(id, None)
        if entry is not None and entry.reason is None:
            entry.end("cancelled")
            entry.resume()
            if not self._admission.withdraw(entry):
                self._admission.leave(entry)

    def hold(self, id: str) -> CacheImage | None:
        """Let a request make no step after its prompt; returns its cache, or None if it has none yet."""
        entry = self._entries.get(id)
        if entry is None or entry.reason is not None:
            return None
        if not entry.held:
            entry.image = self._admission.image_of(entry, lambda: True)
        return entry.image

    def resume(self, id: str) -> None:
        """Let a request that is held go on here."""
        if id in self._entries:
            self._entries[id].resume()

    def prompts(self) -> list[PromptState]:
        """Prompts of which a part is computed."""
        return self._admission.prompts()

    def reserve(self, id: str, layout: CacheLayout) -> CacheImage | None:
        """A place for the cache of a request that comes from another rank; None if there is no room."""
        self._admission.release(id)
        return self._admission.reserve(id, layout)

    def release(self, id: str) -> None:
        """Give up a place that is reserved."""
        self._admission.release(id)

    # Steps.

    def begin(self, balanced: int | None) -> RankStep | None:
        """The rank's part of the next step; None if it has nothing to do.

        Args:
            balanced: a length of chunks for the sake of the group's other ranks; None = any.
        """
        self.waiting = 0
        self._admission.admit()
        planned = self._plan(balanced)
        active = self._admission.active
        self._step = (
            None if planned is None else RankStep(tuple(active[i] for i in planned.rows), planned.width, planned.decodes)
        )
        return self._step

    def _plan(self, balanced: int | None) -> RowBatch | None:
        """The next batch by the rules of ``RowBatcher``: where the cache is full, the last rows are given up."""
        while active := self._admission.active:
            states = [RowState(known=one.entry.length, computed=one.row.length, stop=one.stop) for one in active]
            room = self._chunk.prompt_tokens(sum(map(decodes, states)), balanced)
            planned = next_batch(states, room, prompt_was_last=self._prompt_was_last)
            assert planned is not None, "every active row has a token left to compute"
            if self._admission.make_room(len(planned.rows) * planned.width, rows=0):
                self.waiting = following_prompt_tokens(states, planned, self._most_tokens)
                return planned
            self._admission.preempt(self._admission.running[-1])
        return None

    def end(self, seconds: float) -> StepNews:
        """The step that ``begin`` returned is made.

        Args:
            seconds: that it took.
        """
        step, first = self._step, False
        assert step is not None
        chosen = [running for running in step.rows if running.left == step.width]
        paused = not step.decodes and any(running.left == 1 for running in self._admission.active)
        for running in step.rows:
            self.counters.prompt_tokens += max(0, min(step.width, len(running.entry.request.prompt) - running.row.length))
            self._rows.extend(running.row, step.width)
        for running in chosen:
            entry = running.entry
            entry.tokens.append(_TOKEN)
            first = first or entry.text_length == 1
            if len(entry.tokens) == entry.request.max_new_tokens:
                entry.end("length")
        self.counters.steps += 1
        self._chunk.observe(*((0, step.tokens) if step.decodes else (step.tokens, 0)), seconds)
        if not step.decodes and step.tokens >= _TIMED_TOKENS:
            now_s, before_s = seconds / step.tokens, self.prompt_token_s
            self.prompt_token_s = now_s + _TIME_KEPT * (before_s - now_s) if before_s else now_s
        self._prompt_was_last = not step.decodes
        ended = [running.entry for running in self._admission.running if running.entry.reason]
        for entry in ended:
            self._admission.leave(entry)
        self._step = None
        return StepNews(first, bool(ended), bool(chosen), paused)

    def coasts(self) -> int:
        """How many further steps are decoding ones of all active rows, if no command comes; for ``catch_up``.

        They end before a request does, and before the cache is full.
        """
        active = self._admission.active
        unfinished = sum(entry.reason is None for entry in self._entries.values())
        may_admit = len(self._admission.running) < min(unfinished, self._most_requests)
        if may_admit or not active or not all(map(_continues_text, active)):
            return 0
        left = min(running.entry.request.max_new_tokens - len(running.entry.tokens) for running in active) - 1
        steps = min(left, self._rows.free_tokens // len(active))
        self._step = RankStep(tuple(active), 1, decodes=True) if steps > 0 else None
        return steps

    @property
    def coasting(self) -> RankStep | None:
        """The step that the rank makes again and again since ``coasts``."""
        return self._step

    def catch_up(self, seconds_S: Sequence[float]) -> None:
        """Enter steps that ``coasts`` has promised, by their seconds."""
        step, steps = self._step, len(seconds_S)
        assert step is not None
        for running in step.rows:
            self._rows.extend(running.row, steps)
            running.entry.tokens += [_TOKEN] * steps
            assert len(running.entry.tokens) < running.entry.request.max_new_tokens, "it would have ended"
        for seconds in seconds_S:
            self._chunk.observe(0, step.tokens, seconds)
        self.counters.steps += steps
        self._prompt_was_last = False

    def outputs(self) -> list[Output]:
        """The results since the last call, as ``Batcher.outputs``."""
        found = []
        for id, entry in list(self._entries.items()):
            tokens = tuple(entry.tokens[entry.delivered :])
            self.counters.new_tokens += len(tokens)
            if tokens or entry.reason:
                found.append(Output(id, tokens, entry.reason is not None, entry.reason, assignment=entry.request.assignment))
            entry.delivered = len(entry.tokens)
            if entry.reason:
                del self._entries[id]
        return found

    def check(self) -> None:
        """Assert that all requests have ended, and that their cells are free or kept for others."""
        self._rows.check()
        assert not self._admission.running and not self._admission.reserved
        assert all(entry.reason for entry in self._entries.values())


def _continues_text(running: RunningRow) -> bool:
    """Whether a row's next token is of its text, and no other one comes with it."""
    return running.left == 1 and running.row.length >= len(running.entry.request.prompt)
