"""Metrics and the access log: what was served is counted and written down, prompts only if asked."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from cluster.reports import ClusterStats, RankStats
from cluster.serve.access_log import AccessLog, line_of
from cluster.serve.cluster_metrics import balance as balance_of
from cluster.serve.request_summary import RequestSummary
from epslots.generation.engine_stats import sum_engines
from epslots.telemetry import COUNTERS, LayerStats, Stats
from tests.support import ROOT
from tests.support.http_service import CHAT, COMPLETIONS, samples, serving
from tests.support.scripted_cluster import ScriptedCluster


def test_requests_are_counted():
    with ScriptedCluster() as cluster, serving(cluster) as client:
        for stream in (False, True):
            client.post(COMPLETIONS, {"prompt": [5, 6], "max_tokens": 4, "n": 2, "stream": stream})
        client.post(COMPLETIONS, {"prompt": [5], "max_tokens": 100})
        client.post(COMPLETIONS, {"prompt": ""})
        client.get("/nowhere")
        found = samples(client)
    assert found["epslots:request_success_total finished_reason=length"] == 4
    assert found["epslots:request_success_total finished_reason=stop"] == 1
    assert found["epslots:prompt_tokens_total"] == 2 + 2 + 1
    assert found["epslots:generation_tokens_total"] == 16 + len(cluster.tokenizer("one two three four five").input_ids) + 1
    assert found["epslots:time_to_first_token_seconds_count"] == 3
    assert found["epslots:request_time_per_output_token_seconds_count"] == 3
    assert found["epslots:e2e_request_latency_seconds_count"] == 3
    of = " gen_ai_operation_name=text_completion gen_ai_provider_name=epslots gen_ai_request_model=scripted"
    for name in ("request_duration", "time_to_first_token", "time_per_output_token"):
        assert found[f"gen_ai_server_{name}_seconds_count{of}"] == 3
    vllms, otels = "epslots:e2e_request_latency_seconds_sum", f"gen_ai_server_request_duration_seconds_sum{of}"
    assert found[vllms] == found[otels] > 0
    assert found["epslots:http_requests_total path=/v1/completions status=200"] == 3
    assert found["epslots:http_requests_total path=/v1/completions status=400"] == 1
    assert found["epslots:http_requests_total path=other status=404"] == 1
    assert found["epslots:request_failures_total reason=400"] == 1


def test_the_clusters_numbers_are_there():
    with ScriptedCluster(held=True) as cluster, serving(cluster) as client, client.asking(COMPLETIONS, {"prompt": [5]}):
        cluster.wait_for(lambda: len(cluster.requests) == 1)
        found = samples(client)
    assert (found["epslots:num_requests_running"], found["epslots:num_requests_waiting"]) == (1, 0)
    assert (found["epslots:ranks"], found["epslots:epoch"]) == (2, 3)
    assert (found["epslots:kv_cache_usage_perc"], found["epslots:num_preemptions_total"]) == (0.25, 1)
    assert (found["epslots:prefix_cache_hits_total"], found["epslots:prefix_cache_queries_total"]) == (10, 40)
    assert found["epslots:expert_bytes_total source=host"] == 0
    assert (found["epslots:rank_steps_total"], found["epslots:zero_miss_steps_total"]) == (8, 6)
    assert (found["epslots:longest_wait_seconds"], found["epslots:ranks_missing"]) == (2.5, 1)


class UncapturedCluster(ScriptedCluster):
    """A cluster of one rank, which says why it decodes without graphs."""

    def stats(self, layers: Sequence[int] = ()) -> ClusterStats:
        found = super().stats(layers)
        engine = msgspec.structs.replace(found.engine, capture_obstacle="a layer has 2 slots", crowded_steps=7)
        zero = {"steps": 0, "requests": 0, "memory_bytes": 0, "descriptors": 0, "threads": 0}
        return replace(
            found, engine=engine, ranks=(RankStats(group=0, rank=1, where="here", stats=found.total, engine=engine, **zero),)
        )


def test_ranks_without_graphs_are_named():
    with UncapturedCluster() as cluster, serving(cluster) as client:
        found = samples(client)
    assert found["epslots:rank_uncaptured obstacle=a layer has 2 slots rank=1"] == 1
    assert found["epslots:engine_steps_replayed_total"] == 0
    assert (found["epslots:engine_steps_crowded_total"], found["epslots:engine_steps_ragged_total"]) == (7, 0)


def test_ranks_are_asked_once_a_second_at_most():
    """However many look; and not at all without a viewer."""
    with ScriptedCluster() as cluster, serving(cluster) as client:
        client.post(COMPLETIONS, {"prompt": "a"})
        assert cluster.asked_stats == 0
        for _ in range(5):
            samples(client)
        assert cluster.asked_stats <= 2


def test_metrics_of_a_cluster_that_doesnt_answer():
    """The last known ones, and those of the service itself."""
    with ScriptedCluster() as cluster, serving(cluster) as client:
        assert samples(client)["epslots:num_preemptions_total"] == 1
        cluster.break_down("gone")
        found = samples(client)
        assert (found["epslots:ranks"], found["epslots:num_preemptions_total"]) == (0, 1)


def layer(name: str, **counts: Any) -> LayerStats:
    given = {"tokens_per_expert": (3, 1), "num_experts": 2, "slots": 1, **COUNTERS, **counts}
    return LayerStats(layer=name, **given)


def test_layers_have_metrics_on_demand():
    class Layered(ScriptedCluster):
        def stats(self, layers: Any = ()) -> Any:
            from dataclasses import replace

            total = Stats((layer("a", hits=5, misses=1, host_bytes=7), layer("b", hits=1, misses=2, peer_bytes=9)))
            return replace(super().stats(), total=total)

    with Layered() as cluster, serving(cluster) as client:
        plain = samples(client)
        assert not any("layer=" in name for name in plain)
        assert (plain["epslots:expert_hits_total"], plain["epslots:expert_misses_total"]) == (6, 3)
        assert (plain["epslots:expert_bytes_total source=host"], plain["epslots:expert_bytes_total source=peer"]) == (7, 9)
        found = samples(client, "/metrics?layers=true")
        assert found["epslots:layer_expert_hits_total layer=a"] == 5
        assert found["epslots:layer_expert_misses_total layer=b"] == 2


@pytest.mark.parametrize(
    ("sent", "received", "balance"), [((0, 0), (0, 0), 1.0), ((4, 0), (0, 4), 0.5), ((2, 0), (0, 2), 4 / 6)]
)
def test_balance_is_mean_load_over_largest(sent: Any, received: Any, balance: float):
    """In each group alone: those of different roles have different loads."""

    def rank(group: int, number: int, times: int) -> RankStats:
        moved = {"pairs_sent": times * sent[number], "pairs_received": times * received[number]}
        one = layer("a", **moved)
        tokens = tuple(times * count for count in one.tokens_per_expert)
        stats = Stats((msgspec.structs.replace(one, tokens_per_expert=tokens),))
        return RankStats(group, number, "here", stats, sum_engines(()), 0, 0, 0, 0, 0)

    ranks = tuple(rank(group, number, times) for group, times in ((0, 1), (1, 50)) for number in (0, 1))
    assert balance_of(ClusterStats(0, 0, ranks, Stats(()), sum_engines(()), ())) == pytest.approx(balance)


def logged(**settings: Any) -> list[dict[str, Any]]:
    """The log's lines for some requests."""
    output = io.BytesIO()
    log = AccessLog(output)
    with ScriptedCluster() as cluster, serving(cluster, log=log, **settings) as client:
        client.post(COMPLETIONS, {"prompt": "secret", "max_tokens": 3, "n": 2}, {"X-Request-Id": "mine"})
        client.post(CHAT, {"messages": [{"role": "user", "content": "secret"}], "stream": True})
        client.post(COMPLETIONS, {"prompt": "secret", "n": 0})
        client.get("/v1/nowhere")
    return [json.loads(line) for line in output.getvalue().splitlines()]


