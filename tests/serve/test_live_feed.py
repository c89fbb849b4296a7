"""The live page's feed: the ranks are asked only while a page is open, once for all; its numbers are the metrics'."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest

from cluster.errors import ClusterError
from cluster.reports import ClusterStats
from cluster.serve import live_feed
from cluster.serve.errors import ApiError
from cluster.serve.live_feed import LiveFeed, Viewer
from cluster.serve.live_frame import Known
from cluster.serve.sampler import Sampler
from tests.support.busy_cluster import BusyCluster
from tests.support.http_service import COMPLETIONS, PATIENCE_S, Client, samples, serving
from tests.support.scripted_cluster import ScriptedCluster


class Shown:
    """A service as its page sees it.

    Args:
        ask: the ranks' numbers.
        sampled: seconds in which they count as new.
    """

    def __init__(self, ask: Callable[[], ClusterStats], sampled: float = 0.0) -> None:
        self.viewed: frozenset[int] = frozenset()
        self.ended = asyncio.Event()
        self.sampler = Sampler(ask, fresh_s=sampled)
        self.bug: Exception | None = None

    def view(self, layers: frozenset[int]) -> None:
        self.viewed = layers

    def known(self) -> Known:
        if self.bug is not None:
            raise self.bug
        stats = self.sampler.latest
        return Known("ready", "m", True, None, stats, self.sampler.age_s, 0, (), None, None)


@pytest.fixture(scope="module")
def busy() -> Iterator[BusyCluster]:
    with BusyCluster((2, 3, 8)) as cluster:
        yield cluster


@asynccontextmanager
async def feeding(ask: Callable[[], ClusterStats], every_s: float = 0.001) -> AsyncIterator[tuple[Shown, LiveFeed]]:
    """A feed that makes frames much faster than once a second."""
    shown = Shown(ask)
    yield shown, LiveFeed(shown, every_s)
    shown.sampler.close()


async def take(viewer: Viewer, count: int) -> list[Any]:
    """A viewer's next frames."""
    found: list[Any] = []
    async for frame in viewer.frames():
        found.append(json.loads(frame.removeprefix(b"data: ")))
        if len(found) == count:
            break
    return found


def test_ranks_are_asked_only_while_a_page_is_open(busy: BusyCluster):
    """And not once more when the last one is closed."""
    asked = [0]

    def ask() -> ClusterStats:
        asked[0] += 1
        return busy.stats()

    async def look() -> None:
        async with feeding(ask) as (shown, feed):
            assert asked == [0]
            for pages in (1, 2):
                viewers = [feed.join(0) for _ in range(pages)]
                for viewer in viewers:
                    assert len(await take(viewer, 3)) == 3
                task = feed._making
                assert task is not None
                for viewer in viewers:
                    feed.part(viewer)
                assert feed._making is None
                await asyncio.wait({task})
                assert not shown.viewed
                # A question that was under way may still reach the ranks: the sampler's thread answers it before this one.
                await asyncio.get_running_loop().run_in_executor(shown.sampler._thread, int)
                before = asked[0]
                await asyncio.sleep(0.05)
                assert asked[0] == before > 0

    asyncio.run(look())


def test_many_pages_share_one_look(busy: BusyCluster):
    """Each of twenty gets the same numbers, asked for once."""

    async def look() -> None:
        async with feeding(busy.stats) as (_, feed):
            before = busy.asked_stats
            viewers = [feed.join(0) for _ in range(20)]
            found = await asyncio.gather(*(take(viewer, 1) for viewer in viewers))
            assert all(one == found[0] for one in found)
            assert busy.asked_stats - before <= 2
            for viewer in viewers:
                feed.part(viewer)

    asyncio.run(look())


def test_a_slow_page_misses_frames(busy: BusyCluster):
    """It gets the newest when it is back, and holds up no other viewer."""

    async def look() -> None:
        async with feeding(busy.stats) as (_, feed):
            slow, quick = feed.join(0), feed.join(0)
            frames = await take(quick, 30)
            late = (await take(slow, 1))[0]
            assert late["frame"]["at"] >= frames[-2]["frame"]["at"]
            feed.part(slow)
            feed.part(quick)

    asyncio.run(look())


def test_pages_see_the_layers_they_ask_for(busy: BusyCluster):
    """The ranks are asked for the slots of these layers alone."""

    async def look() -> None:
        async with feeding(busy.stats) as (shown, feed):
            viewers = {layer: feed.join(layer) for layer in (0, 2, 9)}
            assert shown.viewed == {0, 2, 9}
            found = {layer: (await take(viewer, 2))[1]["layer"] for layer, viewer in viewers.items()}
            assert (found[0]["number"], found[2]["number"], found[9]) == (0, 2, None)
            assert found[2]["name"] == "model.layers.2.mlp.experts"
            feed.part(viewers[0])
            assert shown.viewed == {2, 9}
            feed.part(viewers[2])
            feed.part(viewers[9])
            assert shown.viewed == frozenset()

    asyncio.run(look())


