"""Predicted steps: their bytes are the true model's, their reasons add up, and slots cost what misses cost."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from epslots.bench.models import random_config
from epslots.bench.needed_hits import TokenTimes
from epslots.bench.predicted_ranks import predicted_ranks
from epslots.bench.predicted_steps import predicted_steps
from epslots.bench.timeline import HIT_RATES, _hit_rate, _share
from epslots.errors import ConfigError
from epslots.simulated_gpu.gpu_spec import GPUS
from epslots.simulated_gpu.tiny_twin import tiny_twin

# The widths of Qwen3-30B-A3B.
CONFIG = random_config(layers=2, hidden=2048, experts=16, top_k=4, width=768, vocab=151_936, heads=16)
LAYERS, TOP_K, HIDDEN, WIDTH, HEADS, KV_HEADS, HEAD = 2, 4, 2048, 768, 16, 4, 128


def test_a_step_takes_the_true_models_time(cache_dir: Path):
    """On a GPU without floors and a host without cost, the bytes of the active weights and of the cache are all."""
    spec = msgspec.structs.replace(GPUS["h100"], kernel_s=0.0, node_s=0.0, copy_s=0.0, launch_s=0.0, wake_s=0.0, query_s=1e-12)
    attention = HIDDEN * HEAD * (2 * HEADS + 2 * KV_HEADS)
    weights = LAYERS * (attention + 3 * TOP_K * HIDDEN * WIDTH + 16 * HIDDEN) + CONFIG.vocab_size * HIDDEN
    with predicted_steps(CONFIG, cache_dir, steps=2) as run:
        resident = run(spec, 1.0)
        assert 1.0 < resident.by_reason["HBM"] * spec.memory_rate / (2 * weights) < 1.05
        assert sum(resident.by_reason.values()) == pytest.approx(resident.step_s)
        assert resident.by_reason["link"] == resident.fetches == 0 and resident.hit_rate == 1
        assert resident.bound_by == "HBM"

        missing = run(spec, 0.5, hit_rate=0.5)
        assert missing.syncs == resident.syncs + LAYERS and missing.by_reason["link"] > 0
        assert 0.3 < missing.hit_rate < 0.95
        assert missing.expert_bytes == 3 * HIDDEN * WIDTH * 2
        link_s = missing.fetches * missing.expert_bytes / spec.link_rate
        assert missing.link_busy_s == pytest.approx(link_s, rel=0.25), "some fetches of the steps before and after"
        assert missing.step_s > resident.step_s

        captured, packed = (run(spec, 0.5, hit_rate=0.5, captured=True, record_bits=bits) for bits in (16, 4))
        assert packed.fetches == captured.fetches and 4 * packed.expert_bytes == captured.expert_bytes
        assert packed.by_reason["link"] == pytest.approx(captured.by_reason["link"] / 4, rel=0.1)  # prefetches hide some of it
        assert captured.syncs == 1 and captured.by_reason["link"] > 0.3 * captured.step_s, (
            "the tokens alone are waited for; a kernel copies"
        )
        assert captured.fetches > 0 and captured.step_s > captured.fetches * captured.expert_bytes / spec.link_rate


def test_pieces_spare_the_hosts_of_two_ranks_their_launches(cache_dir: Path):
    """Those of the model; layers launch as much as ever."""
    with predicted_ranks(CONFIG, cache_dir, steps=2) as run:
        usual, captured = (run(GPUS["h100"], 0.5, captured=captured) for captured in (False, True))
    assert captured.step_s < usual.step_s and captured.layers == LAYERS
    assert captured.host_s - captured.our_host_s < 0.2 * (usual.host_s - usual.our_host_s)
    assert captured.kernels["transformers"] == pytest.approx(usual.kernels["transformers"], rel=0.2)


@pytest.mark.parametrize("recall", [None, 0.0, 0.9, 1.0])
@pytest.mark.parametrize("record_s", [0.001, 0.02, 1.0])
def test_the_needed_hit_rate_is_the_least_that_suffices(recall: float | None, record_s: float):
    times = TokenTimes(resident_s=1.0, uses=40, record_s=record_s, recall=recall)
    needed = times.needed_hit_rate(0.85)
    assert times.seconds(1.0) == 1.0 and times.seconds(needed) <= 1 / 0.85 + 1e-9
    assert needed == 0 or times.seconds(needed - 1e-6) > 1 / 0.85


def test_fetching_ahead_hides_copies_but_not_their_number():
    ahead, demand = (TokenTimes(1.0, 40, 0.02, recall) for recall in (0.9, None))
    assert demand.seconds(0.5) == pytest.approx(1 + 0.4)
    assert ahead.seconds(0.5) == pytest.approx(1 + 0.04), "a tenth is waited for"
    assert TokenTimes(1.0, 80, 0.02, 0.9).seconds(0.0) == pytest.approx(1.6 + 0.16), "the link is full"


def test_hit_rates_are_read_between_recorded_shares():
    rates = HIT_RATES["shipped model"]
    assert [_hit_rate(rates, share) for share in (0.25, 0.5, 1.0)] == [0.701, 0.924, 1.0]
    assert 0.701 < _hit_rate(rates, 0.3) < 0.924 < _hit_rate(rates, 0.6) < 0.967


@pytest.mark.parametrize("text", ["0.5", "50", "0%", "101%", "all", "50%%", ""])
def test_slots_of_a_timeline_are_shares(text: str):
    with pytest.raises(ConfigError, match="allowed: shares of the experts, such as 25%"):
        _share(text)
    assert _share(" 12.5%") == 0.125


def test_other_architectures_have_no_twin():
    """A width that is missing in the table would weigh as little as the tiny one."""
    config = random_config(layers=1, hidden=64, experts=4, top_k=2, width=32)
    config.architectures = ["DeepseekV3ForCausalLM"]
    with pytest.raises(ConfigError, match="DeepseekV3ForCausalLM: allowed: Qwen3MoeForCausalLM, MixtralForCausalLM"):
        tiny_twin(config)
