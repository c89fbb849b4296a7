"""Attention on latents equals plain transformers, computed either way, and leaves the model as it was."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import epslots
from epslots.generation import absorbed_attention
from epslots.generation.absorbed_attention import IMPLEMENTATION, AbsorbedAttention, Sizes, latent_attentions
from tests.support.more_models import LATENTS
from tests.support.zoo import STRESSED, ZOO, random_ids

TOLERANCE = 1e-4
OF_THE_ZOO = {"deepseek_v2", "deepseek_v3", "kimi", "longcat_flash", "kimi_linear", "bailing_hybrid", "glm_moe_dsa"}
OF_THE_ZOO |= {"deepseek_v32", "hy_v4", "dots3_note", "axk2"}
MODELS = LATENTS | {name: tiny for name, tiny in (ZOO | STRESSED).items() if name in OF_THE_ZOO}
# Longer and shorter than windows of 16 tokens, and than the 8 or 16 tokens that indexers select.
LENGTHS = (23, 3, 37)
STEPS = 4
DEEPSEEK_V3 = Sizes(latent=512, nope=128, rotary=64, value=128)
WAYS = ("as counted", "absorbed", "expanded", "in parts")


@cache
def built(name: str) -> PreTrainedModel:
    return MODELS[name].build()


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How latents are attended to: as the count of multiplications decides, by either way, or a head at a time."""
    if request.param in ("absorbed", "expanded"):
        monkeypatch.setattr(Sizes, "absorbs", lambda self, queries, keys: request.param == "absorbed")
    if request.param == "in parts":
        monkeypatch.setattr(absorbed_attention, "PART_NUMBERS", 1)
    return str(request.param)


@torch.no_grad()
def logits_alone(model: PreTrainedModel, ids: torch.Tensor, last: int) -> torch.Tensor:
    """Plain transformers' logits of a sequence's last tokens, [last, V]."""
    return model(input_ids=ids[None]).logits[0, -last:]


