"""The driver's side of a hand-over: its messages to both ranks, in any order of theirs."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable
from contextlib import closing
from dataclasses import replace
from unittest.mock import Mock

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.driver.hand_over_costs import LEAST_HIDDEN_S, MEETING_S, HandOverCosts
from cluster.driver.hand_overs import HandOvers
from cluster.driver.rank_loads import RankCapacity
from cluster.driver.request_router import SOON_S, GroupRouter
from cluster.driver.scheduler import Scheduler
from cluster.messages.hand_over import (
    Forget,
    GoOn,
    HandedOver,
    HandOver,
    HandOverContact,
    HandOverContacts,
    PromptProgress,
    Release,
    TakeOver,
)
from cluster.messages.rank import Command, Outputs, Submit, decode_events, encode
from cluster.rank.rank_loop import RankLoop
from epslots.generation.batchers import batcher_for
from epslots.generation.requests import Output, Request
from epslots.piece_sizes import PIECE_BYTES
from epslots.rank_groups import Role
from tests.support import zoo
from tests.support.clock_loop import ClockLoop

REQUEST = Request("a", tuple(range(50)), 20)
DONE = HandedOver(number=0, failure=None, seconds=0.1, copying_s=0.2, nbytes=1000, tokens=50, prompt_token_s=0.001)
FAILED = HandedOver(number=0, failure="the connection broke")


class Driver:
    """A request that is being handed over from ``p`` to ``d``, and all commands that are sent."""

    def __init__(self, source_machine: str = "m", target_machine: str = "m") -> None:
        self.sent: list[tuple[Hashable, Command]] = []
        self.scheduler = Scheduler()
        self.hand_overs = HandOvers(self.scheduler, self.send, form_s=1.0, deadline_s=2.0)
        self.serve("p", "prefill", source_machine)
        self.serve("d", "decode", target_machine)
        self.scheduler.add([REQUEST])
        assert [worker for worker, _ in self.scheduler.assign()] == ["p"]
        self.scheduler.count("p", Output("a", (7,)))
        self.hand_overs.consider("a")
        self.orders, self.sent = self.sent, []

    def serve(self, worker: str, role: Role, machine: str) -> None:
        self.scheduler.serve({worker: RankCapacity(1000, 16, role=role, machine=machine)})

    def send(self, worker: Hashable, command: Command) -> None:
        self.sent.append((worker, command))

    def begin_early(self) -> None:
        """It fails; another one, ``b``, is handed over while its prompt is computed."""
        self.hand_overs.take("p", FAILED)
        self.scheduler.add([Request("b", tuple(range(50)), 20)])
        self.scheduler.assign()
        costs = self.scheduler._ranks.costs
        costs.near.token_s = costs.prompt_token_s = 0.001
        self.hand_overs.consider_early("p", PromptProgress("b", 30, 20))
        self.hand_overs.consider_early("p", PromptProgress("b", 35, 15))

    def end(self) -> None:
        """Nothing is left of it."""
        self.scheduler.check()
        assert len(self.hand_overs) == 0 and not self.scheduler._moves and not self.scheduler._moving


@pytest.mark.parametrize(("machines", "kind"), [(("m", "m"), "memory"), (("m", "n"), "gloo"), (("", ""), "gloo")])
def test_both_ranks_get_one_secret(machines: tuple[str, str], kind: str):
    (target, take), (source, give) = Driver(*machines).orders
    assert (target, source) == ("d", "p")
    assert isinstance(take, TakeOver) and isinstance(give, HandOver)
    assert take.connection == give.connection and take.id == give.id == "a"
    assert (give.connection.kind, len(give.connection.secret)) == (kind, 16)
    assert give.connection.secret != Driver().orders[0][1].connection.secret  # type: ignore[union-attr]


def test_after_a_success_the_target_goes_on():
    driver = Driver()
    driver.hand_overs.take("p", DONE)
    assert driver.sent == [("d", Submit((replace(REQUEST.after((7,)), assignment=1),))), ("p", Forget("a"))]
    assert driver.scheduler.count("d", Output("a", (8,))) is None, "it is numbered as at the source"
    assert driver.scheduler.count("d", Output("a", (8,), assignment=1)) is not None
    counts = driver.hand_overs.counts
    assert (counts.done, counts.failed, counts.nbytes, counts.seconds) == (1, 0, 1000, 0.1)
    assert driver.scheduler._ranks.costs.prompt_token_s == 0.001
    driver.end()


def test_after_a_failure_the_source_goes_on():
    driver = Driver()
    driver.hand_overs.take("p", FAILED)
    assert driver.sent == [("d", Release("a"))]
    assert driver.scheduler.count("p", Output("a", (8,))) is not None
    assert (driver.hand_overs.counts.done, driver.hand_overs.counts.failed) == (0, 1)
    driver.end()


def test_a_target_that_is_lost_at_the_end_is_none():
    """It had the cache, and the source was about to forget it."""
    driver = Driver()
    driver.scheduler.release("d")
    driver.hand_overs.lose("d")
    assert driver.sent == [], "the source will notice"
    driver.hand_overs.take("p", DONE)
    assert driver.sent == [("d", Release("a")), ("p", GoOn("a"))]
    driver.end()


def test_a_request_that_comes_back_at_once_goes_on():
    """Its target is lost while its source is in a long step, and reads only then that the request has left and is back."""
    torch.set_num_threads(1)
    driver, source = Driver(), RankLoop(Mock())
    batcher = batcher_for(zoo.ZOO["mixtral"].build(), cache="rows", kv_tokens=256, max_requests=4)
    source._engine = Mock(batcher=batcher)
    batcher.add(REQUEST)
    while not batcher.outputs():
        assert batcher.prepare()
        batcher.step()
    assert batcher.hold("a") is not None
    driver.hand_overs.take("p", DONE)
    driver.scheduler.release("d")
    driver.hand_overs.lose("d")
    ((worker, rest),) = driver.scheduler.assign()
    driver.send(worker, Submit((rest,)))
    entry = driver.scheduler.served_by("p")[0]
    for command in [command for worker, command in driver.sent if worker == "p"]:
        source.command(encode(command))
    for queued in source._commands.take(lambda: True):
        source._carry_out(queued)
    source._send_outputs()
    while batcher.prepare():
        batcher.step()
        source._send_outputs()
    events = decode_events(source.events() or b"")
    outputs = [output for event in events if isinstance(event, Outputs) for output in event.outputs]
    assert all(driver.scheduler.count("p", output) for output in outputs), "all are of the request as it is now"
    assert len(entry.tokens) == 20 and [one.reason for one in outputs if one.finished] == ["length"]
    batcher.close()
    driver.end()


def test_a_lost_source_begins_anew():
    driver = Driver()
    driver.scheduler.release("p")
    driver.hand_overs.lose("p")
    assert driver.sent == [("d", Release("a"))]
    driver.hand_overs.take("p", DONE)
    assert len(driver.sent) == 1, "what a lost rank has said counts for nothing"
    assert [(worker, given.resumed) for worker, given in driver.scheduler.assign()] == [("d", 1)]
    driver.end()


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("event", [DONE, FAILED])
def test_a_cancelled_request_goes_nowhere(event: HandedOver, ended: bool):
    """Whether or not its rank has told its end."""
    driver = Driver()
    assert driver.scheduler.end("a") == "p"
    if ended:
        driver.scheduler.count("p", Output("a", (), True, "cancelled"))
    driver.hand_overs.take("p", event)
    assert driver.sent == [("d", Release("a"))]
    driver.end()


def test_a_cancelled_request_of_a_lost_source_leaves_no_claim():
    driver = Driver()
    driver.scheduler.end("a")
    driver.scheduler.count("p", Output("a", (), True, "cancelled"))
    driver.scheduler.release("p")
    driver.hand_overs.lose("p")
    assert len(driver.scheduler) == 0
    driver.end()


def test_a_hand_over_begins_before_the_first_token():
    """The same messages; the first token is the source's, and doesn't begin another one."""
    driver = Driver()
    driver.hand_overs.take("p", FAILED)
    other = Request("b", tuple(range(50)), 20)
    driver.scheduler.add([other])
    assert [worker for worker, _ in driver.scheduler.assign()] == ["p"]
    driver.sent.clear()
    driver.hand_overs.consider_early("p", PromptProgress("b", 30, 20))
    assert driver.sent == [], "nothing was measured"
    costs = driver.scheduler._ranks.costs
    costs.near.token_s = costs.prompt_token_s = 0.001
    driver.hand_overs.consider_early("p", PromptProgress("b", 35, 15))
    (target, take), (source, give) = driver.sent
    assert (target, source) == ("d", "p") and isinstance(take, TakeOver) and isinstance(give, HandOver)
    assert driver.scheduler.count("p", Output("b", (7,))) is not None
    driver.hand_overs.consider("b")
    assert len(driver.sent) == 2
    driver.hand_overs.take("p", msgspec.structs.replace(DONE, number=1))
    assert driver.sent[2:] == [("d", Submit((replace(other.after((7,)), assignment=1),))), ("p", Forget("b"))]
    assert (driver.hand_overs.counts.done, driver.hand_overs.counts.early) == (1, 1)
    driver.end()


@pytest.mark.parametrize("end", [DONE, FAILED])
def test_a_group_that_does_not_come_back_hands_nothing_over(end: HandedOver):
    """It makes no steps, so the rest of the prompt isn't computed; the target's place is free for others."""
    driver = Driver()
    driver.begin_early()
    driver.sent.clear()
    driver.hand_overs.give_up(("p",))
    assert driver.sent == [("d", Release("b"))]
    driver.end()
    driver.hand_overs.take("p", msgspec.structs.replace(end, number=1))
    assert driver.sent[1:] == ([("p", GoOn("b"))] if end is DONE else []), "the source may have sent the last piece just then"
    assert driver.hand_overs.counts.failed == 2 and not driver.hand_overs._given_up
    driver.end()


def test_a_lost_group_reports_no_end():
    """Of a hand-over that was given up before: nothing of it is kept."""
    driver = Driver()
    driver.begin_early()
    driver.hand_overs.give_up(("p",))
    assert driver.hand_overs._given_up
    driver.scheduler.release("p")
    driver.hand_overs.lose("p")
    assert not driver.hand_overs._given_up


@pytest.mark.parametrize("output", [Output("b", (7,)), Output("b", (), True, "length")])
def test_what_is_given_up_is_kept_while_its_request_runs(output: Output):
    """Also if its source never reports: others are given up later."""
    driver = Driver()
    driver.begin_early()
    driver.hand_overs.give_up(("p",))
    driver.scheduler.count("p", output)
    driver.hand_overs.give_up(("p",))
    assert bool(driver.hand_overs._given_up) != output.finished


def test_a_hand_over_after_its_prompt_needs_no_steps():
    """A group that doesn't come back gives up those that wait for its prompts alone."""
    driver = Driver()
    driver.hand_overs.give_up(("p",))
    assert driver.sent == [] and len(driver.hand_overs) == 1
    driver.hand_overs.take("p", DONE)
    assert driver.hand_overs.counts.done == 1
    driver.end()


