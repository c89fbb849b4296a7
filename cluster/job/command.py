"""``python -m cluster.job``: a cluster continues the prompts of a file; ``ray job submit`` runs it. Here are its options.

run.py        the job's steps, in order, and its exit codes
prompts.py    the prompts: JSON lines in
results.py    the output: JSON lines out, from which a stopped job goes on
progress.py   a bar or log lines
signals.py    Ctrl-C and SIGTERM
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Optional

import typer

from cluster.config import ClusterConfig
from epslots.cli import VersionOption
from epslots.cli.option_groups import takes_groups
from epslots.cli.options import (
    DecodeRanksOption,
    GroupsOption,
    KvTokensOption,
    LoadConfigOptions,
    ModelOption,
    PlacementOption,
    PrefillRanksOption,
    StrategyOption,
    ray_address,
)
from epslots.cli.text_options import TextOptions
from epslots.config import DEFAULT_KV_TOKENS

if TYPE_CHECKING:
    from cluster.api import Cluster

app = typer.Typer(name="python -m cluster.job", add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

_DEFAULTS = ClusterConfig()


@dataclass(frozen=True)
class RayOptions:
    """The settings of ``ClusterConfig`` that a job takes."""

    PANEL: ClassVar[str] = "The ranks"

    ranks: Annotated[Optional[int], typer.Option(min=1, help="Ranks. Default: one for each GPU, or 1.")] = _DEFAULTS.ranks
    groups: GroupsOption = _DEFAULTS.groups
    prefill_ranks: PrefillRanksOption = _DEFAULTS.prefill_ranks
    decode_ranks: DecodeRanksOption = _DEFAULTS.decode_ranks
    address: Annotated[
        str,
        typer.Option(help='Ray cluster: "auto" (the running one), "host:port", or "local" (start Ray on this machine).'),
    ] = "auto"
    strategy: StrategyOption = _DEFAULTS.strategy
    placement: PlacementOption = None
    window_steps: Annotated[
        int,
        typer.Option(min=0, help="Steps after which ranks report their load to the controller; 0 = the placement stays."),
    ] = _DEFAULTS.window_steps
    deadline_s: Annotated[
        float, typer.Option(help="Seconds that one operation between ranks may take before they give each other up.")
    ] = _DEFAULTS.deadline_s
    give_up_after_s: Annotated[
        Optional[float],
        typer.Option(help="Seconds after which a rank that can't be replaced is given up. Default: never, it is tried again."),
    ] = _DEFAULTS.give_up_after_s


@app.command()
@takes_groups
def job(
    prompts: Annotated[Path, typer.Option("--prompts", help="File of JSON lines to read; see above.")],
    output: Annotated[Path, typer.Option("--output", help="File of JSON lines to write, or to go on with.")],
    model: ModelOption = None,
    *,
    load: LoadConfigOptions,
    where: RayOptions,
    text: TextOptions,
    kv_tokens: KvTokensOption = str(DEFAULT_KV_TOKENS),
    version: VersionOption = False,
) -> None:
    """Continue the prompts of a file, on the ranks of a Ray cluster.

    \b
    ray job submit --working-dir . -- python -m cluster.job --model /models/Qwen3-30B-A3B \\
        --ranks 16 --slots 25% --prompts /data/prompts.jsonl --output /data/results.jsonl

    --prompts is read as a JSON object a line, blank lines skipped. Beside "prompt" (text, or a list of token ids) it may have
    an "id", which comes back, and settings of its own, which go before the options: "max_new_tokens", "stop" (a list), "n",
    "temperature", "logit_bias", "json_schema", "logprobs", and so on, for each option from --max-new-tokens on.

    \b
    {"prompt": "The capital of France is"}
    {"prompt": [5, 6, 7], "id": "b", "max_new_tokens": 20, "temperature": 0.7, "seed": 1, "logit_bias": {"198": -100}}
    {"prompt": "A person: ", "n": 2, "json_schema": {"type": "object", "required": ["name"]}}

    --output gets a JSON object a line for each prompt, in the order in which they finish. "line" is the prompt's line number,
    and "tokens" the number of new tokens; "token_ids" are there if the prompt was given as token ids. With "n" over 1, these
    are in the list "choices". Each of "logprobs" and "prompt_logprobs" is a token, its log-probability, and the likeliest
    tokens with theirs. The line of a prompt that can't be served has an "error", and the "id" and "custom_id" of the prompt's
    line if that is an object; the others go on.

    \b
    {"line":1,"text":" Paris.","tokens":3,"reason":"stop","digest":"..."}
    {"line":3,"choices":[{"text":...,"tokens":9,"reason":"stop"},{...}],"digest":"..."}
    {"line":2,"id":"b","error":"...","digest":"..."}

    A job that was stopped for any reason goes on when it is started again with the same arguments: no prompt is done twice,
    and none is left out. Options that don't change the texts may differ: --ranks, --slots, and so on. To have prompts with
    errors done again, delete their lines from the output. A prompts file that was changed meanwhile is refused; lines may be
    added at its end.

    \b
    Exit codes
      0    all prompts are done
      1    all prompts are done, some with errors
      2    not started: an argument is wrong, or the cluster can't be started like this
      3    broken off: the cluster failed, or the output can't be written; it can go on
      130  stopped by Ctrl-C; it can go on
      143  stopped by SIGTERM, which "ray job stop" sends; it can go on
    """
    from cluster.job.run import JobSettings, run_job
    from epslots.example import example_model

    source = str(example_model()) if model is None else model
    config = load.config(kv_tokens)
    settings = JobSettings(prompts, output, source, text.settings(), config)

    def open_cluster() -> Cluster:
        from cluster.api import Cluster

        given = {**asdict(where), "address": ray_address(where.address)}
        return Cluster(source, **given, **config.keywords())

    raise typer.Exit(run_job(settings, open_cluster))
