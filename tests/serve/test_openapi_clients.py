"""Schemathesis makes requests of the page at ``/openapi.json``, valid and invalid ones: no 5xx, and answers as described."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.support.http_service import serving
from tests.support.scripted_cluster import ScriptedCluster

schemathesis = pytest.importorskip("schemathesis", reason='schemathesis isn\'t installed: pip install "epslots[clients]"')
REQUESTS = 40
"""Of each kind for each operation."""


@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
def test_answers_are_as_the_page_says(mode: str):
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks

    checked = [
        not_a_server_error,
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_schema_conformance,
        checks.negative_data_rejection,
    ]
    tried = set()
    with ScriptedCluster(places=10_000) as cluster, serving(cluster, max_connections=10_000) as client:
        page = schemathesis.openapi.from_url(f"{client.url}/openapi.json")
        for found in page.get_all_operations():
            operation: Any = found.ok()
            kind = getattr(schemathesis.GenerationMode, mode)
            if mode == "NEGATIVE" and operation.method != "post":
                continue  # without a body, nothing can be wrong

            @settings(max_examples=REQUESTS, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
            @given(case=operation.as_strategy(generation_mode=kind))
            def ask(case: Any) -> None:
                case.call_and_validate(checks=checked)

            ask()
            tried.add(operation.path)
        assert client.service.running == 0
    assert {"/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"} <= tried
