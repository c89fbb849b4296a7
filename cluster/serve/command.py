"""``epslots serve``: its options, and its checks before anything is loaded. ``epslots/cli`` finds it by an entry point.

config.py      the settings
run.py         the process's life
app.py         the application; service.py the model behind it; endpoints.py a request's life
ray_app.py     the same application under Ray Serve
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Optional

import typer

from cluster.config import ClusterConfig, cluster_config
from cluster.job.command import RayOptions
from cluster.serve.config import ServeConfig
from epslots.cli.option_groups import takes_groups
from epslots.cli.options import KvTokensOption, LoadConfigOptions, ModelOption, ray_address
from epslots.config import DEFAULT_KV_TOKENS
from epslots.errors import ConfigError

if TYPE_CHECKING:
    from cluster.api import Cluster

_DEFAULTS = ServeConfig(names=("model",))
_MOST_TEMPLATE_BYTES = 1024**2
ORPHAN_S = 600.0
"""A service's ranks wait this long for its next process."""
_LONGEST_NAME = 64


@dataclass(frozen=True)
class ServiceOptions:
    """The settings of ``ServeConfig``, and keys."""

    PANEL: ClassVar[str] = "The service"

    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 = all of this machine's, which needs API keys.")] = (
        _DEFAULTS.host
    )
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 = any that is free.")] = _DEFAULTS.port
    served_model_name: Annotated[
        Optional[list[str]],
        typer.Option(help="Name of the model in requests. Default: its folder's name. May be given several times."),
    ] = None
    api_key: Annotated[
        Optional[list[str]],
        typer.Option(
            help="Key that requests must have. Other users of this machine can see it in the list of processes: a file or "
            "EPSLOTS_API_KEY is safer. May be given several times."
        ),
    ] = None
    api_key_file: Annotated[Optional[Path], typer.Option(help="File with a key a line.")] = None
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Serve everybody who reaches the address, without keys.")] = (
        _DEFAULTS.no_auth
    )
    cors_origin: Annotated[
        Optional[list[str]],
        typer.Option(help="Web origin whose pages may call the service, such as https://chat.example; * = all."),
    ] = None
    chat_template: Annotated[
        Optional[Path], typer.Option(help="File of a Jinja chat template, in place of the tokenizer's.")
    ] = None
    response_template: Annotated[
        Optional[Path],
        typer.Option(help="File of transformers' response template (JSON), which finds tool calls and reasoning in texts."),
    ] = None
    max_queue: Annotated[
        int, typer.Option(min=1, help="Requests that may wait or run at once; others are told to come again.")
    ] = ClusterConfig().max_queue
    request_timeout_s: Annotated[Optional[float], typer.Option(help="Seconds that a request may take. Default: no limit.")] = (
        _DEFAULTS.request_timeout_s
    )
    drain_s: Annotated[float, typer.Option(help="Seconds in which running requests may end after SIGTERM or Ctrl-C.")] = (
        _DEFAULTS.drain_s
    )
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Bytes of a request's body.")] = _DEFAULTS.max_body_bytes
    log_requests: Annotated[
        bool, typer.Option("--log-requests/--no-log-requests", help="Write a JSON line for each request to standard error.")
    ] = _DEFAULTS.log_requests
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="The lines have prompts and texts, too.")] = (
        _DEFAULTS.log_prompts
    )

    def config(self, source: str) -> ServeConfig:
        """The options as a configuration.

        Raises:
            ConfigError: an option isn't allowed, or its file can't be read.
        """
        from cluster.serve.response_template import read_response_template

        return ServeConfig(
            names=tuple(self.served_model_name or (default_name(source),)),
            host=self.host,
            port=self.port,
            no_auth=self.no_auth,
            cors_origins=tuple(self.cors_origin or ()),
            chat_template=None if self.chat_template is None else _read_template(self.chat_template),
            response_template=None if self.response_template is None else read_response_template(str(self.response_template)),
            request_timeout_s=self.request_timeout_s,
            drain_s=self.drain_s,
            max_body_bytes=self.max_body_bytes,
            log_requests=self.log_requests,
            log_prompts=self.log_prompts,
        )


