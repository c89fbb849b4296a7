"""Groups with roles: prompts are computed in one, decoded in another. After any loss in between, tokens are the model's."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import cluster.rank.cache_exchange
import cluster.rank.rank_reports
from cluster.api import Cluster
from cluster.config import cluster_config
from cluster.driver import request_router
from cluster.driver.hand_over_costs import HandOverCosts
from cluster.driver.hand_overs import HandOvers
from cluster.driver.request_router import RequestRouter
from cluster.generation import Generation
from cluster.messages.hand_over import PromptProgress
from cluster.rank.cache_exchange import HandOverRefused
from cluster.rank.copy_budget import FIRST_BYTES_S
from cluster.rank.rank_loop import RankLoop
from epslots.errors import ConfigError
from epslots.generation.requests import Output
from epslots.transport.pair_connection import PairConnection
from tests.support.fake_backend import FakeBackend, WatchedConnection
from tests.support.handed_over import small_transfers
from tests.support.thread_cluster import PROMPTS, check_empty, expected, serve_again, tokens_of, until

pytestmark = pytest.mark.usefixtures("one_load_at_a_time", "small_pieces")

NEW = 14
SMALL_STEPS = {"max_batch_tokens": 10, "max_requests": 8}
LONG = [PROMPTS[1], PROMPTS[7]]
EVERY_MESSAGE = bool(os.environ.get("EPSLOTS_EVERY_MESSAGE"))
Open = Callable[..., tuple[Cluster, FakeBackend]]


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches of these small models travel in several pieces; and no prompt is short."""
    small_transfers(monkeypatch)
    monkeypatch.setattr(HandOverCosts, "stays", lambda *_: False)


@pytest.fixture
def opened(open_cluster: Open, early: bool) -> Iterator[tuple[Cluster, FakeBackend]]:
    """Rank 0 computes prompts, rank 1 decodes. In the end nothing is left over."""
    found = open_cluster(ranks=None, prefill_ranks=1, decode_ranks=1, **(SMALL_STEPS if early else {}))
    yield found
    check_empty(*found)


BOTH = pytest.mark.parametrize("early", [False, True], indirect=True, ids=["after the prompt", "during the prompt"])


