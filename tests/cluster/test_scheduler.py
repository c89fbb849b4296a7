"""The books of requests, and who is woken when: state machines that never lose a request or leave a rank waiting alone."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cluster.driver.hand_over_costs import FIRST_SHORT_TOKENS, HandOverCosts
from cluster.driver.idle_tracker import IdleTracker
from cluster.driver.rank_loads import RankCapacity
from cluster.driver.scheduled_request import MOST_SHARED_LOSSES, Move
from cluster.driver.scheduler import MOST_LOSSES, RETRY_TOKENS, Scheduler
from cluster.messages.hand_over import PromptProgress
from epslots.generation.requests import Output, Reason, Request, TokenLogprobs


def request(id: str, prompt: int = 3, new: int = 5, priority: int = 0) -> Request:
    return Request(id, tuple(range(prompt)), new, priority=priority)


def assigned(scheduler: Scheduler, **capacities: RankCapacity) -> list[tuple[object, str]]:
    scheduler.serve(capacities)
    return [(worker, request.id) for worker, request in scheduler.assign()]


WIDE = RankCapacity(1000, max_requests=16)


def test_the_least_loaded_rank_is_next():
    scheduler = Scheduler()
    for id, prompt, new in (("a", 10, 50), ("b", 10, 10), ("c", 10, 10), ("d", 10, 10), ("e", 1, 1)):
        scheduler.add([request(id, prompt, new)])
    found = assigned(scheduler, x=WIDE, y=WIDE)
    assert found == [("x", "a"), ("y", "b"), ("y", "c"), ("y", "d"), ("x", "e")]


def test_few_requests_are_spread_over_the_groups():
    scheduler = Scheduler()
    for id in "abcde":
        scheduler.add([request(id)])
    for group in "xy":
        scheduler.serve({f"{group}{rank}": WIDE for rank in range(2)})
    assert [worker for worker, _ in scheduler.assign()] == ["x0", "y0", "x1", "y1", "x0"]


def test_a_request_waits_until_there_is_room():
    scheduler = Scheduler()
    for id in "abc":
        scheduler.add([request(id, 40, 5)])
    capacity = RankCapacity(100, max_requests=16)
    assert assigned(scheduler, x=capacity) == [("x", "a"), ("x", "b")]
    assert scheduler.queued == 1
    assert assigned(scheduler, x=capacity, y=capacity) == [("y", "c")]  # a rank that came later
    scheduler.add([request("d", 99, 5)])
    assert assigned(scheduler, x=capacity, y=capacity) == []
    assert scheduler.count("y", Output("c", (1,), True, "stop")) is not None
    assert assigned(scheduler, x=capacity, y=capacity) == [("y", "d")]


@pytest.mark.parametrize(("max_requests", "given"), [(1, 2), (3, 4), (8, 10)])
def test_a_rank_gets_a_few_more_requests_than_it_runs(max_requests: int, given: int):
    scheduler = Scheduler()
    for number in range(12):
        scheduler.add([request(str(number))])
    capacity = RankCapacity(1000, max_requests)
    assert assigned(scheduler, x=capacity) == [("x", str(number)) for number in range(given)]
    assert assigned(scheduler, x=capacity) == []
    scheduler.count("x", Output("1", (7,), True, "stop"))
    assert assigned(scheduler, x=capacity, y=capacity)[0] == ("y", str(given)), "the rank with fewer tokens to compute"


def test_choices_of_a_prompt_go_to_one_rank_while_it_has_room():
    """It computes their prompt once; the rest go together to the next."""
    scheduler = Scheduler()
    scheduler.add([request("c", 10, 10)])
    scheduler.add([request(f"a{choice}", 10, 50) for choice in range(5)])
    scheduler.add([request(f"b{choice}", 10, 5) for choice in range(2)])
    found = assigned(scheduler, x=RankCapacity(60, max_requests=16), y=RankCapacity(30, max_requests=16))
    assert found == [
        ("x", "c"), ("y", "a0"), ("y", "a1"), ("y", "a2"), ("x", "a3"), ("x", "a4"), ("x", "b0"), ("x", "b1")
    ]  # fmt: skip
    scheduler.add([request("b2", 10, 5)])  # of another prompt: it goes where there is room
    assert scheduler.count("y", Output("a0", (), True, "stop")) is not None
    assert assigned(scheduler, x=RankCapacity(60, max_requests=16), y=RankCapacity(30, max_requests=16)) == [("y", "b2")]


def test_the_lowest_priority_is_served_first():
    """Equal ones in the order of arrival; a running one isn't stopped, and one of a lost rank has its place by both."""
    scheduler, one = Scheduler(), RankCapacity(1000, max_requests=1)
    for id, priority in (("a", 0), ("b", 5), ("c", -1), ("d", 0)):
        scheduler.add([request(id, priority=priority)])
    assert assigned(scheduler, x=one) == [("x", "c"), ("x", "a")]
    scheduler.add([request("e", priority=-2)])
    assert assigned(scheduler, x=one) == []
    scheduler.release("x", blame=False)
    assert assigned(scheduler, y=WIDE) == [("y", id) for id in "ecadb"]


