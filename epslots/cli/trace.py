"""``epslots trace record | replay``: routing of prompts, and hit rates of caches on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import numpy as np
import typer

from epslots.arrays import IntArray
from epslots.cli.column_table import Columns, column_table
from epslots.cli.generate import context_of, read_prompts
from epslots.cli.option_groups import LoadOptions, takes_groups
from epslots.compiled import prepare
from epslots.errors import ConfigError
from epslots.generation.prompt_line import PromptLine
from epslots.generation.text import encode_prompt, load_tokenizer
from epslots.planner.cache_policy import POLICIES
from epslots.planner.reuse_distance import percentile
from epslots.progress import counting
from epslots.simulation.cache_replay import Replayed, belady, replay, reuse_histogram, steps_of
from epslots.simulation.lanes import deal_once
from epslots.streams import table_console
from epslots.units import parse_slots

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

trace_app = typer.Typer(help="Record a routing trace, and replay it through caches.", no_args_is_help=True)


@trace_app.command()
@takes_groups
def record(
    output: Annotated[Path, typer.Argument(help="The .npz to write.")],
    load: LoadOptions,
    prompts: Annotated[Optional[list[str]], typer.Argument(help="Prompts; else --file or standard input.")] = None,
    file: Annotated[
        Optional[Path], typer.Option("--file", "-f", help='A text file, or .jsonl with "prompt" in each line.')
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate after each prompt.")] = 128,
    probs: Annotated[bool, typer.Option("--probs", help="Record the routers' probabilities as well.")] = False,
) -> None:
    """Record the experts that each token of prompts and continuations chooses.

        epslots trace record trace.npz "def f(" "import os"

    The .npz holds expert_ids (int16, a row a token: layers x k), starts (each sequence's first row)
    and num_experts; and with --probs also probs (float16, a row a token: layers x experts).
    """
    if not output.absolute().parent.is_dir() or output.is_dir():
        raise ConfigError(f"{output}: give a file in a folder that exists")
    lines = read_prompts(prompts or [], file)

    import torch

    import epslots
    from epslots.models.checkpoint import find_checkpoint

    folder = find_checkpoint(load.source)
    context_of(folder)  # refuses models that predict no tokens
    tokenizer = load_tokenizer(folder)
    encoded = [_encode(tokenizer, line) for line in lines]
    model = load.load()
    with epslots.record_trace(model, probs=probs) as recorder:
        for tokens in encoded:
            ids = torch.tensor([tokens], device=model.device)
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False)
    trace = recorder.trace()
    trace.save(output)
    typer.echo(f"{output}: {len(trace.starts)} sequences, {len(trace.expert_ids)} tokens, {len(trace.num_experts)} layers")


def _encode(tokenizer: PreTrainedTokenizerBase, line: PromptLine) -> list[int]:
    """The token ids of a prompt.

    Raises:
        ConfigError: the prompt is no text, or has settings, which would have no effect.
    """
    if settings := set(line.request()) - {"prompt"}:
        names = ", ".join(sorted(settings))
        raise ConfigError(f'{names}: a trace follows no settings of its prompts; allowed: "prompt" and "id"')
    if not isinstance(line.prompt, str):
        raise ConfigError("a prompt of token ids; allowed in a trace: text")
    return encode_prompt(tokenizer, line.prompt, chat=False)


@trace_app.command(name="replay")
def replay_command(
    file: Annotated[Path, typer.Argument(help="A routing trace (.npz), from `epslots trace record`.")],
    slots: Annotated[
        str, typer.Option("--slots", "-s", help="Slots of each layer, or shares of its experts: 8,16,25%.")
    ] = "25%",
    policy: Annotated[str, typer.Option(help=f"all, or some of: {', '.join(POLICIES)}.")] = "all",
    batch: Annotated[int, typer.Option(min=1, help="Sequences at a time; each takes a token a step.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Replay a trace through caches: each policy's hit rates beside Belady's optimum.

        epslots trace replay trace.npz --slots 8,25%

    Also shown: how soon experts are used again.
    A hit is an expert that a step uses and finds in a slot, however many of the step's tokens chose it.
    """
    from epslots.trace import Trace

    trace = Trace.load(file)
    if not len(trace.expert_ids):
        raise ConfigError(f"{file}: the trace holds no token")
    names = list(POLICIES) if policy == "all" else policy.split(",")
    for name in names:
        if name not in POLICIES:
            raise ConfigError(f"--policy {name!r}: allowed: all, {', '.join(POLICIES)}")
    quotas = {given: slots_of_layers(given, trace.num_experts) for given in slots.split(",")}
    prepare()
    quota_CL = np.stack(list(quotas.values()))
    if batch > max(1, len(trace.starts)):
        raise ConfigError(f"--batch {batch}: the trace has {len(trace.starts)} sequences, so no more than these at a time")
    ids_TLN = steps_of(trace.expert_ids, deal_once(trace.starts, len(trace.expert_ids), batch))
    # Once for each policy, once for the distances; the optimum takes a second look, from the end.
    with counting("replay", len(ids_TLN) * len(trace.num_experts) * (len(names) + 2)) as advance:
        results = {name: replay(ids_TLN, trace.num_experts, quota_CL, POLICIES[name], advance) for name in names}
        results["belady"] = belady(ids_TLN, trace.num_experts, quota_CL, advance)
        histogram_LD = reuse_histogram(ids_TLN, trace.num_experts, advance=advance)
    found = {
        "trace": str(file),
        "sequences": len(trace.starts),
        "tokens": len(trace.expert_ids),
        "layers": len(trace.num_experts),
        "batch": batch,
        "steps": len(ids_TLN),
        **_hit_rates(results, list(quotas)),
        "reuse": [_reuse(histogram_LD[layer], experts) for layer, experts in enumerate(trace.num_experts.tolist())],
    }
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        _print_replayed(found)


def slots_of_layers(given: str, num_experts_L: IntArray) -> IntArray:
    """Slots of each layer, int64 [layers], from a number or a share ("25%") of its experts, at least one.

    Raises:
        ConfigError: it is neither, or not positive.
    """
    setting = parse_slots(given)
    if setting.per_layer is not None:
        return np.minimum(setting.per_layer, num_experts_L)
    if setting.share is None:
        raise ConfigError(f"slots={given!r}: allowed here: a positive int (slots of a layer), or a share such as 25%")
    return np.maximum(1, (num_experts_L * setting.share + 1e-9).astype(np.int64))


def _hit_rates(results: dict[str, Replayed], settings: list[str]) -> dict[str, Any]:
    rates, by_layer = {}, {}
    for name, result in results.items():
        rates[name] = dict(zip(settings, result.hit_rates, strict=True))
        rate_CL = result.hits_CL / np.maximum(1, result.hits_CL + result.misses_CL)
        by_layer[name] = dict(zip(settings, rate_CL.tolist(), strict=True))
    return {"hit_rates": rates, "hit_rates_by_layer": by_layer}


def _reuse(histogram_D: IntArray, experts: int) -> dict[str, Any]:
    """Stack distances of one layer's uses, but for the first use of each expert."""
    again_D = histogram_D[:experts]
    return {
        "experts": experts,
        "uses": int(histogram_D.sum()),
        "first_uses": int(histogram_D[experts]),
        "median": percentile(again_D, 0.5),
        "p90": percentile(again_D, 0.9),
        "p99": percentile(again_D, 0.99),
        "histogram": again_D.tolist(),
    }


_REUSE_HEADINGS = {
    "experts": "experts", "uses": "uses", "first_uses": "first uses", "median": "median", "p90": "90 %", "p99": "99 %"
}  # fmt: skip


def _print_replayed(found: dict[str, Any]) -> None:
    rates: dict[str, dict[str, float]] = found["hit_rates"]
    head = f"{found['sequences']} sequences, {found['tokens']:,} tokens, {found['batch']} at a time"
    policies: Columns[str] = [(name, lambda slots, of=of: f"{of[slots]:.1%}") for name, of in rates.items()]  # type: ignore[misc]
    columns: Columns[str] = [("slots of a layer", str), *policies]
    console = table_console(120)
    caption = "belady: the optimum, which knows the future"
    console.print(column_table(f"hit rates: {head}", columns, rates["belady"], caption))
    counts: Columns[dict[str, Any]] = [
        (heading, lambda row, name=name: f"{row[name]:,}")  # type: ignore[misc]
        for name, heading in _REUSE_HEADINGS.items()
    ]
    layers = [{"layer": str(layer), **row} for layer, row in enumerate(found["reuse"])]
    title = "number of other experts used before one is used again"
    console.print(column_table(title, [("layer", lambda row: row["layer"]), *counts], layers))