def test_a_line_for_each_request():
    first, second, third, fourth = logged()
    assert (first["id"], first["status"], first["path"], first["model"]) == ("mine", 200, COMPLETIONS, "scripted")
    assert (first["choices"], first["new_tokens"], first["finish"]) == (2, 6, ["length", "length"])
    assert first["ms"] >= first["ttft_ms"] >= 0
    assert first["bytes"] > 0
    assert (second["stream"], second["finish"]) == (True, ["stop"])
    assert (third["status"], third["problem"]) == (400, "400")
    assert (fourth["status"], fourth["path"]) == (404, "/v1/nowhere")
    assert "secret" not in json.dumps([first, second, third, fourth])


def test_prompts_are_logged_only_if_asked():
    first, second, *_ = logged(log_prompts=True)
    assert first["prompt"] == "secret"
    assert first["text"] == [first["text"][0]] * 2
    assert first["text"][0].startswith("one")
    assert second["prompt"] == [{"role": "user", "content": "secret"}]
    assert second["text"][0].startswith("one two")


def test_a_log_that_cant_be_written_holds_up_nothing():
    class Broken(io.BytesIO):
        def write(self, data: Any) -> int:
            raise OSError("full")

    log = AccessLog(Broken())
    summary = RequestSummary(id="a", method="GET", path="/", client="", began_s=0.0)
    log.log(summary)
    log.close()
    assert log.lost == 1


def test_a_path_of_any_length_makes_a_short_line():
    summary = RequestSummary(id="a", method="GET", path="/" + "x" * 10_000, client="", began_s=0.0)
    assert len(json.dumps(line_of(summary, 0.0))) < 1000


def test_names_are_legal():
    with ScriptedCluster() as cluster, serving(cluster) as client:
        for name in samples(client):
            assert re.fullmatch(r"(epslots:|gen_ai_server_)[a-z0-9_]+( .*)?", name), name


def test_the_dashboard_shows_what_there_is():
    """Every metric that its queries name is on the page."""
    panels = json.loads((ROOT / "examples/serve/grafana.json").read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    named = {name.removesuffix("_bucket") for query in queries for name in re.findall(r"epslots:\w+", query)}
    with UncapturedCluster() as cluster, serving(cluster) as client:
        client.post(COMPLETIONS, {"prompt": "a"})
        client.post(COMPLETIONS, {})
        page = client.get("/metrics").body.decode()
    of_a_controller = {"epslots:placement_version"}
    assert {name for name in named - of_a_controller if f"{name}{{" not in page and f"{name}_bucket{{" not in page} == set()
    assert len(named) > 30
    latest = ("rank_uncaptured", "graph_bytes", "engine_steps_crowded_total", "expert_disk_bytes_total", "hand_overs_total")
    assert {f"epslots:{name}" for name in latest} <= named
