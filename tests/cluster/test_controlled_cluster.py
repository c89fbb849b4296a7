"""A cluster whose controller moves experts about, and is lost: every token is the model's own, and no request waits."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import numpy as np
import pytest

from cluster.api import Cluster
from cluster.controller.controller import Controller, FindForecast
from cluster.driver import controller_client
from cluster.errors import ClusterError
from cluster.messages.controller import Attach
from cluster.messages.placement import LoadReport, SetPlacement
from cluster.messages.rank import decode_events, encode
from cluster.rank.rank_loop import RankLoop
from cluster.rank.rank_reports import WindowCutter
from epslots.errors import ConfigError
from epslots.group.rank_group import group_of
from epslots.load_window import LoadWindow
from epslots.placement.placement import Placement, default_placement, pack
from epslots.placement.placement_file import write_placement
from epslots.placement.planner import Proposal, RankHardware
from epslots.runtime import runtime_of
from tests.support.controller_helpers import NO_REASONS
from tests.support.fake_backend import ControllerFault, FakeBackend
from tests.support.grouped_ranks import COPIES_TRAVEL
from tests.support.plan_strategies import random_placement
from tests.support.rank_helpers import PATIENCE_S
from tests.support.thread_cluster import PROMPTS, expected, serve_again, tokens_of, until

pytestmark = pytest.mark.usefixtures("one_load_at_a_time", "clock_loops")

Open = Callable[..., tuple[Cluster, FakeBackend]]
GREEDY: dict[str, Any] = {"stop_tokens": ()}


class Restless:
    """A planner that always wants something else, and copies of some experts of each layer."""

    def __init__(self) -> None:
        self._generator = np.random.default_rng(5)

    def __call__(self, current: Placement, expected: Any, hardware: RankHardware, quota_LR: Any) -> Proposal:
        assert expected.tokens_LE.sum() > 0
        found = random_placement(self._generator, current)
        while not found.wanted_LRE.any((1, 2)).all():
            found = random_placement(self._generator, current)
        return Proposal(found, False, 1, 1, int(found.wanted_LRE.sum()), 0.5, 0.6, NO_REASONS)


def restless(forecast: FindForecast) -> Controller:
    return Controller(lambda: 0.0, planner=Restless(), share=1.0, forecast=forecast)


@pytest.fixture
def folder(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("qwen3_moe_short")


@pytest.fixture
def open_cluster(folder: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Windows of two steps, fetches that cost next to nothing, and another controller is started at once."""
    monkeypatch.setattr(controller_client, "_BACKOFF_S", 0.001)
    before, opened = set(threading.enumerate()), []

    def make(ranks: int = 2, backend: FakeBackend | None = None, **settings: Any) -> tuple[Cluster, FakeBackend]:
        backend = backend or FakeBackend(make_controller=restless)
        usual = {"slots": 10, "kv_tokens": 512, "costs": COPIES_TRAVEL, "dtype": "float32", "window_steps": 2}
        settings = usual | {"silence_s": PATIENCE_S} | settings
        cluster = Cluster(folder, ranks=ranks, backend=backend, cache_dir=cache_dir, progress=False, **settings)
        opened.append(cluster)
        return cluster, backend

    yield make
    for cluster in opened:
        cluster.close()
    assert all(controller.dead for cluster in opened for controller in cluster._supervisor._backend.controllers)  # type: ignore[attr-defined]
    left = {thread for thread in threading.enumerate() if thread.name.startswith("epslots")} - before
    assert not left


@pytest.mark.parametrize("ranks", [1, 3])
def test_experts_move_while_tokens_flow(open_cluster: Open, folder: Path, ranks: int):
    cluster, backend = open_cluster(ranks)
    for some, new in ((PROMPTS, 40), (PROMPTS[:2], 40)):
        assert tokens_of(cluster.generate(some, max_new_tokens=new, **GREEDY)) == expected(folder, some, new)
    stats = cluster.stats()
    assert stats.controller is not None
    assert stats.controller.placement > 1
    assert stats.controller.placements_rejected == 0
    assert stats.controller.started == len(backend.controllers) == 1
    assert sum(layer.migrations for layer in stats.total.layers) > 0
    placement = cluster.placement()
    assert 1 < placement.placement_version <= stats.controller.placement
    assert placement.pending_migrations >= 0
    for layer in placement.layers:
        assert any(layer.wanted)
        assert all(not wanted or home in wanted for home, wanted in zip(layer.home, layer.wanted, strict=True))
    for worker in backend.workers.values():
        engine = worker.loop._engine
        assert engine is not None
        runtime_of(engine.model).check_integrity()