@pytest.fixture
def early(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether hand-overs begin after a prompt's first step (``BOTH``). If so, a step waits until all before it was read."""
    if not getattr(request, "param", False):
        monkeypatch.setattr(HandOverCosts, "begins_early", lambda *_: False)
        return False
    judged: set[tuple[str, int]] = set()
    consider_early, step = HandOvers.consider_early, RankLoop._step

    def consider(self: HandOvers, worker: Any, prompt: PromptProgress) -> None:
        consider_early(self, worker, prompt)
        judged.add((prompt.id, prompt.computed))

    def paced(self: RankLoop) -> None:
        assert self._engine is not None
        prompts = self._engine.batcher.prompts() if self._reports_prompts else []
        queue, pause = self._commands, threading.Event()

        def goes_on() -> bool:
            read = queue._again or not self.hand_overs._contacts
            return bool(queue._commands) or (read and all((prompt.id, prompt.computed) in judged for prompt in prompts))

        while prompts and not goes_on():
            pause.wait(0.0005)
        step(self)

    monkeypatch.setattr(HandOvers, "consider_early", consider)
    monkeypatch.setattr(RankLoop, "_step", paced)
    monkeypatch.setattr(HandOverCosts, "begins_early", lambda *_: True)
    return True


def counts(opened: Cluster) -> tuple[int, int]:
    found = opened._supervisor.router.hand_overs.counts
    return found.done, found.failed


@BOTH
def test_prompts_and_decoding_run_apart(opened: tuple[Cluster, FakeBackend], folder: Path, early: bool):
    cluster, backend = opened
    assert [cluster._supervisor.groups[number].role for number in (0, 1)] == ["prefill", "decode"]
    assert tokens_of(cluster.generate(PROMPTS, max_new_tokens=NEW)) == expected(folder, PROMPTS, NEW)
    done, _ = counts(cluster)
    prefill, decode = (rank.engine for rank in cluster.stats().ranks)
    assert prefill.prompt_tokens + prefill.reused_tokens == sum(map(len, PROMPTS)), "every prompt was computed there"
    assert decode.prompt_tokens <= done, "no more than the last token of each that was handed over"
    assert decode.new_tokens > 5 * done > 0
    handed = cluster._supervisor.router.hand_overs.counts
    assert handed.nbytes > 0 and handed.seconds > 0
    assert bool(handed.early) == early
    budgets = [worker.loop.hand_overs.budget for worker in backend.workers.values()]
    assert all(budget._step_s > 0 and budget.bytes_s != FIRST_BYTES_S for budget in budgets), "what steps and copies take"


def test_drawn_and_constrained_texts_go_on(opened: tuple[Cluster, FakeBackend], open_cluster: Open):
    """Draws depend on seed and position, a stop string on the text: neither on the rank."""
    cluster, _ = opened
    alone, _ = open_cluster(ranks=1)
    for settings in ({"temperature": 1.3, "seed": 7, "presence_penalty": 0.5}, {"temperature": 0.9, "seed": 2, "logprobs": 2}):
        found, wanted = (
            [tuple(each.submit(prompt, max_new_tokens=NEW, **settings).result().tokens) for prompt in LONG]
            for each in (cluster, alone)
        )
        assert found == wanted
    assert counts(cluster)[0] > 0


def test_short_prompts_are_computed_where_they_decode(open_cluster: Open, folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(HandOverCosts, "stays", lambda _self, to_compute, *_: to_compute <= 25)
    cluster, backend = open_cluster(ranks=2, prefill_ranks=1, step_target_ms=1000)
    assert tokens_of(cluster.generate(PROMPTS, max_new_tokens=NEW)) == expected(folder, PROMPTS, NEW)
    assert {worker.loop.hand_overs.budget.target_s for worker in backend.workers.values()} == {1.0}
    prefill = cluster.stats().ranks[0].engine
    assert prefill.prompt_tokens + prefill.reused_tokens == sum(len(prompt) for prompt in PROMPTS if len(prompt) > 25)
    check_empty(cluster, backend)


class Trouble:
    """Does something to the hand-over under way before the message with a number, at one of its ends."""

    def __init__(self, backend: FakeBackend, number: int, *, source: bool, do: Callable[[WatchedConnection], None]) -> None:
        self.done = False
        self._number, self._source, self._do = number, source, do
        backend.on_connection = self._take

    def _take(self, connection: WatchedConnection) -> None:
        if not self.done and connection.source == self._source and connection.messages == self._number:
            self.done = True
            self._do(connection)


def meets(cluster: Cluster, trouble: Trouble, serve: Callable[[], object]) -> bool:
    """Serve until a hand-over meets the trouble, or ends well. On a busy machine the request may end before either."""
    before, tries = counts(cluster)[0], 0
    while not trouble.done and counts(cluster)[0] == before:
        tries += 1
        assert tries < 100, "no hand-over ended"
        serve()
    return trouble.done


@BOTH
@pytest.mark.parametrize("source", [True, False])
def test_a_cut_connection_costs_nothing(opened: tuple[Cluster, FakeBackend], folder: Path, source: bool):
    """At any message: the request goes on where it was, and moves later."""
    cluster, backend = opened

    def serve() -> None:
        assert tokens_of(cluster.generate(LONG[:1], max_new_tokens=40)) == expected(folder, LONG[:1], 40)

    for number in range(1, 40):
        before = counts(cluster)
        if not meets(cluster, Trouble(backend, number, source=source, do=lambda connection: connection.inner.abort()), serve):
            break
        assert counts(cluster)[1] > before[1]
    assert number > 6, "an offer, an answer, several pieces, and an end"
    assert counts(cluster)[0] > 0, "they moved in the end"


@BOTH
@pytest.mark.parametrize("source", [True, False])
def test_a_cancelled_reader_leaves_nothing(opened: tuple[Cluster, FakeBackend], folder: Path, source: bool):
    cluster, backend = opened
    running, reasons = list[Generation](), list[str]()

    def leave(_: WatchedConnection) -> None:
        running[-1].cancel()
        cluster._thread.flush()  # the ranks are told

    for number in range(1, 40):
        trouble = Trouble(backend, number, source=source, do=leave)

        def serve(trouble: Trouble = trouble) -> None:
            running.append(cluster.submit(LONG[0], max_new_tokens=40))
            reasons.append(running[-1].result().reason)
            assert reasons[-1] == "length" or trouble.done

        if not meets(cluster, trouble, serve):
            break
    assert number > 6
    assert "cancelled" in reasons, "some readers left in time"
    assert tokens_of(cluster.generate(LONG, max_new_tokens=NEW)) == expected(folder, LONG, NEW)


@BOTH
@pytest.mark.parametrize("source", [True, False])
def test_a_lost_rank_costs_no_token(open_cluster: Open, folder: Path, source: bool, early: bool):
    """Before each message, if asked for: every time a rank has to load the model anew."""
    cluster, backend = open_cluster(ranks=2, prefill_ranks=1, **(SMALL_STEPS if early else {}))

    def serve(new: int = 40) -> None:
        assert tokens_of(cluster.generate(LONG[:1], max_new_tokens=new)) == expected(folder, LONG[:1], new)

    met = False
    some = (4,) if early else (1, 4)
    for number in range(1, 60) if EVERY_MESSAGE else some:
        trouble = Trouble(backend, number, source=source, do=lambda connection: connection.worker._die(known=True))
        met = meets(cluster, trouble, serve)
        backend.on_connection = lambda _: None
        if not met:
            break
        serve_again(cluster, 2)
        if EVERY_MESSAGE:  # a rank that dies often, and never serves, is given up
            serve(NEW)
    assert met != EVERY_MESSAGE
    assert number > 6 or not EVERY_MESSAGE
    check_empty(cluster, backend)


@pytest.mark.parametrize("soon_s", [1e6, 0.0])
def test_prompts_wait_a_while_for_their_group(
    open_cluster: Open, folder: Path, monkeypatch: pytest.MonkeyPatch, soon_s: float
):
    """While it forms anew, but not for longer: then they are computed where they decode."""
    monkeypatch.setattr(request_router, "SOON_S", soon_s)
    cluster, backend = open_cluster(ranks=2, prefill_ranks=1)
    group, router = cluster._supervisor.groups[0], cluster._supervisor.router
    backend.unreachable.add(0)

    async def break_up() -> None:
        group.break_up("says the test")

    cluster._thread.call(break_up())
    running = [cluster.submit(prompt, max_new_tokens=NEW) for prompt in LONG]
    if soon_s:
        until(cluster, lambda: len(router._scheduler) == len(LONG) and not router._assignment_due)
        assert router.queued == len(LONG)
        backend.unreachable.clear()
    assert [each.result().tokens for each in running] == expected(folder, LONG, NEW)
    backend.unreachable.clear()
    serve_again(cluster, 2)
    prefill, decode = (rank.engine for rank in cluster.stats().ranks)
    computed = prefill if soon_s else decode
    assert computed.prompt_tokens + computed.reused_tokens >= sum(map(len, LONG))
    check_empty(cluster, backend)


def test_a_target_lost_after_the_end_gives_back(opened: tuple[Cluster, FakeBackend], folder: Path):
    """It had the cache, and the driver hears so, but it is gone: the source goes on."""
    cluster, backend = opened

    def die_soon(connection: WatchedConnection) -> None:
        receive = connection.inner.receive

        def received() -> bytes:
            found = receive()
            if connection.messages >= 3 and connection.messages > pieces[0]:
                backend.workers[1]._die(known=True)
                until(cluster, lambda: len(cluster._supervisor.groups[1].members) == 0)
            return found

        connection.inner.receive = received

    pieces = [3]
    Trouble(backend, 1, source=True, do=die_soon)
    assert tokens_of(cluster.generate(LONG[:1], max_new_tokens=40)) == expected(folder, LONG[:1], 40)
    serve_again(cluster, 2)


def test_news_of_an_earlier_assignment_is_refused(
    opened: tuple[Cluster, FakeBackend], folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """A request comes back to its source when the target is lost, and so does, late, news from before the hand-over."""
    cluster, backend = opened
    take, early, again = RequestRouter.take, list[Output](), list[Output]()

    def take_late(self: RequestRouter, worker: Any, outputs: Sequence[Output]) -> None:
        if worker.bundle == 1:
            backend.workers[1]._die(known=True)
        elif early and any(output.assignment > early[0].assignment for output in outputs):
            late = [*early, replace(early[0], tokens=(), finished=True, reason="error", error="says the test")]
            again.extend(late)
            take(self, worker, late)
        else:
            early.extend(outputs)
        take(self, worker, outputs)

    monkeypatch.setattr(RequestRouter, "take", take_late)
    for _ in range(20):
        assert tokens_of(cluster.generate(LONG[:1], max_new_tokens=40)) == expected(folder, LONG[:1], 40)
        if again:  # else it ended before it moved, as it may on a busy machine
            break
        serve_again(cluster, 2)
        early.clear()
    assert again, "it came back"
    monkeypatch.undo()
    serve_again(cluster, 2)


def test_a_full_decode_rank_takes_none(open_cluster: Open, folder: Path):
    """Requests go on where their prompts were computed, until there is room."""
    cluster, backend = open_cluster(ranks=2, prefill_ranks=1, kv_tokens=80)
    assert tokens_of(cluster.generate(PROMPTS, max_new_tokens=30)) == expected(folder, PROMPTS, 30)
    check_empty(cluster, backend)


def test_ranks_of_each_role_make_room_in_slots(open_cluster: Open, folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Prompts and hand-overs alike get cells in slots that experts cede; requests may be as long as all of these."""
    sizes = {"slots": 8, "kv_tokens": "auto", "max_batch_tokens": 16, "max_requests": 8}
    opened, backend = open_cluster(ranks=4, prefill_ranks=2, **sizes)
    refuse, refusals = cluster.rank.cache_exchange._refused, list[str]()

    def refused(connection: PairConnection, why: str) -> HandOverRefused:
        refusals.append(why)
        return refuse(connection, why)

    monkeypatch.setattr(cluster.rank.cache_exchange, "_refused", refused)
    long = [[token for prompt in PROMPTS[:6] for token in prompt]]
    for _ in range(20):
        assert tokens_of(opened.generate(long, max_new_tokens=30)) == expected(folder, long, 30)
        if counts(opened)[0]:  # else it ended before, as it may on a busy machine
            break
    assert not refusals, "room was awaited"
    batchers = [backend.workers[bundle].loop._loaded_engine.batcher for bundle in range(4)]
    ceded = [batcher.stats().ceded_slots > 0 for batcher in batchers]
    assert any(ceded[:2]) and any(ceded[2:]), "also a rank that slept, as did its whole group"
    assert tokens_of(opened.generate(PROMPTS, max_new_tokens=30)) == expected(folder, PROMPTS, 30)
    engine = opened.stats().engine
    assert engine.ceded_slots > 0 and engine.kv_most_tokens > engine.kv_tokens > 2 * 100
    check_empty(opened, backend)


def test_ranks_of_two_machines_meet_by_gloo(open_cluster: Open, folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cluster.rank.rank_reports, "machine_of_this", lambda: "")
    opened, backend = open_cluster(ranks=2, prefill_ranks=1)
    for _ in range(20):
        assert tokens_of(opened.generate(LONG, max_new_tokens=40)) == expected(folder, LONG, 40)
        if counts(opened)[0]:  # else the requests ended while their ranks met, as they may on a busy machine
            break
    assert counts(opened)[0] > 0
    check_empty(opened, backend)


def test_bytes_that_changed_are_refused(opened: tuple[Cluster, FakeBackend], folder: Path):
    cluster, backend = opened

    def spoil(connection: WatchedConnection) -> None:
        send_piece = connection.inner.send_piece

        def spoiled(data: Any) -> None:
            data[0] ^= 1
            send_piece(data)

        connection.inner.send_piece = spoiled

    Trouble(backend, 1, source=True, do=spoil)
    assert tokens_of(cluster.generate(LONG[:1], max_new_tokens=40)) == expected(folder, LONG[:1], 40)
    assert counts(cluster)[1] > 0


def test_roles_are_settings_of_a_cluster(open_cluster: Open):
    config = cluster_config(prefill_ranks=2, decode_ranks=6)
    assert (config.ranks, config.groups) == (8, 4), "groups of two: the largest that both can have"
    assert cluster_config(ranks=8, prefill_ranks=4).groups == 2
    assert cluster_config(ranks=8, prefill_ranks=2, groups=8).groups == 8
    for wrong, message in (
        ({"decode_ranks": 2}, "decode_ranks=2; allowed with prefill_ranks"),
        ({"ranks": 2, "prefill_ranks": 2}, "at least one of each"),
        ({"ranks": 8, "prefill_ranks": 2, "decode_ranks": 5}, "together as many as ranks"),
        ({"ranks": 8, "prefill_ranks": 3, "groups": 4}, "multiples of 2, the size of a group"),
        ({"prefill_ranks": -1}, "prefill_ranks=-1"),
    ):
        with pytest.raises(ConfigError, match=message):
            cluster_config(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="at least one of each"):
        open_cluster(ranks=None, prefill_ranks=1)