def test_a_long_wait_is_seen():
    """Until the first token, on a rank or in the queue: that lower priorities starve is no secret."""
    scheduler = Scheduler()
    assert scheduler.longest_wait_s(5.0) == 0
    for now_s, id in enumerate("abc", start=10):
        scheduler.add([request(id)], now_s)
    scheduler.serve({"x": RankCapacity(1000, max_requests=1)})
    scheduler.assign()
    assert scheduler.longest_wait_s(20.0) == 10
    scheduler.count("x", Output("a", (1,)))
    assert scheduler.longest_wait_s(20.0) == 9
    scheduler.end("b")
    assert scheduler.longest_wait_s(20.0) == 8


PREFILL, DECODE = replace(WIDE, role="prefill"), replace(WIDE, role="decode")


def with_roles(**ranks: RankCapacity) -> Scheduler:
    """A scheduler for which no prompt is short."""
    scheduler = Scheduler()
    scheduler._ranks.costs.prompt_token_s = 1.0
    scheduler._ranks.costs.stays = lambda *_: False  # type: ignore[method-assign]
    scheduler.serve(ranks)
    return scheduler


def test_a_request_decodes_where_most_cache_is_free():
    """Chosen when its prompt has ended: until then others may have come."""
    scheduler = with_roles(p=PREFILL, x=DECODE, y=replace(DECODE, kv_tokens=900), z=replace(DECODE, kv_tokens=100))
    for id in "ab":
        scheduler.add([request(id, 200, 20)])
    assert [(worker, given.id) for worker, given in scheduler.assign()] == [("p", "a"), ("p", "b")]
    assert scheduler.begin_move("a") is None, "its prompt isn't computed"
    for id in "ab":
        scheduler.count("p", Output(id, (7,)))
    moves = [scheduler.begin_move(id) for id in "ab"]
    assert [move.target for move in moves if move is not None] == ["x", "y"], "x's room is taken from the beginning"
    assert not scheduler.busy(["p"]), "they make no steps meanwhile"
    assert moves[0] is not None and scheduler.end_move(moves[0], done=True) == "moved"
    assert [entry.request.id for entry in scheduler.served_by("x")] == ["a"]
    assert scheduler.busy(["x"])
    scheduler.check()


def test_a_full_cache_or_little_left_moves_nothing():
    scheduler = with_roles(p=PREFILL, x=replace(DECODE, kv_tokens=150))
    scheduler.add([request("long", 200, 20)])
    scheduler.add([request("short", 9, 8)])
    scheduler.add([request("fits", 9, 20)])
    scheduler.assign()
    for id in ("long", "short", "fits"):
        scheduler.count("p", Output(id, (7,)))
    fits = scheduler.begin_move("fits")
    assert fits is not None
    assert scheduler.begin_move("long") is None, "an idle rank would take it, as an engine does; this one isn't"
    assert scheduler.begin_move("short") is None, "7 tokens are left"


def test_a_rank_hands_few_requests_over_at_a_time():
    scheduler = with_roles(p=PREFILL, x=DECODE, y=DECODE)
    for id in "abc":
        scheduler.add([request(id, 9, 20)])
    scheduler.assign()
    for id in "abc":
        scheduler.count("p", Output(id, (7,)))
    first, second, third = (scheduler.begin_move(id) for id in "abc")
    assert first is not None and second is not None and third is None
    scheduler.end_move(first, done=False)
    assert scheduler.begin_move("c") is not None
    scheduler.check()