def test_frames_come_while_the_ranks_are_silent(busy: BusyCluster):
    """They say how old the ranks' numbers are."""
    silent = threading.Event()

    def ask() -> ClusterStats:
        if busy.asked_stats > 0:
            silent.wait(PATIENCE_S)
        return busy.stats()

    busy.asked_stats = 0

    async def look() -> None:
        async with feeding(ask) as (_, feed):
            viewer = feed.join(0)
            frames = await take(viewer, 5)
            assert frames[-1]["frame"]["age_s"] > frames[1]["frame"]["age_s"] > 0
            silent.set()
            feed.part(viewer)

    asyncio.run(look())


def test_ranks_that_cant_be_asked_leave_the_rest():
    def ask() -> ClusterStats:
        raise ClusterError("gone, says the test")

    async def look() -> None:
        async with feeding(ask) as (_, feed):
            viewer = feed.join(0)
            (frame,) = await take(viewer, 1)
            assert (frame["frame"]["phase"], frame["frame"]["totals"], frame["layer"]) == ("ready", None, None)
            feed.part(viewer)

    asyncio.run(look())


def test_pages_end_with_the_service(busy: BusyCluster):
    """Also while they wait for the next frame; and a page that comes later ends at once."""

    async def look() -> None:
        async with feeding(busy.stats, every_s=3600) as (shown, feed):
            viewer = feed.join(0)
            await take(viewer, 1)
            shown.ended.set()
            assert await take(viewer, 1) == []
            assert await take(feed.join(0), 1) == []

    asyncio.run(look())


def test_a_bug_ends_the_pages_streams(busy: BusyCluster, caplog: pytest.LogCaptureFixture):
    """They come again, and the next one is served anew."""

    async def look() -> None:
        async with feeding(busy.stats) as (shown, feed):
            shown.bug = ValueError("a bug, says the test")
            viewer = feed.join(0)
            assert await take(viewer, 1) == []
            feed.part(viewer)
            shown.bug = None
            viewer = feed.join(0)
            assert len(await take(viewer, 1)) == 1
            feed.part(viewer)

    asyncio.run(look())
    assert "a bug, says the test" in caplog.text


