"""Ranks outlive their driver: the next one adopts them as they are, in the middle of anything. The ranks are threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import cluster.rank.rank_loop
from cluster.api import Cluster, _check_model, _tokenizer_of
from cluster.driver.hand_over_costs import HandOverCosts
from cluster.errors import ClusterError, RequestFailed, Superseded
from cluster.lasting.settings import differences, origin_of
from cluster.messages.rank import Adopted, Form, GiveUp, Load, Loaded, Origin, decode_events, encode
from cluster.rank.rank_loop import RankLoop
from epslots.config import LoadConfig, load_config
from epslots.errors import ConfigError
from tests.support.fake_backend import WatchedConnection
from tests.support.grouped_ranks import TOKENS_TRAVEL
from tests.support.handed_over import small_transfers
from tests.support.lasting_backend import LastingBackend, abandon
from tests.support.rank_helpers import PATIENCE_S
from tests.support.thread_cluster import PROMPTS, check_empty, expected, serve_again, tokens_of, until

pytestmark = pytest.mark.usefixtures("one_load_at_a_time", "clock_loops")

GREEDY: dict[str, Any] = {"stop_tokens": ()}
Drive = Callable[..., tuple[Cluster, LastingBackend]]


@pytest.fixture
def drive(folder: Path, cache_dir: Path) -> Iterator[Drive]:
    """Opens a cluster; with the backend of another driver, one that adopts its ranks."""
    opened: list[tuple[Cluster, LastingBackend]] = []

    def make(before: LastingBackend | None = None, ranks: int = 2, **settings: Any) -> tuple[Cluster, LastingBackend]:
        backend = LastingBackend(before)
        settings = {"slots": 3, "kv_tokens": 512, "costs": TOKENS_TRAVEL, "silence_s": PATIENCE_S, "orphan_s": 60} | settings
        cluster = Cluster(folder, ranks=ranks, backend=backend, cache_dir=cache_dir, progress=False, name="x", **settings)
        opened.append((cluster, backend))
        return cluster, backend

    yield make
    for each, _ in opened:
        each.close()
    for worker in opened[-1][1]._all if opened else ():
        worker.kill()
        worker.loop._thread.join(PATIENCE_S)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the threads that loaded a model, one a load."""
    found: list[str] = []
    load = cluster.rank.rank_loop.load_alone

    def counted(*arguments: Any, **settings: Any) -> Any:
        found.append(threading.current_thread().name)
        return load(*arguments, **settings)

    monkeypatch.setattr(cluster.rank.rank_loop, "load_alone", counted)
    return found


def test_the_next_driver_serves_and_loads_nothing(
    drive: Drive, folder: Path, loads: list[str], monkeypatch: pytest.MonkeyPatch
):
    """And doesn't check again whether the model can be served: that takes longer than the rest."""
    checks = list[Path]()
    monkeypatch.setattr(cluster.api, "_check_model", checks.append)
    first, backend = drive(window_steps=4)
    assert tokens_of(first.generate(PROMPTS, max_new_tokens=20, **GREEDY)) == expected(folder, PROMPTS, 20)
    first.rebalance()
    running = [first.submit(prompt, max_new_tokens=200, **GREEDY) for prompt in PROMPTS]
    for generation in running:
        next(generation._portions())
    epoch, version = first.state().epoch, first.placement().placement_version
    abandon(first)
    second, _ = drive(backend, window_steps=4)
    assert "ranks adopted" in second.timeline
    assert second.state().epoch > epoch
    assert second.placement().placement_version >= version  # and a new controller goes on from it
    assert second.stats().engine.running == second.stats().engine.waiting == 0  # of requests without a reader
    assert tokens_of(second.generate(PROMPTS, max_new_tokens=40, **GREEDY)) == expected(folder, PROMPTS, 40)
    assert second.explain().placement >= version
    assert len(loads) == 2
    assert checks == [folder]


def test_drivers_follow_each_other(drive: Drive, folder: Path, loads: list[str], monkeypatch: pytest.MonkeyPatch):
    """Requests' numbers begin anew with each, while the last one's run; slots are filled once."""
    fresh: list[bool] = []
    join = RankLoop._join

    def noted(loop: RankLoop, form: Form, transport: Any) -> None:
        fresh.append(form.fresh)
        join(loop, form, transport)

    monkeypatch.setattr(RankLoop, "_join", noted)
    driver, backend = drive()
    for _ in range(3):
        running = [driver.submit(prompt, max_new_tokens=100, **GREEDY) for prompt in PROMPTS[:3]]
        next(running[0]._portions())
        abandon(driver)
        driver, backend = drive(backend)
        assert tokens_of(driver.generate(PROMPTS, max_new_tokens=15, **GREEDY)) == expected(folder, PROMPTS, 15)
    assert fresh == [True] * 2 + [False] * 6
    assert len(loads) == 2


