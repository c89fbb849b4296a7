"""Speed of batches: 16 requests over one at a time, steps over those of ``generate``, and rows over pages."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, Qwen3NextConfig, StoppingCriteria

from epslots.bench.engines import Decoding, Served, close, open_engine, random_requests
from epslots.bench.models import load_fp32, random_checkpoint, random_config
from epslots.bench.report import MS, Tables, alternate, compare, median, ratio_columns
from epslots.generation.engine import Engine
from epslots.generation.requests import Request
from epslots.progress import Advance

PROMPT, NEW = 64, 64
MANY = 16
ALONE = 4  # of the 16 requests, those that are also served one at a time
CONTEXTS, BATCHES = (64, 2048), (32, 8, 1)
GENERATED = (1, 8)
IMPLEMENTATIONS = ("grouped_mm", "batched_mm", "eager")
# Steps in which not every request decodes yet, while other prompts are computed.
HEADROOM = 64


def hybrid_config(*, layers: int = 8, hidden: int = 512, experts: int = 32, width: int = 256) -> Qwen3NextConfig:
    """A Qwen3-Next of the given shape, top-4: three layers of linear attention, one of full attention, and so on."""
    heads = hidden // 64
    return Qwen3NextConfig(
        vocab_size=4096,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        head_dim=64,
        intermediate_size=2 * hidden,
        moe_intermediate_size=width,
        shared_expert_intermediate_size=width,
        num_experts=experts,
        num_experts_per_tok=4,
        linear_num_key_heads=max(1, heads // 2),
        linear_num_value_heads=heads,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        max_position_embeddings=8192,
        eos_token_id=None,
        pad_token_id=0,
        layer_types=[("linear" if (i + 1) % 4 else "full") + "_attention" for i in range(layers)],
    )


HYBRID = "qwen3_next, 8 layers, hidden 512"
ATTENTION = "qwen3_moe, 8 layers, hidden 512"
# By name: the model, its cache, and what is aimed at: decoding, and whole requests.
CONTENDERS: dict[str, tuple[PreTrainedConfig, str, tuple[float | None, float | None]]] = {
    HYBRID: (hybrid_config(), "rows", (4.0, 3.5)),
    "qwen3_next, 4 layers, hidden 64": (hybrid_config(layers=4, hidden=64, experts=16, width=32), "rows", (12.0, None)),
    ATTENTION: (random_config(layers=8, hidden=512, experts=32, top_k=4, width=256, heads=8), "pages", (None, None)),
}
THROUGHPUT_ROWS = 2 * len(CONTENDERS)
GENERATE_ROWS = 2 * len(GENERATED)
CACHE_ROWS = len(CONTEXTS) * len(BATCHES)


def batch_checkpoint(config: PreTrainedConfig) -> AbstractContextManager[Path]:
    """A folder with a random model in fp32, whose routing spreads over the experts."""
    return random_checkpoint(config, torch.float32, embedding=1.0)


def measure_throughput(cache_dir: Path, rounds: int, advance: Advance) -> Tables:
    """Tokens a second of 16 requests over one at a time, in engines that differ only in ``max_requests``."""
    rows = []
    for name, (config, cache, aims) in CONTENDERS.items():
        with batch_checkpoint(config) as folder:
            engines = {count: _engine(folder, cache_dir, cache, count, 8 * rounds) for count in (1, MANY)}
            for what, measure, aim in zip(("decoding", "whole requests"), (_decoding, _whole), aims, strict=True):
                rows.append({"model": name, "cache": cache, "what": what, **measure(engines, rounds), "aim": aim})
                advance(1)
            close(engines)
    return {f"tokens/s of {MANY} requests over one at a time; prompts of {PROMPT}, {NEW} new tokens": rows}


def _engine(folder: Path, cache_dir: Path, cache: str, requests: int, steps: int, prompt: int = PROMPT) -> Engine:
    """An engine with a model of its own, and room for ``requests`` with ``steps`` or ``NEW`` new tokens each."""
    room = requests * (prompt + max(steps, NEW) + HEADROOM)
    return open_engine(load_fp32(folder, cache_dir), cache=cache, kv_tokens=room, max_requests=requests)


def _decoding(engines: dict[int, Engine], rounds: int) -> dict[str, Any]:
    steps = 8 * rounds
    runs = {
        str(count): Decoding(engine, random_requests(engine.model, count, PROMPT, steps + HEADROOM))
        for count, engine in engines.items()
    }
    seconds = alternate({count: run.step for count, run in runs.items()}, steps)
    for run in runs.values():
        run.stop()
    alone, together = seconds["1"], seconds[str(MANY)]
    rates = {"1 at a time": 1 / median(alone), f"{MANY} at a time": MANY / median(together), "different": None}
    return rates | ratio_columns([MANY * each for each in alone], together)


def _whole(engines: dict[int, Engine], rounds: int) -> dict[str, Any]:
    alone, together, different = [], [], 0
    for number in range(rounds):
        requests = random_requests(engines[MANY].model, MANY, PROMPT, NEW, seed=1 + number)
        many, few = Served(engines[MANY], requests), Served(engines[1], requests[:ALONE])
        alone.append(few.rate)
        together.append(many.rate)
        different += sum(many.tokens[id] != tokens for id, tokens in few.tokens.items())
    rates = {"1 at a time": median(alone), f"{MANY} at a time": median(together), "different": different}
    return rates | ratio_columns(together, alone)


class _Interleaving(StoppingCriteria):
    """Runs something else after each step of ``generate``; stops nothing.

    Attributes:
        seconds: of the steps of ``generate`` that decode, and of what ran after each.
    """

    def __init__(self, other: Callable[[], object]) -> None:
        self.seconds: dict[str, list[float]] = {"generate": [], "other": []}
        self._other = other
        self._began_s: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        now_s = time.perf_counter()
        if self._began_s is not None:
            self.seconds["generate"].append(now_s - self._began_s)
            self._other()
            self.seconds["other"].append(time.perf_counter() - now_s)
        self._began_s = time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool)


def _generate(model: PreTrainedModel, ids: torch.Tensor, new: int, between: _Interleaving) -> list[list[int]]:
    """The new tokens of each row."""
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "stopping_criteria": [between]}
    found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **settings)
    tokens: list[list[int]] = found[:, ids.shape[1] :].tolist()
    return tokens


def measure_generate(cache_dir: Path, rounds: int, advance: Advance) -> Tables:
    """Decoding steps over those of plain transformers' ``generate`` on the same rows, by the fastest of its experts."""
    rows = []
    for name in (HYBRID, ATTENTION):
        config, cache, _ = CONTENDERS[name]
        with batch_checkpoint(config) as folder:
            plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            for batch in GENERATED:
                engines = {"epslots": _engine(folder, cache_dir, cache, batch, NEW)}
                times = _over_generate(plain, engines["epslots"], batch, rounds)
                rows.append({"model": name, "cache": cache, "batch": batch, **times})
                close(engines)
                advance(1)
            del plain
    return {f"ms of a decoding step over generate's on the same rows; prompts of {PROMPT}, {NEW} new tokens": rows}


