"""The service as an application of Ray Serve, for ``serve run`` and Serve's configuration files:

    serve run cluster.serve.ray_app:build model=/models/Qwen3-30B-A3B ranks=8 slots=25%

    applications:
      - name: qwen
        import_path: cluster.serve.ray_app:build
        args: {model: /models/Qwen3-30B-A3B, ranks: 8, slots: 25%, service: {names: [qwen]}}

The application of ``epslots serve``, deployed and restarted by Ray's tools; Serve's proxy costs more for each token. A replica
drives a cluster of its own, in the Ray that it runs in. Its ranks outlive it; the next replica adopts them (``orphan_s``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from ray import serve

from cluster.config import ClusterSettings
from cluster.serve.auth import ApiKeys, read_keys
from cluster.serve.command import ORPHAN_S, check_libraries, default_name, name_of
from cluster.serve.config import ServeConfig, read_serve_config
from epslots.errors import ConfigError

_MOST_REQUESTS = 10_000  # at a time in a replica: the service has limits of its own, and answers at once beyond them
_HEALTH_EVERY_S = 10.0
_SPARE_S = 20.0  # for the ranks' end, after requests were drained


def build(args: Mapping[str, Any]) -> serve.Application:
    """The application.

    Args:
        args: "model" (a checkpoint's folder on every node, or a hub id); settings of ``Cluster``; "service": settings of
            ``ServeConfig``; "api_key_file", on the node of the replica.

    Raises:
        ConfigError: a setting is unknown, or not allowed.
    """
    check_libraries()
    given = dict(args)
    model = given.pop("model", None)
    if not isinstance(model, str) or not model:
        raise ConfigError(f"model={model!r}; allowed: a checkpoint's folder, or a hub id")
    service = {"names": [default_name(model)], **given.pop("service", {})}
    config = read_serve_config(service)
    key_file = given.pop("api_key_file", None)
    if unknown := sorted(set(given) - set(ClusterSettings.__annotations__)):
        raise ConfigError(f"{', '.join(unknown)}: no such setting; allowed: model, service, api_key_file and Cluster's")
    deployment = EpslotsService.options(  # type: ignore[attr-defined]
        name=config.names[0].replace("/", "-").replace("#", "-"), graceful_shutdown_timeout_s=config.drain_s + _SPARE_S
    )
    application: serve.Application = deployment.bind(model, service, given, key_file)
    return application


def _lasting(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The ranks' name, which Serve's next replica in this one's place has, too."""
    if settings.get("orphan_s") == 0:
        return {}
    replica = serve.get_replica_context()
    return {"name": name_of(replica.app_name, replica.deployment, str(replica.rank.rank)), "orphan_s": ORPHAN_S}


@serve.deployment(
    num_replicas=1,
    max_ongoing_requests=_MOST_REQUESTS,
    ray_actor_options={"num_cpus": 0},  # the ranks take the devices
    health_check_period_s=_HEALTH_EVERY_S,
)
@serve.ingress()
class EpslotsService:
    """A replica: a cluster's driver, and the application.

    Args:
        model: the checkpoint.
        service: settings of ``ServeConfig``.
        settings: of ``Cluster``.
        key_file: file with API keys on this node.
    """

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, model: str, service: Mapping[str, Any], settings: Mapping[str, Any], key_file: str | None
    ) -> None:
        from cluster.api import Cluster
        from cluster.serve.access_log import AccessLog
        from cluster.serve.service import Service
        from epslots.models.checkpoint import find_checkpoint
        from epslots.models.json_file import model_type_of

        self._config: ServeConfig = read_serve_config(service)
        self._keys: ApiKeys = read_keys((), key_file)
        self._service = Service(self._config, AccessLog() if self._config.log_requests else None)
        self._cluster: Cluster = await asyncio.to_thread(
            lambda: Cluster(model, **{"address": "auto", "progress": False, **_lasting(settings), **settings})
        )
        await asyncio.to_thread(self._service.attach, self._cluster, model_type_of(find_checkpoint(model)))

    def __serve_build_asgi_app__(self) -> Any:
        """Ray Serve calls it, after the constructor."""
        from cluster.serve.app import create_app

        return create_app(self._service, self._keys, local=False, on_close=self._cluster.close)

    def check_health(self) -> None:
        """Ray Serve calls it, and replaces the replica if it raises."""
        if (failure := self._cluster.state().failure) is not None:
            raise RuntimeError(failure)