def test_detached_ranks_are_adopted_and_their_requests_fail(drive: Drive, folder: Path, loads: list[str]):
    first, backend = drive()
    going = first.submit(PROMPTS[0], max_new_tokens=300, **GREEDY)
    next(going._portions())
    first.detach()
    with pytest.raises(ClusterError, match="left to the next driver; send the request again"):
        going.result()
    first.close()  # it has ended already
    assert not any(worker.dead for worker in backend.workers.values())
    second, _ = drive(backend)
    assert tokens_of(second.generate(PROMPTS, max_new_tokens=5, **GREEDY)) == expected(folder, PROMPTS, 5)
    assert len(loads) == 2


def test_detach_needs_a_name(open_cluster: Any):
    cluster, _ = open_cluster(1)
    with pytest.raises(ConfigError, match=r"detach\(\) needs a cluster with a name and orphan_s > 0"):
        cluster.detach()
    assert cluster.ranks == 1


def test_closed_ranks_have_ended(drive: Drive):
    first, backend = drive()
    first.close()
    assert all(worker.dead for worker in backend.workers.values())


def test_a_rank_that_died_as_an_orphan_is_replaced(drive: Drive, folder: Path, loads: list[str]):
    """The others serve before it has loaded."""
    first, backend = drive(ranks=3)
    abandon(first)
    backend.workers[1].kill()
    second, adopting = drive(backend, ranks=3)
    assert tokens_of(second.generate(PROMPTS, max_new_tokens=10, **GREEDY)) == expected(folder, PROMPTS, 10)
    serve_again(second, 3)
    assert len(loads) == 4
    assert {bundle for bundle, worker in adopting.workers.items() if worker is not backend.workers[bundle]} == {1}
    assert tokens_of(second.generate(PROMPTS, max_new_tokens=10, **GREEDY)) == expected(folder, PROMPTS, 10)


def test_an_adopted_rank_that_dies_is_replaced(drive: Drive, folder: Path):
    first, backend = drive()
    abandon(first)
    second, adopting = drive(backend)
    adopting.at(1, 5, "crash")
    assert tokens_of(second.generate(PROMPTS, max_new_tokens=25, **GREEDY)) == expected(folder, PROMPTS, 25)
    serve_again(second, 2)


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_next_driver_may_want_more_or_fewer_ranks(drive: Drive, folder: Path, loads: list[str], ranks: int):
    first, backend = drive()
    abandon(first)
    second, _ = drive(backend, ranks=ranks)
    serve_again(second, ranks)
    assert tokens_of(second.generate(PROMPTS, max_new_tokens=10, **GREEDY)) == expected(folder, PROMPTS, 10)
    assert len(loads) == max(2, ranks)


@pytest.fixture
def held_loads(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, threading.Event]]:
    """Loading begins (first event), and goes on when the second is set."""
    begun, may_go_on = threading.Event(), threading.Event()
    load = cluster.rank.rank_loop.load_alone

    def held(*arguments: Any, **settings: Any) -> Any:
        begun.set()
        assert may_go_on.wait(PATIENCE_S)
        return load(*arguments, **settings)

    monkeypatch.setattr(cluster.rank.rank_loop, "load_alone", held)
    yield begun, may_go_on
    may_go_on.set()


def start_in_thread(drive: Drive, *arguments: Any, **settings: Any) -> threading.Thread:
    """Begin to open a cluster, which its driver's end keeps from ever serving."""

    def start() -> None:
        with pytest.raises(ClusterError):
            drive(*arguments, **settings)

    starting = threading.Thread(target=start, daemon=True)
    starting.start()
    return starting


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> list[LastingBackend]:
    """All that were made."""
    made: list[LastingBackend] = []
    init = LastingBackend.__init__

    def noted(backend: LastingBackend, *arguments: Any) -> None:
        init(backend, *arguments)
        made.append(backend)

    monkeypatch.setattr(LastingBackend, "__init__", noted)
    return made


def kill_driver(monkeypatch: pytest.MonkeyPatch, clusters: list[Cluster]) -> None:
    monkeypatch.setattr(Cluster, "close", lambda cluster: None)  # a killed process closes nothing
    abandon(clusters[0])


@pytest.fixture
def clusters(monkeypatch: pytest.MonkeyPatch) -> list[Cluster]:
    """All whose constructor has begun, and has its supervisor."""
    made: list[Cluster] = []
    init = cluster.api.ClusterControl.__init__

    def noted(made_now: Cluster, *arguments: Any) -> None:
        init(made_now, *arguments)
        made.append(made_now)

    monkeypatch.setattr(cluster.api.ClusterControl, "__init__", noted)
    return made