def _over_generate(plain: PreTrainedModel, engine: Engine, batch: int, rounds: int) -> dict[str, Any]:
    """Steps of ``generate`` and of the engine in turn."""

    def requests_of(number: int) -> list[Request]:
        return random_requests(plain, batch, PROMPT, NEW + HEADROOM, seed=number)

    fastest = _fastest_experts(plain, torch.tensor([request.prompt for request in requests_of(0)]))
    ours, theirs, different = [], [], 0
    for number in range(max(1, rounds // 2)):
        requests = requests_of(number)
        decoding = Decoding(engine, requests)
        between = _Interleaving(decoding.step)
        tokens = _generate(plain, torch.tensor([request.prompt for request in requests]), NEW, between)
        different += sum(mine[:NEW] != yours for mine, yours in zip(decoding.tokens.values(), tokens, strict=True))
        decoding.stop()
        ours += between.seconds["other"]
        theirs += between.seconds["generate"]
    times = {"epslots": MS * median(ours), "generate": MS * median(theirs), "experts": fastest, "different": different}
    return times | ratio_columns(ours, theirs) | {"aim": 1.05}


def _fastest_experts(plain: PreTrainedModel, ids: torch.Tensor) -> str:
    """Set, and return, the implementation of experts with which the model decodes these rows fastest."""
    speeds: dict[str, float] = {}
    for implementation in IMPLEMENTATIONS:
        plain.set_experts_implementation(implementation)
        between = _Interleaving(lambda: None)
        _generate(plain, ids, 12, between)
        speeds[implementation] = median(between.seconds["generate"])
    fastest = min(speeds, key=lambda implementation: speeds[implementation])
    plain.set_experts_implementation(fastest)
    return fastest


def measure_caches(cache_dir: Path, rounds: int, advance: Advance) -> Tables:
    """Decoding steps with rows over those with pages, of a model that has both: what ``cache="auto"`` goes by."""
    config = random_config(layers=4, hidden=512, experts=32, top_k=4, width=256, heads=8)
    steps, found = 4 * rounds, []
    with batch_checkpoint(config) as folder:
        for context in CONTEXTS:
            prefill_steps = max(BATCHES) * context // 512
            new = len(BATCHES) * (steps + 2) + prefill_steps + HEADROOM
            engines = {kind: _engine(folder, cache_dir, kind, max(BATCHES), new, context) for kind in ("rows", "pages")}
            requests = random_requests(engines["rows"].model, max(BATCHES), context, new)
            runs = {kind: Decoding(engine, requests) for kind, engine in engines.items()}
            for batch in BATCHES:
                for run in runs.values():
                    run.stop(keep=batch)
                candidates = {kind: run.step for kind, run in runs.items()}
                times = compare(candidates, "rows", "pages", steps, MS, "rows / pages")
                found.append({"context": context, "batch": batch, **times})
                advance(1)
            close(engines)
    return {"ms of a decoding step with rows over pages; qwen3_moe, 4 layers, hidden 512": found}
