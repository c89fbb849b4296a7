"""One rank's life, in a thread of its own: it obeys commands, makes steps together with the others, and says what happens.

Three threads meet here, and none waits for another's work:

    stepping   ``start`` runs it: loads, forms groups, steps the engine; blocked when nobody has work
    commands   calls ``command``: queues what it is told, and is the one that can abort a group whose operation is stuck
    events     calls ``events``: waits for something to tell

A group that breaks costs nothing but the step under way: the rank says ``Broken``, stands by, and makes the same step again in
the next epoch. A request that the model fails with ends with an error (``epoch/books.py``); where that broke the
group, the rank says ``Broken`` of itself. Any other error is the rank's end (``Failed``), because its state is unknown then.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import torch

from cluster.messages.placement import GetResidency, PlacementRejected, SetPlacement, WindowReport
from cluster.messages.rank import (
    Answer,
    Ask,
    Asleep,
    Broken,
    Cancel,
    Command,
    Contacts,
    Event,
    Failed,
    Form,
    Formed,
    Load,
    Loaded,
    Outputs,
    Ping,
    Progress,
    RankStopped,
    Stop,
    Submit,
    Wake,
    decode_command,
    encode,
)
from cluster.rank.meeting import ContactStore
from cluster.rank.rank_reports import WindowCutter, report, survey
from epslots.engine.end_tokens import end_tokens
from epslots.engine.engine import Engine
from epslots.engine.paged_batcher import PagedBatcher
from epslots.engine.requests import Output
from epslots.errors import ConfigError, EpslotsError, GroupError, RankMismatchError
from epslots.group.join import group_up, join
from epslots.group.rank_group import group_of
from epslots.loading import LOAD_DEADLINE_S, load_alone
from epslots.models.checkpoint import CheckpointSource
from epslots.placement.placement import Placement, unpack
from epslots.progress import ProgressDisplay
from epslots.runtime import runtime_of
from epslots.transport.transport import Transport

FormTransport = Callable[[Form, torch.device, ContactStore], Transport]
"""Meets the other ranks of a epoch; raises PeerLost if they don't all come in time."""

_TELL_EVERY_S = 0.2  # progress of loading


@dataclass(frozen=True)
class _Offer:
    """A ``SetPlacement``, unpacked."""

    group: int
    placement: Placement
    bytes_per_step: int


@dataclass(frozen=True)
class _Forming:
    """A ``Form``, and what comes in for it meanwhile."""

    form: Form
    contacts: ContactStore