def test_a_failed_hand_over_is_tried_again_later():
    """After some tokens, and then after more."""
    scheduler = with_roles(p=PREFILL, x=DECODE)
    scheduler.add([request("a", 9, 200)])
    scheduler.assign()
    tried, made = [], 0
    while made < 5 * RETRY_TOKENS:
        scheduler.count("p", Output("a", (7,)))
        made += 1
        if (move := scheduler.begin_move("a")) is not None:
            tried.append(made)
            assert scheduler.end_move(move, done=False) == "stays"
    assert tried == [1, 1 + RETRY_TOKENS, 1 + 3 * RETRY_TOKENS]


def test_prompts_wait_for_a_group_that_soon_serves_again():
    """Or they would hold up what is being decoded, whenever a group of the others forms anew."""
    scheduler = with_roles(p=PREFILL, q=PREFILL, x=DECODE)
    scheduler.pause(["p", "q"], soon=True)
    scheduler.add([request("a", 50, 20)])
    assert scheduler.assign() == []
    scheduler.release("p")
    assert scheduler.assign() == [], "another one of them is there"
    scheduler.serve({"q": PREFILL})
    assert [worker for worker, _ in scheduler.assign()] == ["q"]
    for end in (lambda: scheduler.pause(["q"]), lambda: scheduler.release("q", blame=False)):
        scheduler.pause(["q"], soon=True)
        scheduler.add([request(f"b{len(scheduler)}", 50, 20)])
        assert scheduler.assign() == []
        end()
        assert {worker for worker, _ in scheduler.assign()} == {"x"}, "it doesn't come, or is lost"
    scheduler.check()


def test_where_one_role_is_missing_the_other_does_all():
    scheduler = with_roles(p=PREFILL, x=DECODE)
    scheduler.pause(["p"])
    scheduler.add([request("a", 50, 20)])
    assert [worker for worker, _ in scheduler.assign()] == ["x"]
    scheduler.serve({"p": PREFILL})
    scheduler.pause(["x"])
    scheduler.add([request("b", 50, 20)])
    assert [worker for worker, _ in scheduler.assign()] == ["p"]
    scheduler.count("p", Output("b", (7,)))
    assert scheduler.begin_move("b") is None
    scheduler.serve({"x": DECODE})
    scheduler.count("p", Output("b", (7,)))
    assert scheduler.begin_move("b") is not None, "now there is one that decodes"


NEAR = True


def test_short_prompts_stay_where_decoding_is():
    """Short by measured costs: what a prompt holds up there, against a hand-over."""
    costs = HandOverCosts()
    assert costs.stays(FIRST_SHORT_TOKENS, 100, 8, NEAR) and not costs.stays(FIRST_SHORT_TOKENS + 1, 100, 8, NEAR)
    for tokens, seconds in ((100, 0.03), (300, 0.05), (200, 0.04)):
        costs.observe(tokens, seconds, prompt_token_s=0.001, near=NEAR)
    assert (costs.near.fixed_s, costs.near.token_s) == pytest.approx((0.02, 0.0001))
    assert costs.stays(20, 20, 0, NEAR) and not costs.stays(20, 20, 1, NEAR), "a stream that waits counts as the request"
    assert costs.stays(20, 400, 1, NEAR), "most of it is cached there"
    alike = HandOverCosts()
    for _ in range(3):
        alike.observe(100, 0.05, 0.0, near=NEAR)
    assert alike.near.seconds(100) == pytest.approx(0.05)
    assert alike.prompt_token_s is None
    scheduler = Scheduler()
    scheduler.serve({"p": PREFILL, "x": DECODE})
    scheduler.add([request("short", FIRST_SHORT_TOKENS, 20)])
    scheduler.add([request("long", FIRST_SHORT_TOKENS + 1, 20)])
    assert [worker for worker, _ in scheduler.assign()] == ["x", "p"]


