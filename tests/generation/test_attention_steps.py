"""Attention modules of decoding steps are one compiled call, to the bits of their own forward passes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules import module as hooks
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedConfig, PreTrainedModel, Qwen2MoeConfig, Qwen3MoeConfig

import epslots
from epslots.generation.attention_steps import AttentionStep, attention_step_of
from epslots.generation.requests import Request
from epslots.generation.row_batcher import RowBatcher
from epslots.generation.row_layers import PooledTokens
from epslots.generation.single_queries import SingleQueries
from epslots.models.dense_linear import is_plain_linear, read_in_place
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


def plain(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of transformers."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(MODELS[name](), dtype=dtype).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0.1, 0.3)
    return model


def build(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model as ``epslots.load`` leaves its dense part on a CPU."""
    model = plain(name, dtype)
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


def logits_of(model: PreTrainedModel, **settings: Any) -> list[torch.Tensor]:
    """The logits of each pass of a batcher that serves the requests."""
    found: list[torch.Tensor] = []
    hook = model.get_output_embeddings().register_forward_hook(lambda _, __, out: found.append(out.clone()))
    batcher = RowBatcher(model, **({"kv_tokens": 64, "max_requests": 3} | settings))
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
    wanted = logits_of(model)
    assert made >= 2 * 5 and steps.made == 0 and len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.isfinite(ours).all() and torch.equal(ours, theirs)


def test_steps_read_cells_in_slots_of_experts(tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch):
    """With ``kv_tokens="auto"`` a layer's cells lie apart: other tensors' entries are between them."""
    plain("normed").save_pretrained(tmp_path)
    auto: dict[str, Any] = {"kv_tokens": "auto", "max_batch_tokens": 16, "max_requests": 3}
    model = epslots.load(tmp_path, cache_dir=cache_dir, slots="75%", device="cpu", dtype="float32", progress=False, **auto)
    taken, original = [], cell_loops.fits
    monkeypatch.setattr(cell_loops, "fits", lambda *given: taken.append(original(*given)) or taken[-1])
    steps = Steps(monkeypatch)
    found, made = logits_of(model, **auto), steps.made
    assert made >= 2 * 5 and taken and all(taken)
    monkeypatch.setattr(AttentionStep, "_attend", lambda *_: None)
    monkeypatch.setattr(cell_loops, "fits", lambda *_: False)
    wanted = logits_of(model, **auto)
    assert len(found) == len(wanted) and all(map(torch.equal, found, wanted))


@torch.no_grad()
def test_a_step_looks_at_its_modules():
    """Hooks are called, and what was changed since is used: a weight, a module, or a module's forward pass."""
    attention, hidden = build("normed").model.layers[0].self_attn, torch.zeros(3, 1, 64)
    step = attention_step_of(attention)
    first = step.weights_for(hidden)
    assert first is not None and step.weights_for(hidden) is first
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"):
        module = getattr(attention, name)
        for register in (module.register_forward_hook, module.register_forward_pre_hook):
            hook = register(lambda *_: None)
            assert step.weights_for(hidden) is None
            hook.remove()
        module.forward, forward = (lambda rows: rows), module.forward
        assert step.weights_for(hidden) is None
        module.forward = forward
        found = step.weights_for(hidden)
        module.weight = torch.nn.Parameter(module.weight.clone())
        again = step.weights_for(hidden)
        assert again is not None and again is not found
    attention.q_proj = torch.nn.Linear(64, 128, bias=False)
    assert step.weights_for(hidden) is None


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
    pools = torch.randn(9, 40).as_strided((9, 2, 12), (40, 12, 1)), torch.randn(9, 1, 4)
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
    assert cell_loops.fits(pool[::2], new, cells)
    strange = (pool.double(), new, cells), (pool[:, :1], new, cells), (pool, new.mT, cells), (pool, new[0], cells)
    for given in (*strange, (pool, new, cells.long()), (pool, new, cells[::2])):
        assert not cell_loops.fits(*given)
    for lies in (pool[:1].expand(9, 2, 4), torch.zeros(9, 4, 4)[:, ::2], torch.zeros(9, 2, 8)[:, :, ::2]):
        assert lies.shape == pool.shape and not cell_loops.fits(lies, new, cells)


