"""``RankLoop``: one rank's life. It carries out commands, makes steps together with the other ranks, and sends events.

    stepping   ``_main``: loads, forms groups, steps the engine; sleeps when no rank has work
    commands   calls ``command``: queues it for the stepping thread, or aborts a group whose operation is stuck
    events     calls ``events``: waits for the next batch (``event_queue.py``)

None of these threads waits for another's work. Each hand-over has a thread more (``hand_over_threads.py``), which asks the
stepping thread for pieces of caches. A group that breaks costs only the current step: the rank sends ``Broken``, waits, and
repeats the step in the next epoch. A request whose computation raises ends with an error (``generation/batcher.py``), and the
rank sends ``Broken`` if that broke the group. Any other error ends the rank (``Failed``): its state is unknown then.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import torch

from cluster.lasting.descriptions import RankDescription
from cluster.messages.hand_over import Forget, GoOn, HandOver, HandOverContacts, PromptProgress, Release, TakeOver
from cluster.messages.placement import GetGroupState, PlacementRejected, SetPlacement
from cluster.messages.rank import (
    Adopt,
    Adopted,
    Asleep,
    Broken,
    Cancel,
    Contacts,
    Event,
    Form,
    Formed,
    GetReport,
    GiveUp,
    Load,
    Loaded,
    Outputs,
    Ping,
    Pong,
    RankStopped,
    Stop,
    Submit,
    Wake,
    WakesOthers,
    decode_command,
    encode,
)
from cluster.rank.command_queue import CommandQueue, Errand, Forming, Placing, Queued
from cluster.rank.contact_store import ContactStore
from cluster.rank.event_queue import EventQueue
from cluster.rank.hand_over_threads import Connect, HandOverThreads, connect
from cluster.rank.rank_reports import WindowCutter, failure_of, group_state, loaded_report, rank_report
from epslots.config import LOAD_DEADLINE_S
from epslots.devices import cpu_share, make_current, resolve_device, wait_for_freed_memory
from epslots.errors import ConfigError, GroupError, RankMismatchError
from epslots.generation.engine import Engine
from epslots.generation.requests import Output, Request
from epslots.group.join import join, start_rank
from epslots.group.rank_group import group_of
from epslots.loading import load_alone
from epslots.models.checkpoint import CheckpointSource
from epslots.placement.placement import unpack
from epslots.progress import ProgressDisplay
from epslots.runtime import runtime_of
from epslots.transport.transport import Transport

FormTransport = Callable[[Form, torch.device, ContactStore], Transport]
"""Connects the ranks of an epoch; raises PeerLost if some don't come in time."""


