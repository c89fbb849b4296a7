"""Several groups in one cluster: each is a whole model, and goes on while another one breaks, comes or goes."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from cluster.api import Cluster
from cluster.driver.epochs import Epochs
from cluster.errors import ClusterError
from cluster.lasting.settings import differences
from cluster.messages.controller import Attach
from cluster.messages.rank import Contact, Contacts, Load, Wake, decode_command
from epslots.config import LoadConfig
from epslots.errors import ConfigError
from epslots.runtime import runtime_of
from tests.support.fake_backend import FakeBackend, FakeWorker
from tests.support.rank_helpers import PATIENCE_S
from tests.support.thread_cluster import PROMPTS, expected, serve_again, tokens_of, until

pytestmark = pytest.mark.usefixtures("one_load_at_a_time")

Open = Callable[..., tuple[Cluster, FakeBackend]]


def epochs(cluster: Cluster) -> list[int]:
    return [group.epoch for group in cluster._supervisor.groups]


def test_each_group_is_a_whole_model(open_cluster: Open, folder: Path):
    cluster, backend = open_cluster(ranks=4, groups=2, window_steps=4)
    assert tokens_of(cluster.generate(PROMPTS, max_new_tokens=12)) == expected(folder, PROMPTS, 12)
    stats = cluster.stats()
    assert [(rank.group, rank.rank) for rank in stats.ranks] == [(0, 0), (0, 1), (1, 2), (1, 3)]
    assert all(rank.engine.new_tokens for rank in stats.ranks), "both groups serve"
    assert sorted(epochs(cluster)) == [0, 1], "no two process groups have one number"
    assert cluster.ranks == 4
    until(cluster, lambda: sum(isinstance(order, Attach) for order in backend.orders) == 2)
    assert backend.controllers_started == 1, "one controller plans for both"
    assert [cluster.explain(group).epoch for group in (0, 1)] == epochs(cluster)
    assert [cluster.rebalance(group).epoch for group in (0, 1)] == epochs(cluster)
    assert len(cluster.placement(1).ranks) == 2
    with pytest.raises(ConfigError, match="group=2; allowed: 0 to 1"):
        cluster.explain(2)


@pytest.mark.parametrize("bundle", [0, 3])
def test_a_lost_rank_breaks_its_group_alone(bundle: int, open_cluster: Open, folder: Path):
    cluster, backend = open_cluster(ranks=4, groups=2)
    before = epochs(cluster)
    backend.at(bundle, operation=40, do="crash")
    assert tokens_of(cluster.generate(PROMPTS, max_new_tokens=24)) == expected(folder, PROMPTS, 24)
    assert backend.faults_done == [(bundle, "crash")]
    serve_again(cluster, 4)
    after, broken = epochs(cluster), bundle // 2
    assert after[1 - broken] == before[1 - broken], "the other group formed no new one"
    assert after[broken] > max(before)
    assert tokens_of(cluster.generate(PROMPTS, max_new_tokens=12)) == expected(folder, PROMPTS, 12)


def test_a_broken_group_keeps_no_request_waiting(open_cluster: Open, folder: Path):
    """As long as it can't form: the other one is asked, and is left alone."""
    cluster, backend = open_cluster(ranks=2, groups=2)
    groups, stays = cluster._supervisor.groups, backend.workers[0]
    backend.unreachable.add(1)

    async def lose() -> None:
        backend.workers[1].kill()

    cluster._thread.call(lose())
    until(cluster, lambda: not groups[1].formed)
    served = [cluster.submit(prompt, max_new_tokens=12).result(PATIENCE_S).tokens for prompt in PROMPTS[:2]]
    assert served == expected(folder, PROMPTS[:2], 12)
    assert not groups[1].formed
    backend.unreachable.clear()
    serve_again(cluster, 2)
    assert backend.workers[0] is stays


def test_an_idle_group_sleeps_while_another_serves(open_cluster: Open, monkeypatch: pytest.MonkeyPatch):
    cluster, _ = open_cluster(ranks=2, groups=2)
    until(cluster, lambda: all(group.router._idle._asleep for group in cluster._supervisor.groups))
    woken: set[int] = set()
    command = FakeWorker.command

    async def note(worker: FakeWorker, message: bytes) -> bytes:
        if isinstance(decode_command(message), Wake):
            woken.add(worker.bundle)
        return await command(worker, message)

    monkeypatch.setattr(FakeWorker, "command", note)
    cluster.submit(PROMPTS[0], max_new_tokens=60).result(PATIENCE_S)
    assert len(woken) == 1
    idle, busy = sorted(rank.steps for rank in cluster.stats().ranks)
    assert busy >= 60 and idle < 10, "it made some before it slept"


