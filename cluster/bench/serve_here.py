"""The service over a cluster of this process, as in ``epslots serve``. It takes turns with the cluster's own API."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.api import Cluster
from cluster.serve.access_log import AccessLog
from cluster.serve.app import create_app
from cluster.serve.auth import ApiKeys
from cluster.serve.config import ServeConfig
from cluster.serve.server import HttpServer, bind
from cluster.serve.service import Service
from epslots.example import example_model
from epslots.models.json_file import model_type_of


@contextmanager
def serving_here(cluster: Cluster, **settings: Any) -> Iterator[tuple[str, Service]]:
    """The URL of a service for the cluster, and the service. Its access log is written, to nowhere.

    Args:
        settings: of ``ServeConfig``.
    """
    config = ServeConfig(names=("example",), port=0, **settings)
    with open(os.devnull, "wb") as nowhere:
        service = Service(config, AccessLog(nowhere))
        app = create_app(service, ApiKeys(()), local=True)
        with HttpServer(app, bind(config.host, config.port), config) as server:
            service.attach(cluster, model_type_of(Path(example_model())))
            yield server.url, service


def bodies_of(prompts: Sequence[str], new_tokens: int, *, stream: bool) -> list[dict[str, Any]]:
    """Requests that continue prompts by so many tokens, the likeliest ones."""
    body = {"max_tokens": new_tokens, "temperature": 0, "ignore_eos": True, "stream": stream}
    usage = {"stream_options": {"include_usage": True}} if stream else {}
    return [{"prompt": prompt, **body, **usage} for prompt in prompts]