def test_a_group_that_forms_is_waited_for_once():
    """Each attempt breaks it again."""

    async def run() -> None:
        scheduler, gone = Scheduler(), list[tuple[Hashable, ...]]()
        group = GroupRouter(scheduler, lambda *_: None, lambda: None, lambda ranks: gone.append(tuple(ranks)))
        group.serve({"p": RankCapacity(1000, 16, role="prefill")})
        loop = asyncio.get_running_loop()
        for attempt in range(10):
            loop.call_later(0.4 * SOON_S * attempt, group.pause)
        await asyncio.sleep(1.5 * SOON_S)
        assert gone == [("p",)]

    with closing(ClockLoop()) as loop:
        loop.skip_until(lambda: False)
        loop.run_until_complete(run())


def test_addresses_go_to_the_other_rank():
    driver = Driver()
    driver.hand_overs.pass_on("p", HandOverContact(0, "key", b"here"))
    driver.hand_overs.pass_on("d", HandOverContact(0, "key", b"there"))
    driver.hand_overs.pass_on("d", HandOverContact(1, "key", b"of none"))
    assert driver.sent == [("d", HandOverContacts(0, {"key": b"here"})), ("p", HandOverContacts(0, {"key": b"there"}))]
    driver.hand_overs.take("d", DONE)
    assert len(driver.hand_overs) == 1, "the source alone knows how it ended"
    driver.scheduler.clear()
    driver.hand_overs.clear()
    driver.end()