@cache
def sequences(name: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Sequences of unequal lengths, with the logits of their last prompt token and of each step."""
    ids = [random_ids(length=length + STEPS, seed=length)[0] for length in LENGTHS]
    return [(row, logits_alone(built(name), row, STEPS + 1)) for row in ids]


@torch.no_grad()
def forward(model: PreTrainedModel, ids: torch.Tensor, lengths: torch.Tensor, past: Any) -> torch.Tensor:
    """Logits [B, T, V] of rows that are aligned at their last tokens, and have ``lengths`` tokens after this pass."""
    total = past.get_seq_length() + ids.shape[1]
    mask = torch.arange(-total, 0) >= -lengths[:, None]
    positions = (lengths[:, None] + torch.arange(-ids.shape[1], 0)).clamp(min=0)
    return model(
        input_ids=ids, attention_mask=mask.long(), position_ids=positions, past_key_values=past, use_cache=True
    ).logits


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("name", sorted(MODELS))
def test_steps_of_rows_of_unequal_length_equal_plain(name: str, way: str):
    """Prompts of all rows in one padded pass, then steps of a token."""
    model, rows = built(name), sequences(name)
    lengths, past = torch.tensor(LENGTHS), DynamicCache(config=model.config)
    prompts = nn.utils.rnn.pad_sequence([ids[:-STEPS] for ids, _ in rows], batch_first=True, padding_side="left")
    with AbsorbedAttention(model).active():
        found = [forward(model, prompts, lengths, past)[:, -1]]
        for step in range(STEPS):
            tokens = torch.stack([ids[step - STEPS] for ids, _ in rows])[:, None]
            found.append(forward(model, tokens, lengths + step + 1, past)[:, -1])
    for row, (_, expected) in enumerate(rows):
        assert_close(torch.stack([logits[row] for logits in found]), expected)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_chunks_after_a_past_equal_plain(name: str, way: str):
    model, (ids, _) = built(name), sequences(name)[2]
    expected, past = logits_alone(model, ids, len(ids)), DynamicCache(config=model.config)
    attention, found = AbsorbedAttention(model), []
    for chunk in ids.split((13, 1, 9, 18)):
        with attention.active():
            length = torch.tensor([past.get_seq_length() + len(chunk)])
            found.append(forward(model, chunk[None], length, past)[0])
    assert_close(torch.cat(found), expected)


@pytest.mark.parametrize("name", ["deepseek_v3", "glm_moe_dsa"])
def test_eager_masks_and_static_caches_equal_plain(name: str, way: str):
    """A static cache is longer than its tokens: the mask tells."""
    model, (ids, expected) = copy.deepcopy(built(name)), sequences(name)[0]
    model.set_attn_implementation("eager")
    past = StaticCache(config=model.config, max_cache_len=48)
    found = []
    with AbsorbedAttention(model).active(), torch.no_grad():
        for start, end in ((0, 23), (23, 24), (24, 25), (25, 26), (26, 27)):
            found.append(
                model(
                    input_ids=ids[None, start:end],
                    position_ids=torch.arange(start, end)[None],
                    past_key_values=past,
                    use_cache=True,
                ).logits[0, -1]
            )
    assert_close(torch.stack(found), expected)


def test_low_precision_is_no_worse_than_plain():
    """In bfloat16: the softmax is in fp32, all else in the model's dtype, as in plain transformers."""
    model, half = built("deepseek_v3"), copy.deepcopy(built("deepseek_v3")).to(torch.bfloat16)
    module = half.model.layers[0].self_attn
    generator = torch.Generator().manual_seed(0)
    query, latent, rotary = (
        torch.randn(shape, generator=generator, dtype=torch.bfloat16)
        for shape in ((2, 4, 1, 24), (2, 1, 300, 16), (2, 1, 300, 8))
    )
    exact_of = model.model.layers[0].self_attn
    exact_of = copy.deepcopy(exact_of)
    exact_of.load_state_dict({key: tensor.float() for key, tensor in module.state_dict().items()})
    keys, values = exact_of.expand_kv(latent.float(), rotary.float())
    exact = nn.functional.scaled_dot_product_attention(query.float(), keys, values, scale=module.scaling).transpose(1, 2)
    keys, values = module.expand_kv(latent, rotary)
    plain = nn.functional.scaled_dot_product_attention(query, keys, values, scale=module.scaling).transpose(1, 2)
    found, _ = absorbed_attention._attend(module, query, latent, rotary, None, module.scaling)
    assert found.dtype == torch.bfloat16
    assert (found - exact).abs().max() <= 1.5 * (plain - exact).abs().max()


def test_outside_of_the_context_nothing_is_changed():
    """Also after an error, and with a second batcher's context in between."""
    model, ids = built("deepseek_v3"), random_ids(length=9)
    expected = logits_alone(model, ids[0], 9)
    first, second = AbsorbedAttention(model), AbsorbedAttention(model)
    before = [dict(vars(module)) for module in model.modules()]
    with first.active():
        assert model.config._attn_implementation == IMPLEMENTATION
    with pytest.raises(RuntimeError, match="stopped"), second.active():
        raise RuntimeError("stopped")
    with first.active(), second.active():
        logits_alone(model, ids[0], 9)
    assert [dict(vars(module)) for module in model.modules()] == before
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(logits_alone(model, ids[0], 9), expected)


@pytest.mark.parametrize("kind", ["a class of its own", "a bias", "a hook", "flash attention"])
def test_latents_that_cannot_be_absorbed_are_expanded(kind: str, caplog: pytest.LogCaptureFixture):
    """A projection may be packed, or have an adapter: then the model is left as it is, and the log says why."""
    model, ids = copy.deepcopy(built("deepseek_v3")), random_ids(length=9)
    attention = model.model.layers[1].self_attn
    projection = attention.kv_b_proj
    if kind == "a class of its own":
        attention.kv_b_proj = type("Packed", (nn.Linear,), {})(*projection.weight.shape[::-1], bias=False)
    elif kind == "a bias":
        attention.kv_b_proj = nn.Linear(*projection.weight.shape[::-1])
    elif kind == "a hook":
        projection.register_forward_hook(lambda module, args, output: 2 * output)
    else:
        model.config._attn_implementation = "flash_attention_2"
    with caplog.at_level(logging.WARNING, logger=absorbed_attention.__name__):
        absorbed = AbsorbedAttention(model)
    assert "latents are expanded in every step, because" in caplog.text
    assert ("kv_b_proj" in caplog.text) == (kind != "flash attention")
    model.config._attn_implementation = "sdpa"
    expected = logits_alone(model, ids[0], 9)
    with absorbed.active():
        assert torch.equal(logits_alone(model, ids[0], 9), expected)


def test_a_loaded_models_latents_are_absorbed(checkpoint: Callable[[str], Path], cache_dir: Path):
    """Its projections read their weights in place on the CPU: a forward method of ours, and plain matrices all the same."""
    model = epslots.load(
        checkpoint("deepseek_v3"), cache_dir=cache_dir, slots=4, device="cpu", dtype="float32", progress=False
    )
    assert "forward" in vars(model.model.layers[1].self_attn.kv_b_proj)
    with AbsorbedAttention(model).active():
        assert model.config._attn_implementation == IMPLEMENTATION


def test_the_models_with_latents_are_known():
    """Every class of transformers that expands latents is tried here, and no other model is said to keep them."""
    folder = Path(transformers.__file__).parent / "models"
    found = {path.parent.name for path in folder.glob("*/modeling_*.py") if "def expand_kv(" in path.read_text()}
    assert {re.sub("^kimi$", "deepseek_v3", name) for name in MODELS} == found
    assert all(latent_attentions(built(name)) for name in MODELS)
    assert not any(latent_attentions(tiny.build()) for name, tiny in ZOO.items() if name not in OF_THE_ZOO)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_contract_latents_are_expanded_right_before_attention(name: str, monkeypatch: pytest.MonkeyPatch):
    """A layer hands what ``expand_kv`` returns to attention as it is: nothing else would see latents in place of keys."""
    handed: list[tuple[torch.Tensor, torch.Tensor]] = []
    attended: list[bool] = []

    def not_expanded(latent: torch.Tensor, rotary: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert latent.dim() == rotary.dim() == 4 and latent.shape[1] == rotary.shape[1] == 1
        handed.append((latent, rotary))
        return latent, rotary

    def attend(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if module.config._attn_implementation == IMPLEMENTATION and hasattr(module, "expand_kv"):
            attended.append(len(handed) == len(attended) + 1 and handed[-1][0] is key and handed[-1][1] is value)
        return absorbed_attention._attend(module, query, key, value, *args, **kwargs)

    monkeypatch.setattr(absorbed_attention, "_not_expanded", not_expanded)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, IMPLEMENTATION, attend)
    model, past = built(name), DynamicCache(config=built(name).config)
    with AbsorbedAttention(model).active():
        for length in (5, 6):
            forward(model, random_ids(length=5 if length == 5 else 1), torch.tensor([length]), past)
    assert attended == [True] * 2 * sum(hasattr(module, "expand_kv") for module in model.get_decoder().modules())


def tensors(sizes: Sizes, heads: int, queries: int, keys: int, rows: int = 1) -> Iterator[torch.Tensor]:
    """The arguments of ``_absorbed`` and ``_expanded``, on the meta device."""
    yield torch.empty(rows, heads, queries, sizes.nope + sizes.rotary, device="meta")
    yield torch.empty(rows, keys, sizes.latent, device="meta")
    yield torch.empty(rows, keys, sizes.rotary, device="meta")
    yield torch.empty(heads, sizes.nope + sizes.value, sizes.latent, device="meta")


@given(sizes=st.builds(Sizes, *[st.integers(2, 40)] * 4), queries=st.integers(1, 30), past=st.integers(0, 60))
def test_the_rule_is_the_counted_multiplications(sizes: Sizes, queries: int, past: int):
    """Counted by torch while both ways run on tensors without contents."""
    counts = []
    for compute in (absorbed_attention._absorbed, absorbed_attention._expanded):
        # Sinks keep fused attention out, which the counter leaves to its kernel.
        scores = absorbed_attention._Softmax(1.0, None, torch.empty(3, device="meta"))
        with FlopCounterMode(display=False) as counter:
            query, latent, rotary, weight = tensors(sizes, 3, queries, queries + past, rows=2)
            compute(query, latent, rotary, weight, scores)
        counts.append(counter.get_total_flops())
    assert sizes.absorbs(queries, queries + past) == (counts[0] < counts[1])


def test_deepseeks_steps_absorb_and_its_prompts_expand():
    assert all(DEEPSEEK_V3.absorbs(1, keys) for keys in (2, 1500, 100_000))
    assert not any(DEEPSEEK_V3.absorbs(tokens, tokens) for tokens in (1, 512, 4096))
    assert DEEPSEEK_V3.absorbs(170, 100_000) and not DEEPSEEK_V3.absorbs(171, 100_000)


def test_a_step_computes_with_latents_as_they_are():
    """At 1,500 tokens of context, a step of plain transformers takes about a hundred times as many multiplications."""
    sizes, keys = DEEPSEEK_V3, 1500
    query, latent, rotary, weight = tensors(sizes, 8, 1, keys)
    module = nn.Module()
    module.kv_b_proj, module.qk_nope_head_dim = nn.Linear(512, 8 * 256, bias=False, device="meta"), sizes.nope
    assert module.kv_b_proj.weight.numel() == weight.numel()
    with FlopCounterMode(display=False) as counter:
        absorbed_attention._attend(module, query, latent[:, None], rotary[:, None], None, 1.0)
    expanding = 2 * keys * weight.numel()
    assert counter.get_total_flops() < expanding / 70


class Largest(TorchDispatchMode):
    """Records the most numbers that a result has, of operations that make new tensors."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view:
            self.numbers = max(self.numbers, result.numel())
        return result


@pytest.mark.parametrize(("rows", "queries", "keys"), [(64, 1, 32_768), (1, 64, 65_536), (1, 512, 65_536), (1, 4096, 4096)])
def test_scores_and_expanded_keys_are_bounded(rows: int, queries: int, keys: int):
    """Steps of many rows, chunks after long prompts, and whole prompts: a part of DeepSeek-V3's heads at a time."""
    sizes = DEEPSEEK_V3
    query, latent, rotary, _ = tensors(sizes, 128, queries, keys, rows)
    module = nn.Module()
    module.kv_b_proj, module.qk_nope_head_dim = nn.Linear(512, 128 * 256, bias=False, device="meta"), sizes.nope
    with Largest() as largest, torch.no_grad():
        absorbed_attention._attend(module, query, latent[:, None], rotary[:, None], None, 1.0)
    assert largest.numbers <= max(absorbed_attention.PART_NUMBERS, query.numel())


def test_a_step_meets_the_selected_tokens_alone():
    """DeepSeek's sparse attention: beyond the selected tokens, a longer context costs attention nothing."""
    generator = torch.Generator().manual_seed(0)
    latent, rotary = (torch.randn(2, 50, size, generator=generator) for size in (24, 8))
    index = torch.stack([torch.randperm(50, generator=generator)[:8] for _ in range(2)])[:, None]
    mask = torch.ones(2, 1, 1, 50, dtype=torch.bool)
    mask[0, ..., :20] = False
    latent_BKC, rotary_BKR, mask_B11K = absorbed_attention._select(latent, rotary, mask, index)
    for row in range(2):
        assert torch.equal(latent_BKC[row], latent[row, index[row, 0]])
        assert torch.equal(rotary_BKR[row], rotary[row, index[row, 0]])
        assert torch.equal(mask_B11K[row, 0, 0], mask[row, 0, 0, index[row, 0]])


@pytest.mark.parametrize("additive", [False, True])
def test_chunks_keep_to_each_querys_selected_tokens(additive: bool):
    index, mask = torch.tensor([[[0, 2], [1, 3]]]), torch.ones(1, 1, 2, 4, dtype=torch.bool).tril(2)
    given = torch.zeros(1, 1, 2, 4).masked_fill(~mask, torch.finfo(torch.float32).min) if additive else mask
    latent, rotary = torch.randn(1, 4, 3), torch.randn(1, 4, 2)
    same, also, kept = absorbed_attention._select(latent, rotary, given, index)
    assert same is latent and also is rotary
    assert (kept == 0 if additive else kept).tolist() == [[[[True, False, True, False], [False, True, False, True]]]]