@torch.no_grad()
def test_a_step_looks_at_all_shapes():
    """Matrices and norms that were swapped for others, or for other views of their memory: none is read past its end."""
    attention, hidden = build("normed").model.layers[0].self_attn, torch.zeros(3, 1, 64)
    step = attention_step_of(attention)
    for name, wide in (
        ("q_proj", (160, 64)),
        ("k_proj", (128, 64)),
        ("v_proj", (32, 64)),
        ("o_proj", (64, 160)),
        ("o_proj", (96, 128)),
    ):
        module, (rows, columns) = getattr(attention, name), wide
        weight = module.weight
        for strange in (torch.randn(wide), torch.randn(rows, 2 * columns), torch.randn(2 * columns, rows)):
            assert step.weights_for(hidden) is not None
            module.weight = torch.nn.Parameter(strange)
            assert step.weights_for(hidden) is None
            module.weight = weight
    for norm in (attention.q_norm, attention.k_norm):
        numbers, weight = torch.randn(64), norm.weight.data
        for strange in (numbers[:16], numbers, numbers[::2]):
            norm.weight.data = numbers[:32]
            assert step.weights_for(hidden) is not None
            norm.weight.data = strange
            assert step.weights_for(hidden) is None
        norm.weight.data = weight
    attention.k_proj.weight.data, attention.v_proj.weight.data = torch.randn(128, 64), torch.randn(128, 64)
    attention.scaling = 2.0
    shape, _ = step.weights_for(hidden)
    assert (shape.groups, shape.scale) == (4, 2.0)
    del attention.k_proj
    assert step.weights_for(hidden) is None


class _Doubles(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


@torch.no_grad()
def test_computed_weights_and_hooks_of_all_modules():
    """A weight that is computed at each use has no place of its own; and hooks see each module."""
    attention, hidden = build("normed").model.layers[0].self_attn, torch.zeros(3, 1, 64)
    step = attention_step_of(attention)
    for name in ("q_proj", "o_proj", "k_norm"):
        assert step.weights_for(hidden) is not None
        module = getattr(attention, name)
        parametrize.register_parametrization(module, "weight", _Doubles())
        assert step.weights_for(hidden) is None and attention_step_of(attention).weights_for(hidden) is None
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
    for register in (hooks.register_module_forward_hook, hooks.register_module_forward_pre_hook):
        assert step.weights_for(hidden) is not None
        hook = register(lambda *_: None)
        assert step.weights_for(hidden) is None and not is_plain_linear(attention.q_proj)
        hook.remove()
    assert is_plain_linear(attention.q_proj)


class _SharedStep(AttentionStep):
    """Whenever it has noted something, its weights are asked for as by another thread."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if hidden := self.__dict__.pop("hidden", None):
            self.__dict__["seen"] = self.weights_for(*hidden)


@torch.no_grad()
def test_threads_never_get_the_weights_before():
    attention, hidden = build("normed").model.layers[0].self_attn, torch.zeros(3, 1, 64)
    step = _SharedStep(attention, normed=True)
    before = step.weights_for(hidden)
    attention.q_proj.weight = torch.nn.Parameter(attention.q_proj.weight.clone())
    step.__dict__["hidden"] = (hidden,)
    after = step.weights_for(hidden)
    assert None not in (before, after) and before is not after and step.__dict__["seen"] is not before


@pytest.mark.parametrize("settings", [{}, {"softcap": 30.0}, {"position_bias": torch.zeros(1)}, {"dropout": 0.1}], ids=str)
def test_settings_that_loops_ignore_are_torchs(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    attention, layer = build("normed").model.layers[0].self_attn, PooledTokens()
    layer.step = SimpleNamespace(width=1)  # type: ignore[assignment]
    attention.forward, seen = (lambda *_, **given: given), torch.zeros(1)
    step = AttentionStep(attention, normed=True)
    monkeypatch.setattr(AttentionStep, "_attend", lambda *_: seen)
    found = step(torch.zeros(1, 1, 64), None, None, SimpleNamespace(layers=[layer]), **settings)
    assert found == settings if settings else found[0] is seen


def test_a_wrapped_forward_is_called():
    """Whether it was wrapped before the engine was made or after; or taken away."""
    model = build("normed")
    first, second = (layer.self_attn for layer in model.model.layers)
    queries, own = SingleQueries(model), first.forward
    for wrapped in (lambda *given, **named: own(*given, **named), None):
        first.forward = wrapped
        if wrapped is None:
            del first.forward
        before = vars(first).get("forward")
        with queries.active():
            assert vars(first).get("forward") is before and isinstance(second.forward, AttentionStep)
        assert vars(first).get("forward") is before and not isinstance(second.forward, AttentionStep)
        assert attention_step_of(first) is None and attention_step_of(second) is not None