def test_an_early_hand_over_is_one_at_a_time():
    """Of a rank, and once for each request; afterwards it is tried again when the prompt is done."""
    scheduler = with_roles(p=PREFILL, x=DECODE)
    costs = scheduler._ranks.costs
    assert not costs.begins_early(100, 50, 50, not NEAR), "nothing was measured"
    scheduler.add([request("a", 200, 20)])
    scheduler.assign()
    costs.far.token_s = 1.0
    assert scheduler.begin_early_move("x", PromptProgress("a", 150, 50)) is None, "another rank's"
    assert scheduler.begin_early_move("p", PromptProgress("nobody", 150, 50)) is None
    move = scheduler.begin_early_move("p", PromptProgress("a", 150, 50))
    assert move is not None and move.early and move.target == "x"
    assert scheduler.busy(["p"]), "it is computed meanwhile"
    costs.far.token_s = 0.0
    scheduler.add([request("b", 200, 20)])
    assert [worker for worker, _ in scheduler.assign()] == ["p"]
    costs.far.token_s = 1.0
    assert scheduler.begin_early_move("p", PromptProgress("a", 170, 30)) is None
    assert scheduler.begin_early_move("p", PromptProgress("b", 150, 50)) is None, "one at a time"
    assert scheduler.end_move(move, done=False) == "stays"
    assert scheduler.begin_early_move("p", PromptProgress("a", 180, 20)) is None, "it has failed once"
    scheduler.count("p", Output("a", (7,)))
    late = scheduler.begin_move("a")
    assert late is not None and not late.early, "it waits for no further token"
    scheduler.count("p", Output("b", (7,)))
    assert scheduler.begin_early_move("p", PromptProgress("b", 200, 0)) is None, "its prompt is done"
    scheduler.check()


LOGPROBS = tuple(TokenLogprobs(token, -float(token)) for token in range(1, 30))
"""Of the tokens of ``request``'s prompts, from the second on."""


def test_a_moved_request_goes_on_in_its_prompt():
    """Log-probabilities of the prompt that arrived aren't sent again."""
    scheduler = Scheduler()
    scheduler.add([replace(request("a", 9), prompt_logprobs=0)])
    for number, arrived in enumerate(((), LOGPROBS[:2], LOGPROBS[2:5])):
        scheduler.serve({"x": WIDE})
        scheduler.assign()
        assert scheduler.count("x", Output("a", (), prompt_logprobs=arrived, assignment=number)) is not None
        scheduler.release("x", blame=False)
    scheduler.serve({"x": WIDE})
    ((_, moved),) = scheduler.assign()
    assert (moved.prompt_logprobs, moved.prompt_logprobs_delivered) == (0, 5)
    scheduler.count("x", Output("a", (7,), prompt_logprobs=LOGPROBS[5:8], assignment=3))
    scheduler.release("x")
    scheduler.serve({"x": WIDE})
    ((_, moved),) = scheduler.assign()
    assert (moved.prompt_logprobs, moved.resumed) == (None, 1)


def test_a_lost_rank_gives_back_in_order_with_what_had_arrived():
    scheduler = Scheduler()
    for id in "abcd":
        scheduler.add([request(id)])
    assert assigned(scheduler, x=RankCapacity(6, max_requests=16)) == [("x", "a"), ("x", "b")]
    scheduler.count("x", Output("a", (7, 8)))
    moved, given_up = scheduler.release("x")
    assert [entry.request.id for entry in moved] == ["a", "b"]
    assert not given_up
    assert scheduler.count("x", Output("a", (9,))) is None  # it isn't listened to any more
    scheduler.serve({"y": WIDE})
    again = scheduler.assign()
    assert [r.id for _, r in again] == list("abcd")
    assert again[0][1] == Request("a", (0, 1, 2, 7, 8), 3, resumed=2, assignment=1)