def test_a_contact_reaches_its_group_alone(open_cluster: Open, monkeypatch: pytest.MonkeyPatch):
    cluster, _ = open_cluster(ranks=4, groups=2)
    told: list[int] = []
    command = FakeWorker.command

    async def note(worker: FakeWorker, message: bytes) -> bytes:
        if isinstance(decode_command(message), Contacts):
            told.append(worker.bundle)
        return await command(worker, message)

    async def publish() -> None:
        (sender,) = [worker for worker in cluster._supervisor.workers if worker.bundle == 3]
        cluster._supervisor._take(sender, Contact(epochs(cluster)[1], "key", b"value"))
        for group in cluster._supervisor.groups:
            group._send_contacts()

    monkeypatch.setattr(FakeWorker, "command", note)
    cluster._thread.call(publish())
    cluster.stats()  # each rank is asked after that
    assert told == [2, 3]


def test_a_group_that_cant_form_is_started_anew(open_cluster: Open, folder: Path):
    """While the other one serves."""
    cluster, backend = open_cluster(ranks=4, groups=2)
    group = cluster._supervisor.groups[1]
    workers = dict(backend.workers)

    async def break_often() -> None:
        for number in range(5):
            group.break_up(f"says the test, {number}", in_step=True)
            group._broken_by = None

    cluster._thread.call(break_often())
    serve_again(cluster, 4)
    assert [backend.workers[bundle] is workers[bundle] for bundle in range(4)] == [True, True, False, False]
    assert tokens_of(cluster.generate(PROMPTS, max_new_tokens=12)) == expected(folder, PROMPTS, 12)


def test_a_start_with_a_group_that_cant_form_fails(open_cluster: Open):
    backend = FakeBackend()
    backend.unreachable.add(1)
    with pytest.raises(ClusterError, match="could not form a group, 5 times in a row"):
        open_cluster(ranks=2, groups=2, backend=backend)


def test_whole_groups_come_and_go(open_cluster: Open, folder: Path):
    cluster, backend = open_cluster(ranks=2, groups=2, window_steps=4)
    running = cluster.submit(PROMPTS[0], max_new_tokens=60)
    cluster.freeze()
    cluster.scale(groups=3)
    assert cluster.ranks == 3
    assert tokens_of(cluster.generate(PROMPTS, max_new_tokens=12)) == expected(folder, PROMPTS, 12)
    assert [client.frozen for client in cluster._supervisor.controllers] == [True] * 3
    cluster.scale(ranks=1)
    assert cluster.ranks == len(epochs(cluster)) == len(cluster._supervisor.controllers) == 1
    assert [cluster.explain().epoch] == epochs(cluster), "the last group's controller is gone"
    assert tokens_of(cluster.generate(PROMPTS, max_new_tokens=12)) == expected(folder, PROMPTS, 12)
    assert running.result().tokens == expected(folder, [PROMPTS[0]], 60)[0], "its rank was no longer needed, or stayed"
    cluster.scale(2)
    assert cluster.explain(1).state == "frozen"
    assert backend.bundles == 2


def test_groups_grow_while_requests_go_on(open_cluster: Open, folder: Path):
    """Each forms anew with its new rank; those that came last go first."""
    cluster, backend = open_cluster(ranks=2, groups=2, window_steps=4)
    running = [cluster.submit(prompt, max_new_tokens=60) for prompt in PROMPTS[:2]]
    cluster.scale(ranks=4, groups=2)
    assert backend.dealt == [0, 1, 0, 1]
    stats = cluster.stats()
    assert [(rank.group, rank.rank) for rank in stats.ranks] == [(0, 0), (0, 1), (1, 2), (1, 3)]
    assert [len(cluster.placement(group).ranks) for group in (0, 1)] == [2, 2]
    assert tokens_of(cluster.generate(PROMPTS, max_new_tokens=12)) == expected(folder, PROMPTS, 12)
    assert [one.result().tokens for one in running] == expected(folder, PROMPTS[:2], 60)
    cluster.scale(ranks=2, groups=1)
    assert (cluster.ranks, len(cluster.state().groups), backend.dealt) == (2, 1, [0, 0])
    assert tokens_of(cluster.generate(PROMPTS[:2], max_new_tokens=12)) == expected(folder, PROMPTS[:2], 12)


def test_groups_that_find_no_room_stay_as_they_are(open_cluster: Open, folder: Path):
    cluster, _ = open_cluster(ranks=2, groups=2, backend=FakeBackend(room=3))
    with pytest.raises(ClusterError, match="4 ranks need 4 bundles, and there are 3"):
        cluster.scale(ranks=4, groups=2)
    cluster.scale(groups=3)
    assert (cluster.ranks, [group.ranks for group in cluster.state().groups]) == (3, [1, 1, 1])
    assert tokens_of(cluster.generate(PROMPTS[:2], max_new_tokens=12)) == expected(folder, PROMPTS[:2], 12)


