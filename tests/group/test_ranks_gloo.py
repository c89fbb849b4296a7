"""Ranks as processes on gloo: equal to plain transformers, and to its own expert parallelism; lost ranks are noticed."""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

import epslots
from epslots.errors import PeerLost
from epslots.group.rank_group import group_of
from epslots.runtime import runtime_of
from epslots.transport.torch_transport import TorchTransport
from tests.support import ROOT, zoo
from tests.support.equality import LAYOUTS, greedy
from tests.support.rank_helpers import PATIENCE_S, Rank, free_port, run_ranks, until_stopped

Checkpoints = Callable[[str], Path]
TOLERANCE = 2e-5
SLOTS = (1, "25%", "100%", 5)
LENGTHS = (40, 3, 70, 0)


def load(rank: Rank, folder: Path, cache_dir: Path, **settings: Any) -> PreTrainedModel:
    settings = {"slots": SLOTS[rank.rank], "device": "cpu", "dtype": "float32", "progress": False} | settings
    return epslots.load(folder, cache_dir=cache_dir, **settings)


def prompts_of(rank: int) -> list[torch.Tensor]:
    """Of very different lengths; the fourth rank has no request."""
    length = LENGTHS[rank]
    return [zoo.random_ids(1, n, seed=2 + n % 2) for n in (length, 5 + rank)] if length else []


def answers(model: PreTrainedModel, rank: int) -> list[tuple[torch.Tensor, list[int]]]:
    with torch.no_grad():
        return [(model(input_ids=ids).logits, greedy(model, ids, 3 + rank)) for ids in prompts_of(rank)]


def serve(rank: Rank, folders: list[Path], cache_dir: Path) -> list[Any]:
    transport = rank.transport() if rank.size > 1 else None
    found = []
    for folder in folders:
        model = load(rank, folder, cache_dir, group=transport)
        with epslots.sync_ranks(model):
            found.append(answers(model, rank.rank))
        runtime_of(model).check_integrity()
        assert (group_of(model) is None) == (rank.size == 1)
    return found


def assert_served(folders: list[Path], results: list[list[Any]]) -> None:
    for number, folder in enumerate(folders):
        reference = zoo.reference(folder)
        for rank, found in enumerate(results):
            for (logits, tokens), (expected, expected_tokens) in zip(found[number], answers(reference, rank), strict=True):
                assert (logits - expected).abs().max() <= TOLERANCE * expected.abs().max(), (folder.name, rank)
                assert tokens == expected_tokens, (folder.name, rank)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_any_number_of_ranks(size: int, checkpoint: Checkpoints, cache_dir: Path):
    folders = [checkpoint(name) for name in ("qwen3_moe", "gpt_oss", "deepseek_v3")]
    assert_served(folders, run_ranks(serve, size, folders, cache_dir))


def test_every_layout_on_two_ranks(checkpoint: Checkpoints, cache_dir: Path):
    folders = [checkpoint(name) for name in LAYOUTS]
    assert_served(folders, run_ranks(serve, 2, folders, cache_dir))


def generate_synced(rank: Rank, folder: Path, cache_dir: Path) -> list[int]:
    model = load(rank, folder, cache_dir, group=rank.transport())
    ids = zoo.random_ids(1, 5 + 20 * rank.rank, seed=3)
    settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(ids, max_new_tokens=3 + 6 * rank.rank, synced_gpus=True, **settings)[0].tolist()


def test_generate_with_synced_gpus(checkpoint: Checkpoints, cache_dir: Path):
    """transformers' own way to keep ranks in step: those that are done go on with tokens that are thrown away."""
    folder = checkpoint("qwen3_moe")
    reference = zoo.reference(folder)
    for rank, tokens in enumerate(run_ranks(generate_synced, 2, folder, cache_dir)):
        ids = zoo.random_ids(1, 5 + 20 * rank, seed=3)
        assert tokens == greedy(reference, ids, 3 + 6 * rank)


def plain_expert_parallel(rank: Rank, folder: Path) -> torch.Tensor:
    """transformers' static expert parallelism, every rank with the same batch."""
    torch.distributed.init_process_group("gloo", store=rank.store(), rank=rank.rank, world_size=rank.size)
    os.environ |= {"RANK": str(rank.rank), "WORLD_SIZE": str(rank.size), "LOCAL_RANK": str(rank.rank)}
    config = transformers.distributed.DistributedConfig(tp_size=2, ep_size=2)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, distributed_config=config, experts_implementation="grouped_mm"
    )
    experts = [module for name, module in model.named_modules() if name.endswith("mlp.experts")]
    assert all(module._is_expert_parallel and module.num_experts == 8 for module in experts), "each rank has half of them"
    with torch.no_grad():
        return model.eval()(input_ids=zoo.random_ids(2, 30, seed=1)).logits


def ours_on_one_batch(rank: Rank, folder: Path, cache_dir: Path) -> torch.Tensor:
    model = load(rank, folder, cache_dir, group=rank.transport(), slots=4)
    with torch.no_grad():
        return model(input_ids=zoo.random_ids(2, 30, seed=1)).logits