def test_a_driver_may_be_killed_while_ranks_load(
    drive: Drive,
    folder: Path,
    loads: list[str],
    held_loads: tuple[threading.Event, threading.Event],
    backends: list[LastingBackend],
    clusters: list[Cluster],
    monkeypatch: pytest.MonkeyPatch,
):
    """They go on loading, and are adopted then: nothing is loaded twice."""
    begun, may_go_on = held_loads
    with monkeypatch.context() as patch:
        starting = start_in_thread(drive)
        assert begun.wait(PATIENCE_S)
        until(clusters[0], lambda: len(backends[0].workers) == 2)
        until(clusters[0], lambda: all(worker.loop._load_order for worker in backends[0].workers.values()))
        kill_driver(patch, clusters)
        starting.join(PATIENCE_S)
    may_go_on.set()
    second, _ = drive(backends[0])
    assert tokens_of(second.generate(PROMPTS, max_new_tokens=10, **GREEDY)) == expected(folder, PROMPTS, 10)
    assert len(loads) == 2


def test_a_driver_may_be_killed_while_a_group_forms(
    drive: Drive,
    folder: Path,
    loads: list[str],
    backends: list[LastingBackend],
    clusters: list[Cluster],
    monkeypatch: pytest.MonkeyPatch,
):
    """The ranks have a model, and no group yet."""
    forming, may_go_on = threading.Event(), threading.Event()
    form = RankLoop._form

    def held(loop: RankLoop, *arguments: Any) -> None:
        if not may_go_on.is_set():
            forming.set()
            assert may_go_on.wait(PATIENCE_S)
        form(loop, *arguments)

    monkeypatch.setattr(RankLoop, "_form", held)
    with monkeypatch.context() as patch:
        starting = start_in_thread(drive)
        assert forming.wait(PATIENCE_S)
        kill_driver(patch, clusters)
        starting.join(PATIENCE_S)
    may_go_on.set()
    second, _ = drive(backends[0])
    assert tokens_of(second.generate(PROMPTS, max_new_tokens=10, **GREEDY)) == expected(folder, PROMPTS, 10)
    assert len(loads) == 2


def test_a_driver_may_be_killed_while_it_scales(drive: Drive, folder: Path, loads: list[str]):
    """The new rank is there, and the group without it is the last that stood."""
    first, backend = drive()

    def scale() -> None:
        with pytest.raises(ClusterError):
            first.scale(3)

    scaling = threading.Thread(target=scale, daemon=True)
    scaling.start()
    until(first, lambda: 2 in backend.workers and backend.workers[2].loop._load_order is not None)
    abandon(first)
    scaling.join(PATIENCE_S)
    second, _ = drive(backend, ranks=3)
    serve_again(second, 3)
    assert tokens_of(second.generate(PROMPTS, max_new_tokens=10, **GREEDY)) == expected(folder, PROMPTS, 10)
    assert len(loads) == 3


def test_a_driver_that_was_superseded_ends_and_disturbs_nothing(drive: Drive, folder: Path, loads: list[str]):
    """It was paused, and goes on after another has adopted its ranks: its requests fail, and its close ends no rank."""
    first, backend = drive()
    first.detach()
    second, adopting = drive(backend)
    going = second.submit(PROMPTS[0], max_new_tokens=100, **GREEDY)
    next(going._portions())
    third, _ = drive(adopting)
    with pytest.raises(Superseded, match="another driver has adopted"):
        going.result(PATIENCE_S)
    with pytest.raises(Superseded):
        second.submit(PROMPTS[0])
    assert second.state().failure is not None
    second.close()
    assert tokens_of(third.generate(PROMPTS, max_new_tokens=10, **GREEDY)) == expected(folder, PROMPTS, 10)
    assert len(loads) == 2 and not issubclass(Superseded, RequestFailed)


# One rank.


def test_a_rank_without_a_model_gives_up_nothing():
    loop = RankLoop(lambda *_: None)  # type: ignore[arg-type,return-value]
    loop.start()
    assert loop.command(encode(GiveUp())) == b""
    assert loop.describe().running and not loop.describe().loaded and loop.describe().load is None


def test_the_last_drivers_wait_for_events_ends_with_its_term():
    loop = RankLoop(lambda *_: None)  # type: ignore[arg-type,return-value]
    found: list[bytes | None] = []
    waiting = threading.Thread(target=lambda: found.append(loop.events(1)))
    loop.begin_term(1)
    waiting.start()
    loop.begin_term(2)
    waiting.join(PATIENCE_S)
    assert found == [None]
    assert loop.events(1) is None
    loaded = Loaded(limits=None, max_requests=1, shares_prefixes=True, seconds={})  # type: ignore[arg-type]
    loop._send(Adopted(loaded, 3, grouped=True))
    batch = loop.events(2)
    assert batch is not None and msgspec.msgpack.decode(batch)[0]["epoch"] == 3
    with pytest.raises(msgspec.ValidationError):
        decode_events(batch)  # no limits: the driver doesn't believe such an event