@pytest.mark.parametrize("fault", ["crash", "hang", "garbage", "bug"])
def test_requests_go_on_whatever_happens_to_the_controller(open_cluster: Open, folder: Path, fault: ControllerFault):
    cluster, backend = open_cluster(2)
    for order in (1, 3, 5):
        backend.controller_at(order, fault)
    assert tokens_of(cluster.generate(PROMPTS, max_new_tokens=60, **GREEDY)) == expected(folder, PROMPTS, 60)
    cluster.explain()
    stats = cluster.stats().controller
    assert stats is not None
    assert stats.started > 1
    versions = [order.published for order in backend.orders if isinstance(order, Attach)]
    assert versions == sorted(versions)


def test_a_controller_that_never_answers_keeps_nobody(open_cluster: Open, folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(controller_client, "ANSWER_S", PATIENCE_S)
    cluster, backend = open_cluster(2)
    backend.controller_at(1, "stall")
    assert tokens_of(cluster.generate(PROMPTS, max_new_tokens=60, **GREEDY)) == expected(folder, PROMPTS, 60)
    stats = cluster.stats().controller
    assert stats is not None
    assert stats.started == 1
    assert stats.windows_dropped > 0
    waiting = cluster._supervisor.controllers[0]
    assert waiting is not None
    assert len(waiting._waiting) <= 2


def test_no_controller_can_be_had(open_cluster: Open, folder: Path):
    backend = FakeBackend()
    backend.refuse_controllers = ["the node is on fire"] * 1_000_000
    cluster, _ = open_cluster(2, backend)
    with pytest.raises(ClusterError, match=r"there is no controller, .*: the node is on fire"):
        cluster.rebalance()
    assert tokens_of(cluster.generate(PROMPTS, max_new_tokens=12, **GREEDY)) == expected(folder, PROMPTS, 12)
    stats = cluster.stats().controller
    assert stats is not None
    assert (stats.state, stats.where, stats.started) == ("absent", "", 0)
    cluster.freeze()


@pytest.mark.parametrize("fault", ["crash", "freeze"])
def test_ranks_are_lost_in_the_middle_of_a_move(open_cluster: Open, folder: Path, fault: Any):
    cluster, backend = open_cluster(3)
    for bundle, operation in ((1, 60), (2, 45), (0, 70)):
        cluster.scale(3)
        before = cluster.placement().placement_version
        backend.at(bundle, operation, fault)
        assert tokens_of(cluster.generate(PROMPTS, max_new_tokens=30, **GREEDY)) == expected(folder, PROMPTS, 30)
        assert cluster.placement().placement_version >= before
    assert len(backend.faults_done) == 3
    assert cluster.stats().controller is not None
    assert len(backend.controllers) == 1  # it outlived them all


def test_ranks_come_and_go_while_experts_move(open_cluster: Open, folder: Path):
    cluster, backend = open_cluster(1)
    results = cluster.generate(PROMPTS, max_new_tokens=80, **GREEDY)
    first = next(results)
    for ranks in (3, 2, 4, 1):
        cluster.scale(ranks)
    found = sorted([first, *results], key=lambda result: result.index)
    assert [result.tokens for result in found] == expected(folder, PROMPTS, 80)
    met = [order for order in backend.orders if isinstance(order, Attach)]
    assert len(met) > 1
    assert [order.group.epoch for order in met] == sorted({order.group.epoch for order in met})


def test_it_can_be_asked(open_cluster: Open, folder: Path):
    cluster, _ = open_cluster(2, FakeBackend(), window_steps=1)  # the real planner
    assert "published: nothing yet" in str(cluster.explain())
    tokens_of(cluster.generate(PROMPTS, max_new_tokens=30, **GREEDY))
    found = cluster.explain()
    assert found.windows > 0
    assert found.refused == 0, found.refusals
    assert found.step_s > 0
    assert found.latest is not None
    asked = cluster.rebalance()
    assert asked.latest is not None
    assert asked.latest.asked
    cluster.freeze()
    assert cluster.explain().state == "frozen"
    frozen = cluster.explain().placement
    assert tokens_of(cluster.generate(PROMPTS, max_new_tokens=30, **GREEDY)) == expected(folder, PROMPTS, 30)
    assert cluster.explain().placement == frozen
    cluster.unfreeze()
    assert cluster.explain().state in ("watching", "moving")


def test_without_windows_there_is_no_controller(open_cluster: Open, folder: Path):
    cluster, backend = open_cluster(2, window_steps=0)
    assert tokens_of(cluster.generate(PROMPTS, max_new_tokens=12, **GREEDY)) == expected(folder, PROMPTS, 12)
    assert not backend.controllers
    assert cluster.stats().controller is None
    assert cluster.placement().placement_version == 0
    for ask in (cluster.explain, cluster.rebalance, cluster.freeze, cluster.unfreeze):
        with pytest.raises(ConfigError, match="window_steps=0, so there is no controller"):
            ask()


def test_a_placement_from_a_file(open_cluster: Open, folder: Path, tmp_path: Path):
    with_none, _ = open_cluster(2, window_steps=0)
    dealt = with_none.placement().layers
    quota_LR = np.array([layer.slots for layer in dealt])
    first = random_placement(np.random.default_rng(3), default_placement([len(layer.home) for layer in dealt], quota_LR))
    write_placement(first, tmp_path / "first.placement")
    cluster, _ = open_cluster(2, window_steps=0, placement=tmp_path / "first.placement")
    placement = cluster.placement()
    assert placement.placement_version == first.version == 1
    assert placement.pending_migrations == 0  # ranks filled their slots by it
    for layer, home_E, wanted_RE, quota_R in zip(
        placement.layers, first.home_LE, first.wanted_LRE, first.quota_LR, strict=True
    ):
        assert layer.home == tuple(home_E.tolist())
        assert layer.wanted == tuple(tuple(np.flatnonzero(wanted).tolist()) for wanted in wanted_RE.T)
        assert layer.slots == tuple(quota_R.tolist())
    assert tokens_of(cluster.generate(PROMPTS, max_new_tokens=12, **GREEDY)) == expected(folder, PROMPTS, 12)


def test_a_cluster_that_began_with_a_file_goes_on_from_there(open_cluster: Open, folder: Path, tmp_path: Path):
    cluster, _ = open_cluster(2)
    layers = cluster.placement().layers
    dealt = default_placement([len(layer.home) for layer in layers], np.array([layer.slots for layer in layers]))
    cluster.close()
    (tmp_path / "first.placement").write_bytes(
        pack(Placement(7, dealt.num_experts_L, dealt.home_LE, dealt.wanted_LRE, dealt.quota_LR))
    )
    cluster, backend = open_cluster(2, placement=tmp_path / "first.placement")
    assert cluster.explain().placement == 7
    assert tokens_of(cluster.generate(PROMPTS, max_new_tokens=30, **GREEDY)) == expected(folder, PROMPTS, 30)
    assert cluster.explain().placement > 7
    backend.at(1, 5, "crash")
    assert tokens_of(cluster.generate(PROMPTS, max_new_tokens=30, **GREEDY)) == expected(folder, PROMPTS, 30)
    assert cluster.placement().placement_version > 8


def lose_backend(cluster: Cluster, backend: FakeBackend, ranks: int) -> None:
    """End all ranks at once, and wait until others serve."""
    before = len(backend.reopened)
    backend.lose("the Ray has ended, says the test")
    until(cluster, lambda: len(backend.reopened) > before)
    serve_again(cluster, ranks)


def test_ranks_that_are_all_replaced_keep_the_placement(open_cluster: Open, folder: Path):
    cluster, backend = open_cluster(2)
    assert tokens_of(cluster.generate(PROMPTS, max_new_tokens=30, **GREEDY)) == expected(folder, PROMPTS, 30)
    cluster.freeze()
    newest = cluster.explain().placement
    assert newest > 1
    lose_backend(cluster, backend, 2)
    assert cluster.placement().placement_version == newest
    assert cluster.placement().pending_migrations == 0  # ranks filled their slots by it
    assert cluster.explain().placement == newest
    cluster.unfreeze()
    assert tokens_of(cluster.generate(PROMPTS, max_new_tokens=30, **GREEDY)) == expected(folder, PROMPTS, 30)
    assert cluster.explain().placement > newest


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_placement_that_no_longer_fits_is_dropped(open_cluster: Open, folder: Path, ranks: int, caplog: Any):
    """For other ranks, or for slots that there aren't any more: it is only a hint."""
    cluster, backend = open_cluster(ranks, window_steps=0)
    layers = cluster.placement().layers
    slots_LR = np.array([[min(slots + 1, len(layer.home)) for slots in layer.slots[:1] * 2] for layer in layers])
    cluster._supervisor.groups[0].placement = pack(default_placement([len(layer.home) for layer in layers], slots_LR))
    lose_backend(cluster, backend, ranks)
    assert cluster.placement().placement_version == 0
    assert tokens_of(cluster.generate(PROMPTS, max_new_tokens=9, **GREEDY)) == expected(folder, PROMPTS, 9)
    assert ("is lost" in caplog.text or "failed while" in caplog.text) == (ranks == 2)
    assert (cluster._supervisor.groups[0].placement is None) == (ranks == 2)  # it was tried, once


def test_placements_that_do_not_fit(open_cluster: Open, tmp_path: Path):
    file = tmp_path / "first.placement"
    with pytest.raises(ConfigError, match=r"first\.placement: No such file"):
        open_cluster(2, placement=file)
    file.write_bytes(b"none")
    with pytest.raises(ConfigError, match="this is no placement"):
        open_cluster(2, placement=file)
    write_placement(default_placement([8, 8], np.full((2, 3), 3)), file)
    with pytest.raises(ConfigError, match=r"is for 3 ranks, and ranks=2"):
        open_cluster(2, placement=file)
    write_placement(default_placement([5], np.full((1, 2), 3)), file)
    with pytest.raises(ClusterError, match=r"failed while forming: ConfigError: .*another model"):
        open_cluster(2, placement=file)


@pytest.mark.parametrize("steps", [-1, 1.5, True, "64"])
def test_windows_have_a_whole_number_of_steps(open_cluster: Open, steps: Any):
    with pytest.raises(ConfigError, match="window_steps="):
        open_cluster(1, window_steps=steps)


def test_what_a_rank_can_not_follow_ends_nothing(open_cluster: Open, folder: Path, caplog: pytest.LogCaptureFixture):
    class Foolish(Restless):
        """Its slots are more than there are."""

        def __call__(self, current: Placement, expected: Any, hardware: RankHardware, quota_LR: Any) -> Proposal:
            more = Placement(1, current.num_experts_L, current.home_LE, current.wanted_LRE, current.quota_LR + 1)
            return Proposal(more, False, 1, 1, 0, 0.5, 0.6, NO_REASONS)

    backend = FakeBackend(make_controller=lambda _: Controller(lambda: 0.0, planner=Foolish()))
    cluster, _ = open_cluster(2, backend)
    with caplog.at_level(logging.WARNING, logger="epslots.cluster"):
        assert tokens_of(cluster.generate(PROMPTS, max_new_tokens=40, **GREEDY)) == expected(folder, PROMPTS, 40)
    stats = cluster.stats().controller
    assert stats is not None
    assert stats.placements_rejected > 0
    assert "does not follow a placement: the placement gives rank 0" in caplog.text
    assert cluster.placement().placement_version == 0
    assert cluster.ranks == 2


def test_a_window_is_dropped_and_counted_while_another_waits(open_cluster: Open):
    cluster, backend = open_cluster(2, window_steps=0)
    engine = backend.workers[0].loop._engine
    assert engine is not None
    cutter = WindowCutter(engine.model, 2)
    cutter.begin()
    assert cutter.step(1, 0.5, waits=False) is None
    assert cutter.step(2, 0.25, waits=True) is None
    assert cutter.step(3, 1.0, waits=True) is None
    assert cutter.step(4, 1.0, waits=True) is None
    assert cutter.step(5, 0.5, waits=True) is None
    told = cutter.step(6, 0.25, waits=False)
    assert told is not None
    assert (told.epoch, told.number) == (cluster.stats().epoch, 3)
    window = msgspec.msgpack.decode(told.window, type=LoadWindow)
    assert window.seconds == 0.75
    assert window.dropped == 2
    assert cutter.step(7, 0.5, waits=False) is None
    tokens_of(cluster.generate(PROMPTS[:1], max_new_tokens=3, **GREEDY))
    cutter.begin()  # another group: what was counted before is no part of its first window
    told = cutter.step(2, 0.5, waits=False)
    assert told is not None
    window = msgspec.msgpack.decode(told.window, type=LoadWindow)
    assert window.seconds == 0.5
    assert window.steps == 0


def test_at_most_one_window_of_a_rank_waits():
    class Cutter:
        waited: ClassVar[list[bool]] = []

        def step(self, number: int, seconds: float, *, waits: bool) -> LoadReport | None:
            self.waited.append(waits)
            return None if waits else LoadReport(0, 0, number, b"")

    loop = RankLoop(lambda *_: None)  # type: ignore[arg-type,return-value]
    loop._windows = Cutter()  # type: ignore[assignment]
    for _ in range(3):
        loop._end_window(0.1)
    assert Cutter.waited == [False, True, True]
    assert len(decode_events(loop.events())) == 1
    loop._end_window(0.1)
    assert Cutter.waited[-1] is False


def test_a_placement_for_another_group_is_passed_over(open_cluster: Open):
    """One that is told of when the rank has left its group already."""
    cluster, backend = open_cluster(2, window_steps=0)
    group = cluster.stats().epoch
    wanted = random_placement(np.random.default_rng(1), followed(backend))
    for number in (group - 1, group + 1, group):
        for worker in backend.workers.values():
            place = SetPlacement(epoch=number, version=1, placement=pack(wanted), bytes_per_step=1000)
            cluster._thread.call(worker.command(encode(place)))
        tokens_of(cluster.generate(PROMPTS[:1], max_new_tokens=3, **GREEDY))
        assert cluster.placement().placement_version == (number == group)


def followed(backend: FakeBackend) -> Placement:
    engine = backend.workers[0].loop._engine
    assert engine is not None
    group = group_of(engine.model)
    assert group is not None
    return group.placement
