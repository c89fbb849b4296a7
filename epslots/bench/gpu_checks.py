"""``bench gpu``: whether the device computes what the CPU does, and takes the ways that it is meant to."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import epslots
from epslots.bench.engines import Served, open_engine, random_prompt
from epslots.bench.gpu_kit import GpuKit
from epslots.bench.models import random_checkpoint, random_config
from epslots.bench.report import Tables
from epslots.device_copy import kernels_read_uploads
from epslots.generation.requests import Request
from epslots.runtime import runtime_of

ALLOWED = 1e-4  # of the logits' scale, in fp32
REQUESTS, PROMPT, NEW_TOKENS = 4, 24, 12
_TESTS = Path(epslots.__file__).parents[1] / "tests" / "gpu"


def check(kit: GpuKit) -> None:
    """The kit's own checks."""
    kit.step("checks", 60, lambda: _checks(kit))


def run_tests(kit: GpuKit) -> None:
    """The repository's tests, where this is a checkout: in the time that is left, so they come last."""
    if _TESTS.is_dir():
        kit.step("tests/gpu", 60, lambda: _run_tests(kit.left_s - 10), gpu_only=True)


def _checks(kit: GpuKit) -> Tables:
    config = random_config(layers=3, hidden=64, experts=16, top_k=4, width=32, vocab=320, heads=4)
    rows: list[dict[str, Any]] = []
    with random_checkpoint(config, torch.float32) as folder, _exact_products(), torch.no_grad():
        plain = kit.plain(folder, kit.device)
        ids = torch.tensor([random_prompt(plain, PROMPT, seed) for seed in range(2)]).to(kit.device)
        expected, tokens = plain(input_ids=ids).logits, _tokens(plain, kit.device)
        for slots in (1, "25%", "100%"):
            model = kit.load(folder, slots=slots, device=kit.device, dtype="float32", cache_dir=kit.cache_dir, progress=False)
            found = model(input_ids=ids).logits
            error = float((found - expected).abs().max() / expected.abs().max())
            rows.append(_row(f"logits with {slots} slots, of their scale", error, f"<= {ALLOWED:g}", error <= ALLOWED))
            engine = open_engine(model, max_requests=REQUESTS)
            served = Served(engine, _requests(plain)).tokens
            engine.batcher.close()
            same = sum(served[str(number)] == tokens[number] for number in range(REQUESTS))
            rows.append(_row(f"requests with {slots} slots that equal generate", same, f"{REQUESTS}", same == REQUESTS))
            runtime_of(model).check_integrity()
            if kit.on_gpu:
                pinned = runtime_of(model).store.pinned
                rows.append(_row("host store is pinned", pinned, "True", pinned))
            del model
    if kit.on_gpu:
        by_kernel = kernels_read_uploads(kit.device)
        rows.append(_row("small uploads pass expert copies", by_kernel, "True", by_kernel))
    kit.facts["checks right"] = all(row["right"] for row in rows)
    return {"checks": rows}


def _row(check: str, found: object, allowed: str, right: bool) -> dict[str, Any]:
    return {"check": check, "found": found, "allowed": allowed, "right": right}


@contextmanager
def _exact_products() -> Iterator[None]:
    """Within the context fp32 products are made without TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _requests(model: PreTrainedModel) -> list[Request]:
    return [Request(str(number), random_prompt(model, PROMPT + number, number), NEW_TOKENS) for number in range(REQUESTS)]


def _tokens(model: PreTrainedModel, device: torch.device) -> list[list[int]]:
    """Plain transformers' tokens for each request alone."""
    found = []
    for request in _requests(model):
        ids = torch.tensor([request.prompt]).to(device)
        settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        output = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        found.append(output[0, ids.shape[1] :].tolist())
    return found


def _run_tests(limit_s: float) -> Tables:
    """``tests/gpu``, in a process of its own.

    Raises:
        RuntimeError: a test failed, or not all have ended in time.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(_TESTS)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, cwd=_TESTS.parents[1], check=False)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"the tests didn't end within {limit_s:.0f} s") from error
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    summary = lines[-1] if lines else done.stderr.strip()[-300:]
    if done.returncode:
        failures = [line for line in lines if line.startswith(("FAILED", "ERROR", "E  "))]
        raise RuntimeError(" | ".join([*failures[:5], summary]))
    return {"tests/gpu": [{"result": summary}]}