def test_pages_have_a_limit(busy: BusyCluster, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(live_feed, "MOST_VIEWERS", 2)

    async def look() -> None:
        async with feeding(busy.stats) as (_, feed):
            first = feed.join(0)
            feed.join(0)
            with pytest.raises(ApiError, match="2 pages are open"):
                feed.join(0)
            feed.part(first)
            feed.join(0)
            for viewer in list(feed._viewers):
                feed.part(viewer)

    asyncio.run(look())


# Over HTTP.


@contextmanager
def watching(client: Client, layer: str = "0", **headers: str) -> Iterator[Callable[[], Any]]:
    """A connection to the feed, as a function that returns the next frame; None at the end."""
    connection = http.client.HTTPConnection(*client.address, timeout=PATIENCE_S)
    connection.request("GET", f"/live?layer={layer}", headers=headers)
    answer = connection.getresponse()
    assert answer.status == 200
    assert answer.getheader("content-type") == "text/event-stream; charset=utf-8"

    def following() -> Any:
        line = answer.readline()
        while line and not line.startswith(b"data: "):
            line = answer.readline()
        return json.loads(line[6:]) if line else None

    try:
        yield following
    finally:
        connection.close()


def test_the_pages_values_are_the_metrics(busy: BusyCluster):
    """Of the same moment: the ranks' numbers are shared."""
    with serving(busy) as client:
        client.post(COMPLETIONS, {"prompt": [5, 6], "max_tokens": 4, "n": 2})
        with watching(client, "1") as following:
            shown = following()
            found = samples(client)
    frame, totals = shown["frame"], shown["frame"]["totals"]
    hits, misses = found["epslots:expert_hits_total"], found["epslots:expert_misses_total"]
    assert totals["hit_rate"] == hits / (hits + misses)
    assert totals["zero_miss"] == found["epslots:zero_miss_steps_total"] / found["epslots:rank_steps_total"]
    assert totals["kv_usage"] == found["epslots:kv_cache_usage_perc"]
    assert totals["preempted"] == found["epslots:num_preemptions_total"]
    assert totals["balance"] == found["epslots:expert_balance"]
    assert (frame["running"], frame["waiting"]) == (
        found["epslots:num_requests_running"],
        found["epslots:num_requests_waiting"],
    )
    assert (frame["serving"], frame["epoch"]) == (found["epslots:ranks"], found["epslots:epoch"])
    assert frame["recoveries"] == found["epslots:group_recoveries_total"]
    of_rank = "epslots:rank_memory_bytes group={group} rank={rank} role={role}".format
    assert {of_rank(**rank): rank["memory_bytes"] for rank in frame["ranks"]} == {
        name: value for name, value in found.items() if name.startswith("epslots:rank_memory_bytes")
    }
    assert (frame["model"], frame["layers"], shown["layer"]["number"]) == ("scripted", 3, 1)
    # The one request's times, which the histograms sum up.
    assert frame["ttft_s"] == [pytest.approx(found["epslots:time_to_first_token_seconds_sum"])] * 2
    assert frame["per_token_s"] == [pytest.approx(found["epslots:request_time_per_output_token_seconds_sum"])] * 2


def test_groups_and_roles_are_shown_as_measured():
    """Page and metrics: each group's role, state, requests and hand-overs; and which rank is in which group."""
    with BusyCluster((4, 1, 8), roles=("prefill", "decode")) as cluster, serving(cluster) as client:
        cluster.formed[1] = False
        with watching(client) as following:
            frame = following()["frame"]
            found = samples(client)
    assert [(rank["rank"], rank["group"], rank["role"]) for rank in frame["ranks"]] == [
        (0, 0, "prefill"),
        (1, 0, "prefill"),
        (2, 1, "decode"),
        (3, 1, "decode"),
    ]
    first, second = frame["groups"]
    assert (first["role"], first["formed"], first["handing_over"], first["placement"]) == ("prefill", True, 0, 7)
    assert (second["role"], second["formed"], second["handing_over"], second["placement"]) == ("decode", False, 1, 8)
    assert (second["serving"], second["requests"], second["controller"]) == (2, 8, "watching")
    assert frame["hand_overs"] == {"done": 9, "failed": 2, "mean_s": pytest.approx(0.03), "mean_bytes": 2**20}
    assert [text.partition(":")[0] for text in frame["placement"]] == ["Group 0, prefill", "Group 1, decode"]
    prefill, decode = " group=0 role=prefill", " group=1 role=decode"
    assert (found[f"epslots:group_formed{prefill}"], found[f"epslots:group_formed{decode}"]) == (1, 0)
    assert (found[f"epslots:group_ranks{decode}"], found[f"epslots:group_hand_overs_running{decode}"]) == (2, 1)
    assert (found[f"epslots:group_epoch{decode}"], found[f"epslots:group_requests{prefill}"]) == (4, 8)
    of_ranks = cluster.stats().by_group()[0]
    assert 0 < found[f"epslots:group_prompt_tokens_total{prefill}"] <= of_ranks.engine.prompt_tokens
    assert 0 < found[f"epslots:group_expert_hits_total{prefill}"] < of_ranks.hits
    assert found["epslots:hand_overs_total"] == 9


def test_groups_without_roles_hand_nothing_over():
    with (
        BusyCluster((2, 1, 8), roles=("mixed", "mixed")) as cluster,
        serving(cluster) as client,
        watching(client) as following,
    ):
        frame = following()["frame"]
    assert frame["hand_overs"] is None and [group["role"] for group in frame["groups"]] == ["mixed"] * 2


def test_the_page_follows_the_services_life():
    """Loading, serving, failed; then its stream ends with the service."""
    with ScriptedCluster() as cluster, serving(None, drain_s=0) as client, watching(client) as following:
        shown = following()
        assert (shown["frame"]["phase"], shown["frame"]["serving"], shown["layer"]) == ("starting", 0, None)
        client.service.attach(cluster)
        while (shown := following())["frame"]["phase"] == "starting":
            pass
        assert (shown["frame"]["phase"], shown["frame"]["serving"]) == ("ready", 2)
        client.server.call(client.service.drain())
        while (shown := following()) is not None:
            assert shown["frame"]["phase"] in ("ready", "draining")


def test_layers_that_there_cant_be_are_refused(busy: BusyCluster):
    with serving(busy) as client:
        for layer in ("-1", "4096", "x", "1.5"):
            reply = client.get(f"/live?layer={layer}")
            assert (reply.status, reply.error["type"]) == (400, "invalid_request_error")
            assert "layer" in reply.error["message"]


def test_the_feed_needs_the_key(busy: BusyCluster):
    with serving(busy, keys=("first-key-1",)) as client:
        assert client.get("/live").status == 401
        assert client.get("/live", Authorization="Bearer first-key-2").status == 401
        assert client.get("/live?key=first-key-1").status == 401, "keys don't stand in URLs"
        with watching(client, Authorization="Bearer first-key-1") as following:
            assert following()["frame"]["phase"] == "ready"


def test_a_page_that_leaves_is_forgotten(busy: BusyCluster):
    """Its connection is closed, and the ranks are asked no more."""
    with serving(busy) as client:
        with watching(client) as following:
            following()
            assert client.service.viewed == {0}

        async def until_left() -> None:
            while client.service.viewed:
                await asyncio.sleep(0.01)

        client.server.call(until_left())