@given(
    prompt=st.integers(1, 3000),
    chunk=st.integers(1, 700),
    prompt_token_s=st.floats(1e-5, 1e-2),
    token_s=st.floats(0, 1e-3),
    fixed_s=st.floats(0, 0.1),
    token_bytes=st.integers(1, 2**20),
    step_bytes=st.sampled_from([PIECE_BYTES, 4 * PIECE_BYTES]),
)
def test_hand_overs_begin_when_they_just_end_in_time(
    prompt: int, chunk: int, prompt_token_s: float, token_s: float, fixed_s: float, token_bytes: int, step_bytes: int
):
    """The target's room isn't kept for longer than the copying takes, by the step. Where little is hidden, none begins."""
    costs = HandOverCosts()
    way, costs.prompt_token_s = costs.far, prompt_token_s
    way.fixed_s, way.token_s, way.token_bytes = fixed_s, token_s, token_bytes
    costs.observe(0, 0.0, prompt_token_s=0.0, step_bytes=step_bytes, near=False)
    steps = 1 + -(-prompt * token_bytes // step_bytes)
    seconds, begins = max(MEETING_S + way.seconds(prompt), steps * chunk * prompt_token_s), False
    for computed in range(chunk, prompt, chunk):
        left_s, before = (prompt - computed) * prompt_token_s, computed - chunk
        begins = costs.begins_early(computed, prompt - computed, chunk, near=False)
        if begins:
            assert min(left_s, computed * token_s) >= LEAST_HIDDEN_S
            assert left_s - chunk * prompt_token_s <= seconds * 1.001, "one step later it would be too late"
            assert left_s > seconds * 0.999 or before * token_s < LEAST_HIDDEN_S, "it could wait until now"
            break
    if not begins and prompt > chunk:
        assert min(left_s, computed * token_s) < LEAST_HIDDEN_S


def test_a_hand_over_without_tokens_tells_nothing():
    """As a source may report it, or the messages' defaults."""
    costs = HandOverCosts()
    before = costs.near.seconds(1000)
    costs.observe(0, 0.0, prompt_token_s=0.0, near=True)
    assert costs.near.seconds(1000) == before
    costs.observe(1000, 1.0, prompt_token_s=0.0, near=True)
    costs.observe(0, 5.0, prompt_token_s=0.0, near=True)
    assert costs.near.seconds(1000) == 1.0


def test_nothing_begins_early_before_prompts_were_timed():
    costs = HandOverCosts()
    costs.near.token_s = 1.0
    assert not costs.begins_early(1000, 100, 100, near=True)
    costs.observe(1000, 1000.0, prompt_token_s=0.01, nbytes=5000, near=True)
    assert costs.near.token_bytes == 5
    assert costs.begins_early(1000, 100, 100, near=True)