def test_a_suspect_is_tried_alone_and_in_the_end_given_up():
    scheduler = Scheduler()
    scheduler.add([request("bad")])
    scheduler.add([request("good")])
    for _ in range(MOST_SHARED_LOSSES):
        assert assigned(scheduler, x=WIDE) == [("x", "bad"), ("x", "good")]
        assert scheduler.release("x")[1] == []
    scheduler.add([request("new")])
    for _ in range(MOST_LOSSES - MOST_SHARED_LOSSES - 1):
        assert assigned(scheduler, x=WIDE) == [("x", "bad")]
        assert scheduler.release("x")[1] == []
    assert assigned(scheduler, x=WIDE) == [("x", "bad")]
    assert [entry.request.id for entry in scheduler.release("x")[1]] == ["bad"]
    assert assigned(scheduler, x=WIDE) == [("x", "good")]
    scheduler.count("x", Output("good", (1,), True, "stop", assignment=MOST_SHARED_LOSSES))
    assert assigned(scheduler, x=WIDE) == [("x", "new")]


def test_a_request_that_gets_on_is_no_suspect():
    scheduler = Scheduler()
    scheduler.add([request("a", 3, 100)])
    for token in range(3 * MOST_LOSSES):
        assert assigned(scheduler, x=WIDE) == [("x", "a")]
        assert scheduler.count("x", Output("a", (token,), assignment=token)) is not None
        assert scheduler.release("x")[1] == []


def test_an_ended_request_is_awaited_but_not_told_of():
    scheduler = Scheduler()
    scheduler.add([request("a")])
    assert scheduler.end("a") is None  # queued: simply gone
    assert "a" not in scheduler
    scheduler.add([request("b")])
    scheduler.serve({"x": WIDE})
    scheduler.assign()
    assert scheduler.end("b") == "x"
    assert scheduler.end("b") is None
    assert scheduler.busy(["x"])
    assert scheduler.count("x", Output("b", (1, 2))) is None
    assert scheduler.count("x", Output("b", (), True, "cancelled")) is None
    assert not scheduler.busy(["x"])
    assert len(scheduler) == 0