def test_slower_ranks_get_fewer_requests(open_cluster: Open):
    """As the controller has learned, until the group forms anew."""
    cluster, _ = open_cluster(ranks=2, window_steps=0)  # no controller tells others meanwhile
    group, scheduler = cluster._supervisor.groups[0], cluster._supervisor.router._scheduler

    async def speeds(*learned: int) -> list[float]:
        group.learn_speeds(learned)
        return [scheduler._ranks.of(worker).capacity(worker).speed for worker in group.members]

    assert cluster._thread.call(speeds(500, 1500)) == [0.5, 1.5]
    assert cluster._thread.call(speeds(1, 2, 3)) == [0.5, 1.5], "of another group"
    scheduler.check()


def test_groups_have_one_size(open_cluster: Open):
    with pytest.raises(ConfigError, match="groups=2 with ranks=3; allowed: a number that divides the ranks"):
        open_cluster(ranks=3, groups=2)
    with pytest.raises(ConfigError, match="groups=3 with ranks=1"):
        open_cluster(ranks=None, groups=3)
    cluster, _ = open_cluster(ranks=4, groups=2)
    for wrong, message in (
        ({"ranks": 3}, "ranks=3; allowed: multiples of 2"),
        ({"ranks": 2, "groups": 2}, "allowed: at least 2 ranks a group"),
        ({"groups": 0}, "groups=0"),
        ({}, "ranks or groups"),
    ):
        with pytest.raises(ConfigError, match=message):
            cluster.scale(**wrong)


def test_a_driver_with_other_groups_adopts_no_ranks():
    load = Load(path="x", config=LoadConfig(), neighbours=1, ranks=1, threads=0, window_steps=0, groups=2)
    wanted = Load(path="x", config=LoadConfig(), neighbours=1, ranks=1, threads=0, window_steps=0, groups=4)
    assert differences(load, wanted) == ["groups: 2, and 4 is wanted"]


def test_epochs_go_on_after_those_of_adopted_ranks():
    numbers = Epochs()
    assert numbers.next() == 0
    numbers.follow(7)
    numbers.follow(3)
    assert (numbers.next(), numbers.next()) == (8, 9)


def test_a_group_that_ends_before_it_is_asked_is_none(open_cluster: Open, monkeypatch: pytest.MonkeyPatch):
    """Groups come and go between a call and the supervisor's turn."""
    cluster, _ = open_cluster(ranks=2, groups=2, window_steps=4)
    call = cluster._thread.call
    for ask in (cluster.explain, cluster.placement):
        cluster.scale(groups=2)

        def scale_first(work: Coroutine[Any, Any, Any]) -> Any:
            monkeypatch.undo()
            cluster.scale(groups=1)
            return call(work)

        monkeypatch.setattr(cluster._thread, "call", scale_first)
        with pytest.raises(ConfigError, match="group=1; allowed: 0 to 0"):
            ask(1)


def test_one_group_is_joined_by_others(open_cluster: Open, folder: Path):
    """Of as many ranks; alone again, it may have any number."""
    cluster, backend = open_cluster(ranks=1, window_steps=4)
    running = cluster.submit(PROMPTS[0], max_new_tokens=60)
    cluster.scale(groups=2)
    assert (cluster.ranks, backend.dealt, len(epochs(cluster))) == (2, [0, 1], 2)
    assert tokens_of(cluster.generate(PROMPTS, max_new_tokens=12)) == expected(folder, PROMPTS, 12)
    assert all(rank.engine.new_tokens for rank in cluster.stats().ranks)
    cluster.scale(groups=1)
    cluster.scale(2)
    assert (cluster.ranks, backend.dealt, len(epochs(cluster))) == (2, [0, 0], 1)
    assert running.result().tokens == expected(folder, [PROMPTS[0]], 60)[0]


def test_all_ranks_of_a_node_have_one_store(open_cluster: Open, cache_dir: Path):
    """In any groups: the node's RAM is divided by all of its ranks."""
    _, backend = open_cluster(ranks=2, groups=2)
    loops = [worker.loop for worker in backend.workers.values()]
    orders = [loop._load_order for loop in loops]
    assert [(order.neighbours, order.ranks) for order in orders if order is not None] == [(2, 1), (2, 1)]
    assert len({runtime_of(loop._loaded_engine.model).store.where for loop in loops}) == 1
    assert len(list(cache_dir.glob("*.experts"))) == 1


def test_messages_to_the_controller_grow_with_groups_alone(open_cluster: Open):
    """And with steps; not with requests."""
    cluster, backend = open_cluster(ranks=2, groups=2, window_steps=4, max_requests=16)
    found = list[tuple[int, int]]()
    for requests in (2, 16):
        steps, orders = sum(rank.steps for rank in cluster.stats().ranks), len(backend.orders)
        assert len(list(cluster.generate([PROMPTS[0]] * requests, max_new_tokens=40))) == requests
        windows = (sum(rank.steps for rank in cluster.stats().ranks) - steps) // 4
        found.append((len(backend.orders) - orders, windows))
    for orders, windows in found:
        assert 0 < orders <= windows + 2 * len(epochs(cluster)), "one a window of a group, and its introduction"
    assert found[1][1] < 3 * found[0][1], "so many requests share the steps"