# Settings.


def order(folder: Path, **changes: Any) -> Load:
    config = load_config(**changes.pop("model", {"slots": 4}))
    origin = changes.pop("origin", Origin("c", "1", 1000))
    return Load(path=str(folder), config=config, neighbours=1, ranks=1, threads=0, window_steps=64, origin=origin, **changes)


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({}, []),
        ({"model": {"slots": "4"}}, []),
        ({"model": {"slots": 8}}, ["slots: 4, and 8 is wanted"]),
        ({"model": {"slots": 4, "dtype": "float32"}}, ["dtype: auto, and float32 is wanted"]),
        (
            {"origin": Origin("d", "1", 1000)},
            ["the checkpoint's files were changed (c, and d is wanted)"],
        ),
        ({"origin": Origin("c", "2", 1000)}, ["epslots is another version (1, and 2 is wanted)"]),
        ({"origin": Origin("c", "1", 1)}, ["another user started them (1000, and 1 is wanted)"]),
    ],
)
def test_differing_settings_are_named(tmp_path: Path, wanted: dict[str, Any], said: list[str]):
    assert differences(order(tmp_path), order(tmp_path, **wanted)) == said


@pytest.mark.parametrize("name", LoadConfig.__struct_fields__)
def test_every_setting_of_a_model_is_compared(tmp_path: Path, name: str):
    ours = order(tmp_path)
    msgspec.structs.force_setattr(ours.config, name, "another")
    (found,) = differences(order(tmp_path), ours)
    assert found.startswith(f"{name}: ") and found.endswith(" another is wanted")


def test_a_checkpoint_that_was_changed_is_another(checkpoint: Callable[[str], Path], tmp_path: Path):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in checkpoint("qwen3_moe").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    before = origin_of(folder)
    assert origin_of(folder) == before
    config = folder / "config.json"
    config.write_text(config.read_text() + "\n")
    assert origin_of(folder).content != before.content


def test_transformers_is_imported_by_one_thread_at_a_time(monkeypatch: pytest.MonkeyPatch):
    """A model is checked beside the tokenizer's import: one of the two could find half of a module of transformers."""
    inside, both = list[int](), threading.Event()

    def look(*_: object) -> None:
        inside.append(1)
        if len(inside) == 2:
            both.set()
        both.wait(0.2)
        inside.pop()

    monkeypatch.setattr("cluster.api.load_tokenizer", look)
    monkeypatch.setattr("epslots.models.pretrained.read_language_config", look)
    threads = [threading.Thread(target=each, args=(Path("no/folder"),)) for each in (_check_model, _tokenizer_of)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not both.is_set()


@pytest.mark.parametrize("adopted_first", [False, True])
@pytest.mark.parametrize("source", [True, False])
def test_a_driver_may_die_amid_a_hand_over(
    drive: Drive, folder: Path, monkeypatch: pytest.MonkeyPatch, source: bool, adopted_first: bool
):
    """Its ranks are adopted, and keep nothing of it, in either order: their connection's end first, or the adoption."""
    small_transfers(monkeypatch)
    monkeypatch.setattr(HandOverCosts, "stays", lambda *_: False)
    first, backend = drive(prefill_ranks=1)
    reached, goes_on = threading.Event(), threading.Event()

    def wait_once(connection: WatchedConnection) -> None:
        if connection.source == source and connection.messages == 5 and not reached.is_set():
            reached.set()
            assert goes_on.wait(PATIENCE_S)

    backend.on_connection = wait_once
    interrupted = first.submit(PROMPTS[1], max_new_tokens=200, **GREEDY)
    assert reached.wait(PATIENCE_S)
    abandon(first)
    if not adopted_first:
        goes_on.set()
    second, adopting = drive(backend, prefill_ranks=1)
    running = [second.submit(prompt, max_new_tokens=20, **GREEDY) for prompt in PROMPTS[:3]]
    goes_on.set()
    assert not interrupted.done, "its driver is no more"
    assert [each.result(PATIENCE_S).tokens for each in running] == expected(folder, PROMPTS[:3], 20)
    assert tokens_of(second.generate(PROMPTS, max_new_tokens=20, **GREEDY)) == expected(folder, PROMPTS, 20)
    assert set(adopting.workers.values()) == set(backend.workers.values()), "none died"
    check_empty(second, adopting)