class Books(RuleBasedStateMachine):
    """Requests come, are served, cancelled and moved at random; each of them ends exactly once."""

    @initialize()
    def begin(self) -> None:
        self.scheduler = Scheduler()
        self.numbers = 0
        self.workers = {f"w{number}": RankCapacity(40, 1 + 3 * (number % 2)) for number in range(3)}
        self.scheduler.serve(self.workers)
        self.paused: set[str] = set()
        self.has: dict[str, dict[str, Request]] = {worker: {} for worker in self.workers}
        self.waiting: dict[str, list[int]] = {}
        """The tokens that the user has got, of requests that aren't done for him."""
        self.asked: dict[str, Request] = {}
        """As they were added."""
        self.logprobs: dict[str, int] = {}
        """Log-probabilities of its prompt that the user has."""

    @rule(
        prompt=st.integers(1, 30),
        new=st.integers(1, 8),
        choices=st.integers(1, 3),
        logprobs=st.booleans(),
        priority=st.integers(-1, 1),
    )
    def add(self, prompt: int, new: int, choices: int, logprobs: bool, priority: int) -> None:
        self.numbers += 1
        added = [request(f"{self.numbers}.{choice}", prompt, new, priority) for choice in range(choices)]
        if logprobs:
            added[0] = replace(added[0], prompt_logprobs=0)
        self.scheduler.add(added)
        self.asked |= {each.id: each for each in added}
        self.waiting |= {each.id: [] for each in added}
        self.logprobs |= {each.id: 0 for each in added}

    @rule()
    def assign(self) -> None:
        last: Request | None = None
        for worker, given in self.scheduler.assign():
            assert isinstance(worker, str)
            assert given.id in self.waiting
            assert not any(given.id in has for has in self.has.values())
            assert worker not in self.paused
            asked, tokens = self.asked[given.id], self.waiting[given.id]
            assert given.prompt == (*asked.prompt, *tokens)
            assert given.prompt_logprobs == (None if tokens else asked.prompt_logprobs)
            assert given.prompt_logprobs_delivered == (0 if tokens else self.logprobs[given.id])
            self.has[worker][given.id] = given
            last = given if last is None or given.priority >= last.priority else pytest.fail("a worse priority came first")
        self.check_idle()

    def check_idle(self) -> None:
        assert not self.scheduler.queued or all(self.has[worker] for worker in self.workers.keys() - self.paused), (
            "an idle rank takes the next"
        )

    @precondition(lambda self: any(self.has.values()))
    @rule(data=st.data(), many=st.integers(1, 3))
    def serve(self, data: st.DataObject, many: int) -> None:
        worker = data.draw(st.sampled_from([w for w, has in self.has.items() if has]))
        id = data.draw(st.sampled_from(sorted(self.has[worker])))
        given = self.has[worker][id]
        tokens = tuple(range(100, 100 + min(many, given.max_new_tokens)))
        portion: tuple[TokenLogprobs, ...] = ()
        if given.prompt_logprobs is not None:  # the prompt comes first, in portions
            portion = LOGPROBS[given.prompt_logprobs_delivered : len(given.prompt) - 1][:many]
            whole = given.prompt_logprobs_delivered + len(portion) == len(given.prompt) - 1
            tokens = tokens if whole and data.draw(st.booleans()) else ()
        finished = len(tokens) == given.max_new_tokens
        output = Output(
            id, tokens, finished, "length" if finished else None, prompt_logprobs=portion, assignment=given.assignment
        )
        entry = self.scheduler.count(worker, output)
        assert (entry is not None) == (id in self.waiting)
        self.logprobs[id] += len(portion) if id in self.waiting else 0
        if id in self.waiting:
            self.waiting[id] += tokens
        if finished:
            del self.has[worker][id]
            self.waiting.pop(id, None)
        else:
            self.has[worker][id] = given.after(tokens, len(portion))
        self.after_outputs()

    def after_outputs(self) -> None:
        """The router's use of each output."""

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(sorted(self.waiting)))
        del self.waiting[id]
        worker = self.scheduler.end(id)
        assert worker == next((w for w, has in self.has.items() if id in has), None)
        if worker is not None:
            given = self.has[worker].pop(id)
            assert self.scheduler.count(worker, Output(id, (), True, "cancelled", assignment=given.assignment)) is None

    @precondition(lambda self: any(self.has.values()))
    @rule(data=st.data(), output=st.sampled_from([((7,), None), ((), "cancelled"), ((), "error"), ((7,), "length")]))
    def hear_late(self, data: st.DataObject, output: tuple[tuple[int, ...], Reason | None]) -> None:
        """A rank's news of an assignment before its present one: nothing of it counts."""
        worker = data.draw(st.sampled_from([w for w, has in self.has.items() if has]))
        given = self.has[worker][data.draw(st.sampled_from(sorted(self.has[worker])))]
        tokens, reason = output
        for earlier in range(given.assignment):
            late = Output(given.id, tokens, reason is not None, reason, assignment=earlier)
            assert self.scheduler.count(worker, late) is None
            assert self.scheduler.begin_early_move(worker, PromptProgress(given.id, 1, 1, earlier)) is None

    @precondition(lambda self: len(self.workers) > 1)
    @rule(data=st.data(), blame=st.booleans())
    def lose(self, data: st.DataObject, blame: bool) -> None:
        worker = data.draw(st.sampled_from(sorted(self.workers)))
        moved, given_up = self.scheduler.release(worker, blame=blame)
        assert {e.request.id for e in [*moved, *given_up]} == {id for id in self.has[worker] if id in self.waiting}
        for entry in given_up:
            assert entry.losses == MOST_LOSSES
            del self.waiting[entry.request.id]
        capacity = self.workers.pop(worker)
        self.has.pop(worker)
        self.numbers += 1
        self.paused.discard(worker)
        self.workers[f"later{self.numbers}"] = capacity
        self.has[f"later{self.numbers}"] = {}
        self.scheduler.serve({f"later{self.numbers}": capacity})

    @rule(data=st.data())
    def pause_or_serve(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(sorted(self.workers)))
        if worker in self.paused:
            self.paused.remove(worker)
            self.scheduler.serve({worker: self.workers[worker]})
        else:
            self.paused.add(worker)
            self.scheduler.pause([worker])

    @invariant()
    def books_agree(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check()
        served = {id for has in self.has.values() for id in has}
        assert len(self.scheduler) == len(set(self.waiting) | served)
        assert self.scheduler.busy(self.workers) == bool(served - self.moving)

    @property
    def moving(self) -> set[str]:
        return set()

    def teardown(self) -> None:
        """Everything ends."""
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.serve(self.workers)
        for _ in range(3 * len(self.waiting) + 3):
            for worker, given in self.scheduler.assign():
                assert isinstance(worker, str)
                self.has[worker][given.id] = given
            for worker, has in self.has.items():
                for id in list(has):
                    self.scheduler.count(worker, Output(id, (), True, "stop", assignment=has.pop(id).assignment))
        assert len(self.scheduler) == 0


class BooksOfRoles(Books):
    """The same where one rank computes prompts for two others: hand-overs begin, end well, fail, and lose either side."""

    @initialize()
    def begin(self) -> None:
        super().begin()
        self.scheduler = Scheduler()
        self.scheduler._ranks.costs.prompt_token_s = 1.0  # no prompt is short
        self.scheduler._ranks.costs.least_left_tokens = 1
        self.scheduler._ranks.costs.begins_early = lambda *_: True  # type: ignore[method-assign]
        roles = zip(self.workers.items(), ("prefill", "decode", "decode"), strict=True)
        self.workers = {worker: RankCapacity(200, 8, role=role) for (worker, _), role in roles}  # type: ignore[arg-type]
        self.scheduler.serve(self.workers)
        self.moves: list[Move] = []

    def check_idle(self) -> None:
        """Decode ranks are idle until the first hand-over."""

    @property
    def moving(self) -> set[str]:
        """Those that stand still."""
        live = [move.entry for move in self.moves if self.scheduler._moves.get(move.entry.request.id) is move]
        return {entry.request.id for entry in live if entry.began}

    @rule(prompt=st.integers(1, 30), new=st.integers(2, 8), end=st.sampled_from([None, True, False]))
    def compute_a_prompt(self, prompt: int, new: int, end: bool | None) -> None:
        """The rules that lead to a move, in a row: by chance alone they seldom come so."""
        self.add(prompt, new, 1, False, -1)
        self.assign()
        id = f"{self.numbers}.0"
        for has in self.has.values():
            if id in has:
                worker = self.scheduler._entries[id].worker
                assert self.scheduler.count(worker, Output(id, (100,), assignment=has[id].assignment)) is not None
                self.waiting[id] += (100,)
                has[id] = has[id].after((100,))
        self.after_outputs()
        if end is not None and self.moves:
            self.end_move(0, end)

    def after_outputs(self) -> None:
        for worker, has in self.has.items():
            for id in [id for id in has if id in self.waiting]:
                move = self.scheduler.begin_move(id)
                if move is not None:
                    assert self.workers[worker].role == "prefill" and len(self.waiting[id]) > 0
                    assert move.target not in self.paused and self.workers[str(move.target)].role == "decode"
                    self.moves.append(move)
                assert self.scheduler.begin_move(id) is None, "one at a time"

    @rule(data=st.data())
    def begin_early(self, data: st.DataObject) -> None:
        """A rank reports that a part of a prompt is computed; perhaps one that it lost meanwhile."""
        worker = data.draw(st.sampled_from(sorted(self.workers)))
        for id in sorted(self.waiting):
            entry = self.scheduler._entries[id]
            move = self.scheduler.begin_early_move(worker, PromptProgress(id, 1, 1, entry.assignment))
            if move is not None:
                assert id in self.has[worker] and not entry.began and self.workers[worker].role == "prefill"
                assert move.early and self.workers[str(move.target)].role == "decode"
                self.moves.append(move)

    @precondition(lambda self: self.moves)
    @rule(data=st.data(), done=st.booleans())
    def end_a_move(self, data: st.DataObject, done: bool) -> None:
        self.end_move(data.draw(st.integers(0, len(self.moves) - 1)), done)

    def end_move(self, number: int, done: bool) -> None:
        move = self.moves.pop(number)
        done = done and move.entry.began  # the source sends the first token before it reports the end
        id, source, target = move.entry.request.id, str(move.source), str(move.target)
        was_moving = self.scheduler._moves.get(id) is move
        outcome = self.scheduler.end_move(move, done=done)
        if id not in self.waiting or id not in self.has.get(source, {}) or not was_moving:
            assert outcome == "gone"
        elif done and target in self.workers:
            assert outcome == "moved"
            del self.has[source][id]
            self.has[target][id] = move.entry.rest()
            assert self.has[target][id].prompt == (*self.asked[id].prompt, *self.waiting[id])
        else:
            assert outcome == "stays"

    def teardown(self) -> None:
        while getattr(self, "moves", None):
            self.scheduler.end_move(self.moves.pop(), done=False)
        super().teardown()


class Sleepers(RuleBasedStateMachine):
    """Ranks that sleep when none has work, messages that take any time: a rank is never left waiting for sleeping ones."""

    @initialize(ranks=st.integers(1, 4))
    def begin(self, ranks: int) -> None:
        self.alarm = IdleTracker()
        self.alarm.begin(0)
        self.work = [0] * ranks
        """Steps that each rank's requests still need."""
        self.steps = [0] * ranks
        self.asleep = [False] * ranks
        self.through = [0] * ranks
        self.to_rank: list[deque[tuple[str, int]]] = [deque() for _ in range(ranks)]
        self.to_driver: list[deque[tuple[str, int]]] = [deque() for _ in range(ranks)]
        self.outstanding = 0

    def ring(self) -> None:
        step, sleepers = self.alarm.wake(self.outstanding > 0)
        for rank in sleepers:
            assert isinstance(rank, int)
            self.to_rank[rank].append(("wake", step))

    @rule(data=st.data(), steps=st.integers(1, 3))
    def submit(self, data: st.DataObject, steps: int) -> None:
        rank = data.draw(st.integers(0, len(self.work) - 1))
        self.outstanding += 1
        self.to_rank[rank].append(("submit", steps))
        self.ring()

    @property
    def everybody(self) -> range:
        return range(len(self.work))

    @rule(data=st.data())
    def rank_reads(self, data: st.DataObject) -> None:
        self.read(data.draw(st.sampled_from(self.everybody)))

    @rule(data=st.data())
    def driver_reads(self, data: st.DataObject) -> None:
        self.hear(data.draw(st.sampled_from(self.everybody)))

    def read(self, rank: int) -> bool:
        """A rank takes a message, if it has one. One request at a time is enough here."""
        if not self.to_rank[rank] or (self.to_rank[rank][0][0] == "submit" and self.work[rank]):
            return False
        kind, number = self.to_rank[rank].popleft()
        if kind == "wake":
            self.through[rank] = max(self.through[rank], number)
        else:
            self.work[rank] = number
        return True

    def hear(self, rank: int) -> bool:
        """The driver takes a message of a rank, if it has one."""
        if not self.to_driver[rank]:
            return False
        kind, number = self.to_driver[rank].popleft()
        if kind == "asleep":
            self.alarm.fell_asleep(rank, 0, number)
        else:
            self.outstanding -= 1
        self.ring()
        return True

    @rule()
    def step(self) -> None:
        self.make_step()

    def make_step(self) -> bool:
        """All ranks make a step, if all are at it."""
        ready = [not self.asleep[r] or self.work[r] > 0 or self.steps[r] < self.through[r] for r in range(len(self.work))]
        if not all(ready):
            return False
        work = any(self.work)
        for rank in range(len(self.work)):
            self.steps[rank] += 1
            if self.work[rank]:
                self.work[rank] -= 1
                if not self.work[rank]:
                    self.to_driver[rank].append(("done", 0))
            self.asleep[rank] = not work
            if not work:
                self.to_driver[rank].append(("asleep", self.steps[rank]))
        return True

    def teardown(self) -> None:
        """When all messages have come and all steps are made, everything is done, and all sleep after the same step."""
        if not hasattr(self, "alarm"):
            return
        for _ in range(1000):  # messages as late as can be: one at a time, when no step can be made
            if not (self.make_step() or any(map(self.hear, self.everybody)) or any(map(self.read, self.everybody))):
                break
        else:
            raise AssertionError("they never sleep")
        assert self.outstanding == 0
        assert all(self.asleep)
        assert not any(step < through for step, through in zip(self.steps, self.through, strict=True)), "one waits alone"
        assert len(set(self.steps)) == 1
        assert not any(self.work)
        assert not any(self.to_rank)


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestBooksOfRoles = BooksOfRoles.TestCase
TestBooksOfRoles.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
TestSleepers = Sleepers.TestCase
TestSleepers.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
