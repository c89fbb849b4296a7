"""Prometheus metrics of the requests, and the page that has all of the service's.

Names are vLLM's behind our prefix where the meaning is the same, with vLLM's buckets: dashboards need the prefix changed
alone. Three times have OpenTelemetry's names, too, as its "gen_ai" conventions and their exporters to Prometheus spell them.
What the ranks report is in ``cluster_metrics.py``.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from cluster.serve.cluster_metrics import ClusterCollector, ServiceSample
from cluster.serve.request_summary import RequestSummary

PREFIX = "epslots:"
CONTENT_TYPE = CONTENT_TYPE_LATEST
_TTFT_S = (.001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)  # fmt: skip
_PER_TOKEN_S = (.01, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)  # fmt: skip
_REQUEST_S = (.3, .5, .8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)  # fmt: skip
_GEN_AI_S = {
    "request_duration": (.01, .02, .04, .08, .16, .32, .64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92),
    "time_to_first_token": (.001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10),
    "time_per_output_token": (.01, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1, 2.5),
}  # fmt: skip
_OPERATIONS = {"/v1/completions": "text_completion", "/v1/chat/completions": "chat"}
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000)


class Metrics:
    """All metrics of one service.

    Args:
        model: the label ``model_name`` of all.
        sample: returns the latest numbers of the ranks.
    """

    def __init__(self, model: str, sample: Callable[[], ServiceSample]) -> None:
        registry = self._registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(PREFIX + name, text, ["model_name", *labels], registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(PREFIX + name, text, ["model_name"], buckets=buckets, registry=registry)
            return made.labels(model)

        self._model = model
        self._http = counter("http_requests", "HTTP requests, by endpoint and status.", "path", "status")
        self._ended = counter("request_success", "Choices that ended, by reason.", "finished_reason")
        self._failed = counter("request_failures", "Requests that were refused, left or failed, by reason.", "reason")
        self._prompt = counter("prompt_tokens", "Tokens of prompts.").labels(model)
        self._generated = counter("generation_tokens", "New tokens that were returned.").labels(model)
        self._ttft = histogram("time_to_first_token_seconds", "From a request to its first token.", _TTFT_S)
        self._per_token = histogram(
            "request_time_per_output_token_seconds", "From a token to the next one, a request's average.", _PER_TOKEN_S
        )
        self._request = histogram("e2e_request_latency_seconds", "From a request to its end.", _REQUEST_S)
        self._prompts = histogram("request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self._texts = histogram("request_generation_tokens", "New tokens of a request.", _TOKENS)
        self._gen_ai = {
            name: Histogram(
                f"gen_ai_server_{name}_seconds",
                f"OpenTelemetry's gen_ai.server.{name.replace('request_', 'request.')}.",
                ["gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model"],
                buckets=buckets,
                registry=registry,
            )
            for name, buckets in _GEN_AI_S.items()
        }
        self._cluster = ClusterCollector(PREFIX, model, sample)
        registry.register(self._cluster)

    def note(self, summary: RequestSummary) -> None:
        """Count a request that has ended."""
        self._http.labels(self._model, summary.route or "other", str(summary.status)).inc()
        if summary.problem is not None:
            self._failed.labels(self._model, summary.problem).inc()
        for reason in summary.finish_reasons:
            self._ended.labels(self._model, reason).inc()
        if not summary.choices:
            return
        self._prompt.inc(summary.prompt_tokens)
        self._generated.inc(summary.new_tokens)
        self._prompts.observe(summary.prompt_tokens)
        self._texts.observe(summary.new_tokens)
        self._observe("request_duration", self._request, summary, summary.ended_s - summary.began_s)
        self._observe("time_to_first_token", self._ttft, summary, summary.ttft_s)
        self._observe("time_per_output_token", self._per_token, summary, summary.per_token_s)

    def _observe(self, name: str, histogram: Histogram, summary: RequestSummary, seconds: float | None) -> None:
        """Enter a time under vLLM's name, and under OpenTelemetry's."""
        if seconds is None:
            return
        histogram.observe(seconds)
        operation = _OPERATIONS.get(summary.route, "other")
        self._gen_ai[name].labels(operation, "epslots", summary.model or self._model).observe(seconds)

    def page(self, *, layers: bool = False) -> bytes:
        """All metrics in Prometheus' text format.

        Args:
            layers: also those of each MoE layer: some ten series a layer.
        """
        found: bytes = generate_latest(self._registry)
        return found + (self._cluster.layers_page() if layers else b"")
