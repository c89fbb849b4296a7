"""``python -m cluster.job``: a file of prompts through a cluster, as ``ray job submit`` runs it.

command.py            the command
run.py        what a job does, in order, and its exit codes
prompts.py   the prompts: JSON lines in
results.py   the output: JSON lines out, and going on where a job has stopped
progress.py   what is said meanwhile
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from epslots.cli import VersionOption
from epslots.cli.options import (
    BatchInvariantOption,
    CacheDirOption,
    ChatOption,
    DeviceOption,
    DtypeOption,
    ExecutePredictedOption,
    HostComputeOption,
    HostStoreOption,
    IgnoreTokenizerEosOption,
    LinkOption,
    MaxNewTokensOption,
    ModelOption,
    PlacementOption,
    PolicyOption,
    PredictorOption,
    PrefetchOption,
    SeedOption,
    SlotsOption,
    StopOption,
    StrategyOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    ray_address,
)
from epslots.errors import EpslotsError
from epslots.planner.cache_policy import DEFAULT_POLICY
from epslots.streams import say

if TYPE_CHECKING:
    from cluster.api import Cluster

app = typer.Typer(name="python -m cluster.job", add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def job(
    prompts: Annotated[Path, typer.Option("--prompts", help="File of JSON lines to read; see above.")],
    output: Annotated[Path, typer.Option("--output", help="File of JSON lines to write, or to go on with.")],
    model: ModelOption = None,
    ranks: Annotated[Optional[int], typer.Option(min=1, help="Ranks. Default: one for each GPU, or 1.")] = None,
    slots: SlotsOption = "auto",
    address: Annotated[
        str,
        typer.Option(help='Ray cluster: "auto" (the running one), "host:port", or "local" (start Ray on this machine).'),
    ] = "auto",
    strategy: StrategyOption = "PACK",
    max_new_tokens: MaxNewTokensOption = 128,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    top_k: TopKOption = 0,
    seed: SeedOption = 0,
    stop: StopOption = None,
    ignore_tokenizer_eos: IgnoreTokenizerEosOption = False,
    chat: ChatOption = None,
    kv_tokens: Annotated[int, typer.Option(min=1, help="Tokens that each rank's KV cache keeps.")] = 4096,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    policy: PolicyOption = DEFAULT_POLICY,
    host_store: HostStoreOption = None,
    cache_dir: CacheDirOption = None,
    link: LinkOption = None,
    prefetch: PrefetchOption = "auto",
    predictor: PredictorOption = None,
    execute_predicted: ExecutePredictedOption = False,
    host_compute: HostComputeOption = "auto",
    batch_invariant: BatchInvariantOption = False,
    placement: PlacementOption = None,
    window_steps: Annotated[
        int,
        typer.Option(
            min=0, help="Steps after which ranks tell the controller what they measured; 0 = the placement stays as it is."
        ),
    ] = 64,
    deadline_s: Annotated[
        float, typer.Option(help="Seconds that one operation between ranks may take before they give each other up.")
    ] = 60.0,
    give_up_after_s: Annotated[
        Optional[float],
        typer.Option(help="Seconds after which a rank that can't be replaced is given up. Default: never, it is tried again."),
    ] = None,
    version: VersionOption = False,
) -> None:
    """Continue the prompts of a file, on the ranks of a Ray cluster.

    \b
    ray job submit --working-dir . -- python -m cluster.job --model /models/Qwen3-30B-A3B \\
        --ranks 16 --slots 25% --prompts /data/prompts.jsonl --output /data/results.jsonl

    --prompts is read as a JSON object a line, blank lines skipped. Beside "prompt" (text, or a list of token ids) it may have
    an "id", which comes back, and settings of its own: max_new_tokens, temperature, top_k, top_p, seed, stop, stop_tokens,
    ignore_tokenizer_eos, chat.

    \b
    {"prompt": "The capital of France is"}
    {"prompt": [5, 6, 7], "id": "b", "max_new_tokens": 20, "temperature": 0.7, "seed": 1}

    --output gets a JSON object a line for each prompt, in the order in which they finish. "line" is the prompt's line number,
    and "tokens" the number of new tokens; "token_ids" are there if the prompt was given as such. What is wrong with a prompt
    that can't be served is said in its line, with its "id" and "custom_id" if the line is an object, and the others go on.

    \b
    {"line":1,"text":" Paris.","tokens":3,"reason":"stop","digest":"..."}
    {"line":2,"id":"b","error":"...","digest":"..."}

    A job that was stopped, however that came, goes on when it is started again with the same arguments: no prompt is done
    twice, and none is left out. (What doesn't shape the texts may differ: --ranks, --slots, and so on.) To have prompts with
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
    from cluster.generation import read_settings
    from cluster.job.run import Exit, JobSettings, run_job
    from epslots.example import example_model

    try:
        source = str(example_model()) if model is None else model
        settings = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "seed": seed,
            "stop": tuple(stop or ()),
            "ignore_tokenizer_eos": ignore_tokenizer_eos,
            "chat": chat,
        }
        what = JobSettings(prompts, output, source, read_settings(settings), dtype, execute_predicted, batch_invariant)
    except EpslotsError as error:
        say(f"error: {error}")
        raise typer.Exit(Exit.NOT_STARTED) from error

    def open_cluster() -> Cluster:
        from cluster.api import Cluster

        return Cluster(
            source,
            ranks=ranks,
            slots=slots,
            address=ray_address(address),
            strategy=strategy,
            device=device,
            dtype=dtype,
            policy=policy,
            host_store=host_store,
            cache_dir=cache_dir,
            kv_tokens=kv_tokens,
            placement=placement,
            link=link,
            prefetch=prefetch,
            predictor=predictor,
            execute_predicted=execute_predicted,
            host_compute=host_compute,
            batch_invariant=batch_invariant,
            window_steps=window_steps,
            deadline_s=deadline_s,
            give_up_after_s=give_up_after_s,
        )

    raise typer.Exit(run_job(what, open_cluster))
