"""Attention modules of decoding steps are one compiled call, to the bits of their own forward passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedConfig, PreTrainedModel, Qwen2MoeConfig, Qwen3MoeConfig

from epslots.generation.attention_steps import AttentionStep, attention_step_of
from epslots.generation.requests import Request
from epslots.generation.row_batcher import RowBatcher
from epslots.models.dense_linear import read_in_place
from epslots.models.dense_norm import norm_in_place
from epslots.models.dense_rotation import rotate_in_place
from epslots.moe import cell_loops
from tests.support import zoo
from tests.support.batches import Collected, prompt_of

TINY = {
    "vocab_size": 384,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 2,
}
# With norms of heads; with a window shorter than the prompts; with biases; with one head of keys.
MODELS: dict[str, Callable[[], PreTrainedConfig]] = {
    "normed": lambda: Qwen3MoeConfig(**TINY, num_experts=4),
    "windowed": lambda: MixtralConfig(**TINY, num_local_experts=4, sliding_window=6),
    "biased": lambda: Qwen2MoeConfig(**TINY, num_experts=4, shared_expert_intermediate_size=32),
    "grouped": lambda: Qwen3MoeConfig(**(TINY | {"num_key_value_heads": 1}), num_experts=4, attention_bias=True),
}
REQUESTS = [Request(str(number), prompt_of(length, seed=number), 6) for number, length in enumerate((9, 3, 9))]


def build(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model as ``epslots.load`` leaves its dense part on a CPU."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(MODELS[name](), dtype=dtype).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0.1, 0.3)
    read_in_place(model, batch_invariant=False)
    norm_in_place(model)
    rotate_in_place(model)
    return model


class Steps:
    """Counts the calls that loops have computed."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.made = 0
        original = AttentionStep._attend

        def count(*given: Any) -> torch.Tensor | None:
            found = original(*given)
            self.made += found is not None
            return found

        patch.setattr(AttentionStep, "_attend", count)


def logits_of(model: PreTrainedModel) -> list[torch.Tensor]:
    """The logits of each pass of a batcher that serves the requests."""
    found: list[torch.Tensor] = []
    hook = model.get_output_embeddings().register_forward_hook(lambda _, __, out: found.append(out.clone()))
    batcher = RowBatcher(model, kv_tokens=64, max_requests=3)
    for request in REQUESTS:
        batcher.add(request)
    collected = Collected(batcher).run()
    assert {len(tokens) for tokens in collected.tokens.values()} == {6}
    batcher.close()
    hook.remove()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_steps_have_the_bits_of_forward_passes(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """Of rows of equal lengths and of others; cells too, read and written by torch."""
    model, steps = build(name, dtype), Steps(monkeypatch)
    found = logits_of(model)
    made, steps.made = steps.made, 0
    monkeypatch.setattr(AttentionStep, "_attend", lambda *_: None)
    monkeypatch.setattr(cell_loops, "fits", lambda *_: False)
    plain = logits_of(model)
    assert made >= 2 * 5 and steps.made == 0 and len(found) == len(plain)
    for ours, theirs in zip(found, plain, strict=True):
        assert torch.isfinite(ours).all() and torch.equal(ours, theirs)


@torch.no_grad()
def test_a_step_looks_at_its_modules():
    """Hooks are called, and what was changed since is used: a weight, a module, or a module's forward pass."""
    attention, hidden = build("normed").model.layers[0].self_attn, torch.zeros(3, 1, 64)
    step = attention_step_of(attention)
    first = step._weights(hidden)
    assert first is not None and step._weights(hidden) is first
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"):
        module = getattr(attention, name)
        for register in (module.register_forward_hook, module.register_forward_pre_hook):
            hook = register(lambda *_: None)
            assert step._weights(hidden) is None
            hook.remove()
        module.forward, forward = (lambda rows: rows), module.forward
        assert step._weights(hidden) is None
        module.forward = forward
        found = step._weights(hidden)
        module.weight = torch.nn.Parameter(module.weight.clone())
        again = step._weights(hidden)
        assert again is not None and again is not found
    attention.q_proj = torch.nn.Linear(64, 128, bias=False)
    assert step._weights(hidden) is None


def test_changed_weights_are_computed_with(monkeypatch: pytest.MonkeyPatch):
    model, steps = build("normed"), Steps(monkeypatch)
    before, whole = logits_of(model), steps.made
    attention = model.model.layers[0].self_attn
    attention.v_proj.weight = torch.nn.Parameter(2 * attention.v_proj.weight)
    changed = logits_of(model)
    assert steps.made == 2 * whole and not torch.equal(changed[-1], before[-1])
    monkeypatch.setattr(AttentionStep, "_attend", lambda *_: None)
    assert all(map(torch.equal, logits_of(model), changed))


def test_other_attention_keeps_its_forward():
    """Of other code (OLMoE's clips numbers), or of models that weren't loaded for a CPU."""
    for model, count in ((build("normed"), 2), (zoo.ZOO["qwen3_moe"].build(), 0)):
        steps = [attention_step_of(layer.self_attn) for layer in model.model.layers]
        assert sum(step is not None for step in steps) == count
    other = zoo.ZOO["olmoe"].build()
    read_in_place(other, batch_invariant=False)
    assert [attention_step_of(module) for module in other.modules() if attention_step_of(module)] == []


@torch.no_grad()
def test_cells_are_written_and_read(monkeypatch: pytest.MonkeyPatch):
    """Also in several tasks, whose threads read what has just been written, of keys that are wider than values."""
    monkeypatch.setattr(cell_loops, "_TASK_BYTES", 256)
    torch.set_num_threads(2)
    pools = torch.randn(9, 2, 12), torch.randn(9, 1, 4)
    new = torch.randn(3, 2, 2, 24).narrow(3, 5, 12), torch.randn(3, 2, 4).unsqueeze(1)
    new_cells, read_cells = (
        torch.tensor([8, 1, 3, 4, 5, 6]),
        torch.tensor([[0, 8, 1], [2, 3, 4], [7, 5, 6]], dtype=torch.int32),
    )
    wanted = []
    for pool, states in zip(pools, new, strict=True):
        assert cell_loops.fits(pool, states, read_cells.flatten())
        copy = pool.clone()
        copy[new_cells] = states.transpose(1, 2).flatten(0, 1)
        wanted.append(copy)
    found = cell_loops.append(pools, new, new_cells, read_cells.flatten())
    torch.set_num_threads(1)
    for pool, expected, read in zip(pools, wanted, found, strict=True):
        assert torch.equal(pool, expected) and torch.equal(read, expected[read_cells.long()].transpose(1, 2))


@torch.no_grad()
def test_cells_of_other_kinds_are_torchs():
    pool, new, cells = torch.zeros(9, 2, 4), torch.zeros(3, 2, 1, 4), torch.zeros(6, dtype=torch.int32)
    assert cell_loops.fits(pool, new, cells)
    strange = (pool.double(), new, cells), (pool[:, :1], new, cells), (pool, new.mT, cells), (pool, new[0], cells)
    for given in (*strange, (pool, new, cells.long()), (pool, new, cells[::2]), (pool.expand(9, 2, 4)[::2], new, cells)):
        assert not cell_loops.fits(*given)
