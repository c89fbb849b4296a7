"""Packed experts in whole models. How many fit; the shipped model's loss and hits when it is quantised."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
from transformers import PreTrainedModel

import epslots
from epslots.bench.models import PROMPTS
from epslots.bench.predict import next_token_loss, windows_of
from epslots.bench.report import Tables, median
from epslots.example import example_model
from epslots.example_text import library_texts
from epslots.formats.quantise import QUANTISED
from epslots.formats.usual_forms import USUAL_FORMS
from epslots.generation.text import load_tokenizer
from epslots.models.known_shapes import known_model
from epslots.models.memory_plan import PlannedDevice, plan_memory
from epslots.models.slot_format import SlotFormat, quantised_slots, stored_slots
from epslots.progress import Advance
from epslots.runtime import runtime_of
from epslots.units import parse_slots

LARGE_MODELS = ("qwen3-235b-a22b", "deepseek-v3", "kimi-k2", "gpt-oss-120b")
EXPERT_FORMATS = {"bf16": None, "int8": "int8", "int4": "int4"}
# As experts are quantised while loading, or as checkpoints store them.
SLOT_FORMATS: dict[str, Callable[..., SlotFormat] | None] = {
    "bf16": None,
    **{f"--expert-format {name}": partial(quantised_slots, name) for name in QUANTISED},
    **{f"stored: {name}": partial(stored_slots, name) for name in USUAL_FORMS},
}
POOL = "24GiB"
LINKS = (None, "1GB/s,20us")
HELD_TOKENS, NEW_TOKENS = 16_384, 64
_UNBOUNDED = 2**50


def measure_memory(advance: Advance) -> Tables:
    """Bytes of a slot and the experts that 24 GiB of slots hold, by model and format. Experts of all layers, as planned."""
    rows = []
    for name in LARGE_MODELS:
        experts = None
        for label, formed in SLOT_FORMATS.items():
            shape, skeleton = known_model(name)
            if formed is not None:
                shape = msgspec.structs.replace(shape, layers=formed(skeleton, shape.layers).layers)
            plan = plan_memory(shape, parse_slots(POOL), PlannedDevice(kind="cuda", memory_bytes=_UNBOUNDED))
            slots = sum(plan.quotas)
            experts = experts or slots
            row = {"model": name, "format": label, "MiB a slot": shape.layers[0].layout.nbytes / 2**20}
            rows.append(
                row | {f"slots in {POOL}": slots, "of all experts": slots / shape.num_experts, "over bf16": slots / experts}
            )
            advance(1)
    return {f"experts that {POOL} of slots hold": rows}


def measure_quality(cache_dir: Path, rounds: int, advance: Advance) -> Tables:
    """The shipped model in each format, with the slot memory of a quarter of its experts in bf16.

    Greedy text after four prompts, which each format writes by itself: after quantising it is another text. Hits count the
    first round. Loss is of held-out text.
    """
    quarter = _load(cache_dir, "25%")
    pool = f"{runtime_of(quarter).plan.slot_bytes}B"
    held_SW = windows_of(quarter, library_texts(held_out=True), HELD_TOKENS)
    rows = []
    for label, expert_format in EXPERT_FORMATS.items():
        settings = {} if expert_format is None else {"expert_format": expert_format}
        for link in LINKS:
            model = _load(cache_dir, pool, link=link, **settings)
            row: dict[str, Any] = {"format": label, "link": link or "none", "slots a layer": runtime_of(model).plan.quotas[0]}
            rows.append(row | _generate(model, rounds))
            advance(1)
        loss, _ = next_token_loss(model, held_SW, lambda count: None)
        for row in rows[-len(LINKS) :]:
            row["loss, nats"] = loss
    return {f"the shipped model in bf16 with {pool} of slots": rows}


def _load(cache_dir: Path, slots: str, **settings: Any) -> PreTrainedModel:
    fixed: Mapping[str, Any] = {"device": "cpu", "dtype": "bfloat16", "progress": False, "cache_dir": cache_dir}
    return epslots.load(example_model(), slots=slots, **fixed, **settings)


def _generate(model: PreTrainedModel, rounds: int) -> dict[str, float]:
    """Hit rate and share of zero-miss steps of the first round, and tokens a second of all."""
    tokenizer = load_tokenizer(example_model())
    rates: list[float] = []
    found: dict[str, float] = {}
    for number in range(rounds):
        for prompt in PROMPTS:
            inputs = tokenizer(prompt, return_tensors="pt")
            began = time.perf_counter()
            with torch.no_grad():
                model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
            rates.append(NEW_TOKENS / (time.perf_counter() - began))
        if number == 0:
            stats = epslots.stats(model)
            found = {"hit rate": stats.hit_rate, "zero-miss steps": stats.zero_miss_share}
    return found | {"tokens/s": median(rates)}