class RankLoop:
    """One rank.

    Args:
        form: connects the ranks of an epoch.
        clock: seconds, for the pace of events.
        connect: connects two ranks for a hand-over.

    Attributes:
        hand_overs: those under way.
    """

    def __init__(self, form: FormTransport, clock: Callable[[], float] = time.monotonic, connect: Connect = connect) -> None:
        self._form_transport = form
        self._thread = threading.Thread(target=self._main, name="epslots-steps", daemon=True)
        self._news = threading.Condition()
        """Guards the commands and events, and is notified of them."""
        self._commands = CommandQueue(self._news)
        self._events = EventQueue(self._news, clock)
        self.hand_overs = HandOverThreads(
            lambda: self._loaded_engine.batcher, self._commands.between_steps, self._send, connect
        )
        self._contacts: ContactStore | None = None
        """Of the newest epoch; only the commands' thread uses it."""
        self._newest = -1
        """The newest epoch that is to form; written by the commands' thread."""
        self._load_order: Load | None = None
        self._loaded: Loaded | None = None
        # The stepping thread alone uses the rest, but for the transport, which the commands' thread reads and aborts.
        self._engine: Engine | None = None
        self._windows: WindowCutter | None = None
        self._transport: Transport | None = None
        self._transport_contacts: ContactStore | None = None
        """Kept for as long as the transport, since NCCL uses it."""
        self._ended = self._serving = self._asleep = self._reports_prompts = False
        self._steps = 0
        """Steps in this epoch; the same on all its ranks."""
        self._wake_through = 0
        self._reports_due: list[GetReport] = []

    def start(self) -> None:
        """Start the stepping thread."""
        self._thread.start()

    # The stepping thread: a rank's life.

    def _main(self) -> None:
        doing = "loading"
        try:
            while True:
                for command in self._commands.take(self._has_steps_to_make):
                    if isinstance(command, Stop):
                        self._ended = True
                        self._release()
                        self._send(RankStopped())
                        return
                    doing = "forming" if isinstance(command, Forming) else doing
                    self._carry_out(command)
                doing = "serving" if self._serving else doing
                if self._has_steps_to_make():
                    self._step()
                self._send_outputs()
                self._send_reports()
        except BaseException as error:
            self._ended = True
            self._fail(error, doing)
        finally:
            self.hand_overs.abort_all("the rank has ended", end=True)
            self._commands.end()

    def _has_steps_to_make(self) -> bool:
        if not self._serving:
            return False
        batcher = self._loaded_engine.batcher
        return not self._asleep or self._steps < self._wake_through or batcher.has_work or batcher.waits_for_room

    @property
    def _loaded_engine(self) -> Engine:
        assert self._engine is not None, "Load comes first"
        return self._engine

    def _carry_out(self, command: Queued) -> None:
        match command:
            case Load():
                self._load(command)
            case Adopt():
                self._adopt()
            case GiveUp():
                self._give_up_requests()
            case Forming(form, contacts):
                self._form(form, contacts)
            case Submit(requests):
                for request in requests:
                    self._add(request)
            case Cancel(ids):
                for id in ids:
                    self._loaded_engine.batcher.cancel(id)
            case Wake(epoch, step) if self._transport is not None and self._transport.epoch == epoch:
                self._wake_through = max(self._wake_through, step)
            case GetReport():
                self._reports_due.append(command)
            case GetGroupState(number):
                if (state := group_state(self._loaded_engine.model, number)) is not None:
                    self._send(state)
            case Placing():
                self._set_placement(command)
            case GoOn(id):
                self._loaded_engine.batcher.resume(id)
            case Forget(id):
                self._loaded_engine.batcher.forget(id)
            case Release(id):
                self._loaded_engine.batcher.release(id)
            case Errand():
                if not command.run():
                    self._commands.put_again(command)

    def _load(self, load: Load) -> None:
        began = time.monotonic()
        device = resolve_device(load.config.device)
        if threads := load.threads or cpu_share(device, load.neighbours):
            torch.set_num_threads(threads)
        make_current(device)
        wait_for_freed_memory(device)  # of a lost rank that this one replaces
        model = load_alone(
            CheckpointSource(load.path),
            load.config,
            neighbours=load.neighbours,
            ranks=load.ranks,
            display=ProgressDisplay(listener=self._events.send_progress),
        )
        loaded = time.monotonic()
        self._engine = Engine(model)
        self._windows = WindowCutter(model, load.window_steps)
        self.hand_overs.budget.aim_at(self._engine.batcher.chunk_size.target_s)
        self._loaded = loaded_report(self._engine, {"model": loaded - began, "cache for requests": time.monotonic() - loaded})
        self._send(self._loaded)

    def _adopt(self) -> None:
        """Drop all that the last driver has asked for, and report to the new one; the model and its slots stay."""
        self._give_up_requests()
        self._reports_due.clear()
        self._serving = False
        self._events.clear()
        assert self._loaded is not None, "Load comes first"
        self._send(Adopted(self._loaded, self._newest, grouped=group_of(self._loaded_engine.model) is not None))

    def _give_up_requests(self) -> None:
        self.hand_overs.abort_all("another driver has come", forget=True)
        if self._engine is not None:
            self._engine.batcher.cancel_all()
            self._engine.batcher.outputs()

    def _form(self, form: Form, contacts: ContactStore) -> None:
        """Form a group with the other ranks. Until then, and if that fails, this rank makes no step."""
        began = time.monotonic()
        self._serving = False
        model = self._loaded_engine.model
        newcomer = group_of(model) is None
        if self._transport is not None:
            self._transport.close()
        self._transport_contacts = contacts
        try:
            self._transport = self._form_transport(form, model.device, contacts)
            self._leave_old(self._transport)
            self._join(form, self._transport)
        except GroupError as error:
            if isinstance(error, RankMismatchError) and newcomer:
                raise  # the others can go on without it
            self._send(Broken(form.epoch, str(error), stood=False))
            return
        self._serving, self._asleep, self._steps, self._wake_through = True, False, 0, 0
        self._reports_prompts = form.reports_prompts
        assert self._windows is not None
        self._windows.begin()
        self._send(Formed(form.epoch, time.monotonic() - began))

    def _join(self, form: Form, transport: Transport) -> None:
        """Make this rank's model a part of the group's."""
        model = self._loaded_engine.model
        placement = None if form.placement is None else unpack(form.placement)
        shared = runtime_of(model).rank_settings
        if form.fresh:
            transport.deadline_s = LOAD_DEADLINE_S  # the ranks fill their slots, some from a slow disk
            display = ProgressDisplay(listener=self._events.send_progress)
            start_rank(model, transport, settings=shared, costs=form.costs, display=display, placement=placement)
        else:
            join(model, transport, settings=shared, costs=form.costs, placement=placement)
        transport.deadline_s = form.deadline_s

    def _add(self, request: Request) -> None:
        if not request.resumed:  # else its reader has tokens already
            self._events.expect(request.id)
        try:
            self._loaded_engine.batcher.add(request)
        except ConfigError as error:
            self._send(Outputs((Output(request.id, (), True, "error", str(error), assignment=request.assignment),)))

    def _set_placement(self, placing: Placing) -> None:
        """Offer a placement to the group, which follows it once all ranks have it; all reject an impossible one alike."""
        group = group_of(self._loaded_engine.model)
        if group is None or not self._serving or group.transport.epoch != placing.epoch:
            return
        try:
            group.offer(placing.placement, placing.bytes_per_step)
        except ConfigError as error:
            self._send(PlacementRejected(str(error)))

    def _step(self) -> None:
        assert self._transport is not None
        if self._asleep and self._loaded_engine.batcher.waits_for_room:
            self._send(WakesOthers(self._transport.epoch))  # the driver knows of no work
        began = time.perf_counter()
        try:
            header = self._loaded_engine.step()
        except GroupError as error:
            self._serving = False
            self._send(Broken(self._transport.epoch, str(error), stood=True))
            return
        self._steps += 1
        for prompt in self._loaded_engine.batcher.prompts() if self._reports_prompts else ():
            self._send(PromptProgress(*prompt))
        self._end_window(time.perf_counter() - began)
        self._asleep = not header.work
        if self._asleep:
            self._send_outputs()  # first: Asleep says that this rank has none left
            self._send(Asleep(self._transport.epoch, self._steps))

    def _end_window(self, seconds: float) -> None:
        """Note a step of this duration. If a window ends with it, send its load report, unless the last one still waits."""
        assert self._windows is not None
        self.hand_overs.budget.observe_step(seconds)
        if (report := self._windows.step(self._steps, seconds, waits=self._events.holds_load_report)) is not None:
            self._send(report)

    def _send_outputs(self) -> None:
        if self._engine is not None and (outputs := self._engine.batcher.outputs()):
            self._send(Outputs(tuple(outputs)))

    def _send_reports(self) -> None:
        """After the current step, so that counters stand still once there is no work."""
        due, self._reports_due = self._reports_due, []
        for asked in due:
            epoch = -1 if self._transport is None else self._transport.epoch
            self._send(rank_report(self._loaded_engine, asked, epoch, self._steps))

    def _release(self) -> None:
        if self._transport is not None:
            self._transport.close()
        if self._engine is not None:
            self._engine.batcher.close()
            runtime_of(self._engine.model).store.close()

    def _fail(self, error: BaseException, doing: str) -> None:
        if self._transport is not None:
            self._transport.abort(f"rank {self._transport.rank} failed: {type(error).__name__}: {error}")
        self._send(failure_of(error, doing))

    # The other threads.

    def command(self, message: bytes) -> bytes:
        """Take a command; returns its answer at once, also during a step."""
        match decode_command(message):
            case Ping():
                return encode(Pong(self._thread.is_alive() and not self._ended))
            case Load() as load:
                self._load_order = load
                self._commands.put(load)
            case Form() as form:
                self._prepare_to_form(form)
            case Contacts(epoch, entries):
                if self._contacts is not None and self._contacts.epoch == epoch:
                    self._contacts.take(entries)
            case SetPlacement() as place:
                try:  # here and not between two steps, because a large one takes some milliseconds
                    self._commands.put(Placing(place.epoch, unpack(place.placement), place.bytes_per_step))
                except ConfigError as error:
                    self._send(PlacementRejected(str(error)))
            case HandOver() as order:
                self.hand_overs.give(order)
            case TakeOver() as order:
                self.hand_overs.take(order)
            case HandOverContacts() as contacts:
                self.hand_overs.meet(contacts)
            case command:
                self._commands.put(command)
        return b""

    def begin_term(self, term: int) -> None:
        """Another driver takes over. All that waits for the last one ends: its group, its rendezvous, its ``events``."""
        reason = "another driver has come"
        if self._transport is not None or self._contacts is not None:
            self._newest += 1
        if self._contacts is not None:
            self._contacts.end(reason)
        self._leave_old(self._transport)
        self._events.begin_term(term)

    def describe(self) -> RankDescription:
        """The rank's state, for a driver that may adopt it; from any thread."""
        return RankDescription(self._load_order, self._loaded is not None, self._thread.is_alive() and not self._ended)

    def _prepare_to_form(self, form: Form) -> None:
        """Abort the last group: this frees a step that waits for a lost rank, and ranks that wait for this one."""
        self._newest = max(self._newest, form.epoch)
        self._leave_old(self._transport)
        if self._contacts is not None:
            self._contacts.end(self._newer_epoch())
        self._contacts = ContactStore(form.epoch, self._send, form.form_s)
        self._commands.put(Forming(form, self._contacts))

    def _leave_old(self, transport: Transport | None) -> None:
        """Abort a group if a newer one is to form. Both threads call it, each after its own write, so that one sees both."""
        if transport is not None and transport.epoch < self._newest:
            transport.abort(self._newer_epoch())

    def _newer_epoch(self) -> str:
        return f"epoch {self._newest} is being formed"

    def _send(self, event: Event) -> None:
        """Send an event to the driver; from any thread."""
        self._events.send(event)

    def events(self, term: int = 0) -> bytes | None:
        """Wait for events, and take all of them; None once a newer driver's term has begun."""
        return self._events.take(term)