class RankLoop:
    """One rank.

    Args:
        form: how ranks meet.
    """

    def __init__(self, form: FormTransport) -> None:
        self._form_transport = form
        self._thread = threading.Thread(target=self._main, name="epslots-steps", daemon=True)
        self._news = threading.Condition()
        """Guards the two lists below, and wakes those who wait for them."""
        self._commands: list[Command | _Offer | _Forming] = []
        self._events: list[Event] = []
        self._contacts: ContactStore | None = None
        """Of the newest epoch; the commands' thread's."""
        # The rest is the stepping thread's, but that the commands' thread reads the transport, and aborts it.
        self._engine: Engine | None = None
        self._transport: Transport | None = None
        self._met_through: ContactStore | None = None
        """Kept for as long as the transport, since NCCL uses it."""
        self._ended = False
        self._newest = -1
        """The newest epoch that was asked for."""
        self._serving = False
        self._asleep = False
        self._steps = 0
        """Steps in this epoch; the same on all its ranks."""
        self._wake_through = 0
        self._told_s = 0.0
        self._asked: list[int] = []
        """Reports that are due."""
        self._windows: WindowCutter | None = None

    def start(self) -> None:
        """Start the stepping thread."""
        self._thread.start()

    def command(self, message: bytes) -> bytes:
        """Take a command; returns at once, whatever the rank is doing."""
        match decode_command(message):
            case Ping():
                return encode(Answer(self._thread.is_alive() and not self._ended))
            case Form() as form:
                # Whoever waits for a lost rank is freed, and so are the others, who don't wait for the end of a long step.
                self._newest = max(self._newest, form.epoch)
                self._leave_old(self._transport)
                if self._contacts is not None:
                    self._contacts.end(self._newer())
                self._contacts = ContactStore(form.epoch, self._tell, form.form_s)
                self._queue(_Forming(form, self._contacts))
            case Contacts(epoch, entries):
                if self._contacts is not None and self._contacts.epoch == epoch:
                    self._contacts.take(entries)
            case SetPlacement() as place:
                try:  # here and not between two steps, because a large one takes some milliseconds
                    self._queue(_Offer(place.group, unpack(place.placement), place.bytes_per_step))
                except ConfigError as error:
                    self._tell(PlacementRejected(str(error)))
            case command:
                self._queue(command)
        return b""

    def _leave_old(self, transport: Transport | None) -> None:
        """Abort the group if a newer one is to be formed. Both threads call it, each after having told the other."""
        if transport is not None and transport.epoch < self._newest:
            transport.abort(self._newer())

    def _newer(self) -> str:
        return f"epoch {self._newest} is being formed"

    def _queue(self, command: Command | _Offer | _Forming) -> None:
        with self._news:
            self._commands.append(command)
            self._news.notify_all()

    def events(self) -> bytes:
        """Wait for events, and take them all."""
        with self._news:
            self._news.wait_for(lambda: self._events)
            events, self._events = self._events, []
        return encode(events)

    def _tell(self, event: Event) -> None:
        with self._news:
            self._events.append(event)
            self._news.notify_all()

    def _main(self) -> None:
        doing = "loading"
        try:
            while True:
                for command in self._next_commands():
                    if isinstance(command, Stop):
                        self._ended = True
                        self._give_back()
                        self._tell(RankStopped())
                        return
                    doing = "forming" if isinstance(command, _Forming) else doing
                    self._obey(command)
                doing = "serving" if self._serving else doing
                if self._has_steps_to_make():
                    self._step()
                self._tell_outputs()
                self._tell_reports()
        except BaseException as error:
            self._ended = True
            self._fail(error, doing)

    def _next_commands(self) -> list[Command | _Offer | _Forming]:
        """What came in; waits for something if there is nothing else to do."""
        with self._news:
            self._news.wait_for(lambda: self._commands or self._has_steps_to_make())
            commands, self._commands = self._commands, []
        return commands

    def _has_steps_to_make(self) -> bool:
        if not self._serving:
            return False
        assert self._engine is not None
        return not self._asleep or self._steps < self._wake_through or self._engine.batcher.has_work

    def _obey(self, command: Command | _Offer | _Forming) -> None:
        match command:
            case Load():
                self._load(command)
            case _Forming(form, contacts):
                self._form(form, contacts)
            case Submit(requests):
                for request in requests:
                    try:
                        self._engine_there().batcher.add(request)
                    except ConfigError as error:
                        self._tell(Outputs((Output(request.id, (), True, "error", str(error)),)))
            case Cancel(ids):
                for id in ids:
                    self._engine_there().batcher.cancel(id)
            case Wake(epoch, step):
                if self._transport is not None and epoch == self._transport.epoch:
                    self._wake_through = max(self._wake_through, step)
            case Ask(number):
                self._asked.append(number)
            case GetResidency(number):
                if (surveyed := survey(self._engine_there().model, number)) is not None:
                    self._tell(surveyed)
            case _Offer():
                self._place(command)

    def _engine_there(self) -> Engine:
        assert self._engine is not None, "Load comes first"
        return self._engine

    def _load(self, load: Load) -> None:
        began = time.monotonic()
        if load.threads:
            torch.set_num_threads(load.threads)
        model = load_alone(
            CheckpointSource(load.path),
            load.config,
            neighbours=load.neighbours,
            display=ProgressDisplay(tell=self._tell_progress),
        )
        loaded = time.monotonic()
        self._engine = Engine(model, kv_tokens=load.config.kv_tokens, max_batch_tokens=load.max_batch_tokens)
        self._windows = WindowCutter(model, load.window_steps)
        config = model.config.get_text_config()
        self._tell(
            Loaded(
                capacity=self._engine.batcher.capacity,
                batches=isinstance(self._engine.batcher, PagedBatcher),
                vocabulary=int(config.vocab_size),
                context=getattr(config, "max_position_embeddings", None),
                end_tokens=tuple(sorted(end_tokens(model, ignore_tokenizer_eos=True))),
                seconds={"model": loaded - began, "cache for requests": time.monotonic() - loaded},
            )
        )

    def _tell_progress(self, title: str, done_bytes: int, total_bytes: int) -> None:
        now = time.monotonic()
        if done_bytes in (0, total_bytes) or now - self._told_s >= _TELL_EVERY_S:
            self._told_s = now
            self._tell(Progress(title, done_bytes, total_bytes))

    def _form(self, form: Form, contacts: ContactStore) -> None:
        """Meet the others and become one model with them. Before, and if that fails, this rank makes no step."""
        began = time.monotonic()
        self._serving = False
        engine = self._engine_there()
        newcomer = group_of(engine.model) is None
        placement = None if form.placement is None else unpack(form.placement)
        if self._transport is not None:
            self._transport.close()
        self._met_through = contacts
        try:
            self._transport = transport = self._form_transport(form, engine.model.device, contacts)
            self._leave_old(transport)
            shared = runtime_of(engine.model).rank_settings
            if form.fresh:
                transport.deadline_s = LOAD_DEADLINE_S  # they fill their slots, some from a slow disk
                display = ProgressDisplay(tell=self._tell_progress)
                group_up(engine.model, transport, settings=shared, costs=form.costs, display=display, placement=placement)
            else:
                join(engine.model, transport, settings=shared, costs=form.costs, placement=placement)
            transport.deadline_s = form.deadline_s
        except GroupError as error:
            if isinstance(error, RankMismatchError) and newcomer:
                raise  # the others can go on without it
            self._tell(Broken(form.epoch, str(error), stood=False))
            return
        self._serving, self._asleep, self._steps, self._wake_through = True, False, 0, 0
        assert self._windows is not None
        self._windows.begin()
        self._tell(Formed(form.epoch, time.monotonic() - began))

    def _step(self) -> None:
        assert self._transport is not None
        began = time.perf_counter()
        try:
            header = self._engine_there().step()
        except GroupError as error:
            self._serving = False
            self._tell(Broken(self._transport.epoch, str(error), stood=True))
            return
        self._steps += 1
        self._end_window(time.perf_counter() - began)
        self._asleep = not header.work
        if self._asleep:
            self._tell_outputs()  # before the others could think that this rank still has some
            self._tell(Asleep(self._transport.epoch, self._steps))

    def _end_window(self, seconds: float) -> None:
        """A step took so long. Tell of the window that ends with it, if one does and the last was handed over."""
        assert self._windows is not None
        with self._news:
            waits = any(isinstance(event, WindowReport) for event in self._events)
        windowed = self._windows.step(self._steps, seconds, waits=waits)
        if windowed is not None:
            self._tell(windowed)

    def _place(self, place: _Offer) -> None:
        """Make for a placement, together with the others. One that can't be is passed over, by all alike."""
        group = group_of(self._engine_there().model)
        if group is None or not self._serving or group.transport.epoch != place.group:
            return
        try:
            group.offer(place.placement, place.bytes_per_step)
        except ConfigError as error:
            self._tell(PlacementRejected(str(error)))

    def _tell_reports(self) -> None:
        """After the step that was due, so that a count doesn't change any more where there is no work."""
        asked, self._asked = self._asked, []
        for number in asked:
            epoch = -1 if self._transport is None else self._transport.epoch
            self._tell(report(self._engine_there().model, number, epoch, self._steps))

    def _tell_outputs(self) -> None:
        if self._engine is not None and (outputs := self._engine.batcher.outputs()):
            self._tell(Outputs(tuple(outputs)))

    def _give_back(self) -> None:
        if self._transport is not None:
            self._transport.close()
        if self._engine is not None:
            self._engine.batcher.close()
            runtime_of(self._engine.model).store.close()

    def _fail(self, error: BaseException, doing: str) -> None:
        if self._transport is not None:
            self._transport.abort(f"rank {self._transport.rank} failed: {type(error).__name__}: {error}")
        self._tell(
            Failed(
                doing=doing,  # type: ignore[arg-type]
                kind=type(error).__name__,
                message=str(error),
                deliberate=isinstance(error, EpslotsError),
                traceback="".join(traceback.format_exception(error)),
            )
        )