@dataclass(frozen=True)
class ServeRanks(RayOptions):
    """The ranks of a service. By default they run in a Ray of its own, and outlive its process when that is killed."""

    name: Annotated[
        Optional[str],
        typer.Option(
            help="Name by which the next process finds the ranks when this one was killed. Default: the model's, and the port."
        ),
    ] = None
    orphan_s: Annotated[
        float,
        typer.Option(
            help="Seconds that ranks wait, with their model, for the next process of this --name; 0 = they end with this one."
        ),
    ] = ORPHAN_S
    replace: Annotated[
        bool, typer.Option("--replace", help="End ranks of this --name that wait, and load anew, in place of adopting them.")
    ] = False
    address: Annotated[
        str,
        typer.Option(help='Ray cluster: "local" (a Ray of its own on this machine), "auto" (the running one), "host:port".'),
    ] = "local"

    def lasting(self, model: str, port: int) -> dict[str, Any]:
        """The settings of ranks that outlive this process. A port that changes with each start is no name for the next one."""
        if self.name is None and port == 0:
            return {"name": None, "orphan_s": 0.0}
        return {"name": self.name or name_of(model, str(port)), "orphan_s": self.orphan_s}


@takes_groups
def serve(
    model: ModelOption = None,
    *,
    load: LoadConfigOptions,
    ranks: ServeRanks,
    service: ServiceOptions,
    kv_tokens: KvTokensOption = str(DEFAULT_KV_TOKENS),
) -> None:
    """Serve a model over HTTP, with OpenAI's API.

    It listens only on this machine unless --host says otherwise, and takes requests when its ranks have loaded the model.
    SIGTERM and Ctrl-C let running requests end first, and then end the ranks. If the process is killed, the ranks keep their
    model and wait for --orphan-s: the same command, started again, adopts them and serves within seconds. Requests that ran at
    that moment are cut off, and can be sent again. Needs the libraries of the extra "serve" (pip install).

        epslots serve --model ./Qwen3-30B-A3B --ranks 4 --slots 25%
        epslots serve --model ./Qwen3-30B-A3B --host 0.0.0.0 --api-key-file keys.txt
        epslots serve --model /models/Qwen3-30B-A3B --ranks 16 --address auto

    /v1/completions, /v1/chat/completions and /v1/models are OpenAI's, with vLLM's extra parameters; /tokenize, /detokenize,
    /version and /openapi.json say more. /metrics is Prometheus'. /health says that the service lives, /ready that it serves;
    these two need no key.

    Exit codes: 0 after SIGTERM or Ctrl-C; 2 if it couldn't start, with the reason; 3 if the ranks failed for good.
    """
    check_libraries()
    from cluster.serve.auth import read_keys
    from cluster.serve.run import run_service
    from epslots.example import example_model
    from epslots.models.checkpoint import find_checkpoint
    from epslots.models.json_file import model_type_of

    source = str(example_model()) if model is None else model
    loading = load.config(kv_tokens)
    config = service.config(source)
    keys = read_keys(service.api_key or (), None if service.api_key_file is None else str(service.api_key_file))
    config.check_exposure(bool(keys))
    lasting = ranks.lasting(default_name(source), service.port)
    settings = {**asdict(ranks), "address": ray_address(ranks.address), **lasting, **loading.keywords()}
    settings["max_queue"] = service.max_queue
    cluster_config(**settings)  # what isn't allowed is said before anything listens
    model_type = model_type_of(find_checkpoint(source))

    def open_cluster() -> Cluster:
        from cluster.api import Cluster

        return Cluster(source, **settings)

    raise typer.Exit(run_service(config, keys, open_cluster, model_type))


def check_libraries() -> None:
    """Refuse to go on without the libraries of the extra.

    Raises:
        ConfigError: one isn't installed.
    """
    try:
        import fastapi  # noqa: F401
        import httptools  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
        import uvloop  # noqa: F401
    except ImportError as error:
        raise ConfigError(f'a service needs {error.name}: pip install "epslots[serve]", or ".[serve]" in a clone') from error


def default_name(source: str) -> str:
    """The name of a model without a given one: its folder's, or its hub id."""
    folder = Path(source)
    if not folder.is_dir():
        return source
    name = folder.resolve().name
    return folder.resolve().parent.name.replace("_", "-") if name in ("model", "example_model") else name


def name_of(*parts: str) -> str:
    """A cluster's name, made of other names."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(parts))[-_LONGEST_NAME:].lstrip("._-") or "service"


def _read_template(file: Path) -> str:
    from epslots.given_files import read_given

    try:
        return read_given(file, _MOST_TEMPLATE_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--chat-template {file}: {getattr(error, 'strerror', None) or error}") from error