def test_equal_to_transformers_own_expert_parallelism(checkpoint: Checkpoints, cache_dir: Path):
    folder = checkpoint("qwen3_moe")
    theirs = run_ranks(plain_expert_parallel, 2, folder)
    for ours, other in zip(run_ranks(ours_on_one_batch, 2, folder, cache_dir), theirs, strict=True):
        assert (ours - other).abs().max() <= TOLERANCE * other.abs().max()


def lose_one(rank: Rank, folder: Path, cache_dir: Path, how: str) -> tuple[str, torch.Tensor] | None:
    """The last rank dies or stops in the middle of a layer; the others re-form in place, retry, and go on."""
    transport = rank.transport()
    pid = int(transport.gather_bytes(str(os.getpid()).encode())[-1])
    model = load(rank, folder, cache_dir, group=transport, slots=4)
    ids = zoo.random_ids(1, 9, seed=1 + rank.rank)
    model(input_ids=ids)
    last = rank.size - 1
    if rank.rank == last:
        kill = signal.SIGKILL if how == "killed" else signal.SIGSTOP
        model.model.layers[1].register_forward_pre_hook(lambda *_: os.kill(os.getpid(), kill))
    if how == "stopped":
        threading.Thread(target=end_deadline, args=(transport, pid), daemon=True).start()
    with pytest.raises(PeerLost) as caught:
        model(input_ids=ids)
    transport = rank.transport(epoch=1, size=last)
    epslots.group.join.join(model, transport, settings={})
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    runtime_of(model).check_integrity()
    return str(caught.value), logits


def end_deadline(transport: TorchTransport, pid: int) -> None:
    """The deadline passes when the process is stopped: no rank that is only slow misses it."""
    until_stopped(pid)
    transport.deadline_s = 0.1


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_lost_process_is_noticed_and_the_others_go_on(how: str, checkpoint: Checkpoints, cache_dir: Path):
    folder = checkpoint("qwen3_moe")
    results = run_ranks(lose_one, 3, folder, cache_dir, how, may_die=[2])
    reference = zoo.reference(folder)
    for rank, (message, logits) in enumerate(results[:2]):
        assert "epoch 0" in message
        with torch.no_grad():
            expected = reference(input_ids=zoo.random_ids(1, 9, seed=1 + rank)).logits
        assert (logits - expected).abs().max() <= TOLERANCE * expected.abs().max()


def fail_once(rank: Rank, folder: Path, cache_dir: Path) -> str:
    """Rank 0's second pass fails in its second layer, and its user calls again."""
    model = load(rank, folder, cache_dir, group=rank.transport(), slots=4, deadline_s=2 * PATIENCE_S)
    ids = zoo.random_ids(1, 9, seed=1)
    model(input_ids=ids)
    if rank.rank == 0:

        def fail(*_: object) -> None:
            raise ZeroDivisionError

        handle = model.model.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(ZeroDivisionError):
            model(input_ids=ids)
        handle.remove()
    with pytest.raises(PeerLost) as caught:
        model(input_ids=ids)
    return str(caught.value)


def test_an_error_on_one_rank_ends_the_step_of_all_at_once(checkpoint: Checkpoints, cache_dir: Path):
    first, _ = run_ranks(fail_once, 2, checkpoint("qwen3_moe"), cache_dir)
    assert "ZeroDivisionError" in first


def fail_to_load(rank: Rank, folders: list[Path], cache_dir: Path) -> str:
    with pytest.raises(epslots.EpslotsError) as caught:
        load(rank, folders[rank.rank], cache_dir, group=rank.transport())
    return str(caught.value)


def test_a_rank_that_cannot_load_says_why_on_all(checkpoint: Checkpoints, cache_dir: Path, tmp_path: Path):
    missing = tmp_path / "nothing here"
    waiting, failing = run_ranks(fail_to_load, 2, [checkpoint("mixtral"), missing], cache_dir)
    assert "nothing here" in failing
    assert "rank 1 could not load" in waiting and "nothing here" in waiting


def run_example(rank: Rank, port: int) -> str:
    """examples/many_ranks.py as a main module, in the environment that torchrun gives it; what it printed."""
    os.environ |= {"RANK": str(rank.rank), "WORLD_SIZE": str(rank.size), "LOCAL_RANK": str(rank.rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.argv = ["many_ranks.py", "--new-tokens", "3"]
    with redirect_stdout(StringIO()) as printed:
        runpy.run_path(str(ROOT / "examples" / "many_ranks.py"), run_name="__main__")
    return printed.getvalue()


def test_the_example_in_torchruns_environment():
    """The entry that users have: the environment alone makes two processes one model."""
    printed = run_ranks(run_example, 2, free_port())
    for rank in range(2):
        assert f"--- rank {rank}\n" in printed[rank] and f"--- rank {rank}: " in printed[rank]
        assert "pairs computed by other ranks" in printed[rank]
        assert " 0 (token, k) pairs" not in printed[rank]
