"""Looking ahead changes no result, on one rank or several, however late what is fetched comes and whatever was predicted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import epslots
from epslots.errors import ConfigError, RankMismatchError
from epslots.loading import shared_settings
from epslots.look_ahead import Ahead
from epslots.predictor_file import FILE_NAME
from epslots.progress import ProgressDisplay
from epslots.ranks import group_up
from epslots.runtime import Runtime, runtime_of
from epslots.transport import LocalTransport
from epslots.units import PrefetchSetting, parse_prefetch
from tests import zoo
from tests.grouped import TOKENS_TRAVEL, Grouped
from tests.late_link import Guesses, LateLink
from tests.rank_helpers import run_threads
from tests.test_load_equal import SERVED, assert_equal, greedy, load
from tests.test_ranks_equal import compare

Checkpoints = Callable[[str], Path]
LINK = "1000GB/s"


def mislead(runtime: Runtime, seed: int = 0) -> None:
    """Predictions at random, over a link that brings nothing before it must."""
    link = LateLink()
    for mover in runtime.movers:
        mover.link = link
    for runner, following in zip(runtime.runners, runtime.runners[1:], strict=False):
        runner.ahead = Ahead(runner.index, following.expected, Guesses(following.experts.num_experts, seed))


def sums(model: PreTrainedModel, *names: str) -> tuple[int, ...]:
    return tuple(sum(getattr(layer, name) for layer in epslots.stats(model).layers) for name in names)


@pytest.mark.parametrize("slots", [1, 3, "50%"])
@pytest.mark.parametrize("name", SERVED)
def test_one_rank(name: str, slots: int | str, checkpoint: Checkpoints, cache_dir: Path):
    folder = checkpoint(name)
    reference, model = zoo.reference(folder), load(folder, cache_dir, slots=slots)
    runtime = runtime_of(model)
    mislead(runtime)
    assert_equal(model, reference)
    prompt = zoo.random_ids(1, 9, seed=2)
    assert greedy(model, prompt) == greedy(reference, prompt)
    runtime.check_integrity()


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "ernie4_5_vl_moe", "longcat_flash"])
def test_many_ranks(name: str, checkpoint: Checkpoints, cache_dir: Path):
    folder = checkpoint(name)
    grouped = Grouped(folder, cache_dir, slots=[2, "25%", "50%"])
    for rank, model in enumerate(grouped.models):
        mislead(runtime_of(model), seed=rank)
    compare(grouped, zoo.reference(folder))


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "mixtral"])
def test_the_next_layer_s_router_is_what_tells_by_default(name: str, checkpoint: Checkpoints, cache_dir: Path):
    folder = checkpoint(name)
    model = load(folder, cache_dir, slots="50%", link=LINK)
    prompt = zoo.random_ids(1, 9, seed=2)
    assert greedy(model, prompt, 40) == greedy(zoo.reference(folder), prompt, 40)
    (prefetches,) = sums(model, "prefetches")
    assert prefetches
    without = load(folder, cache_dir, slots="50%", link=LINK, prefetch="off")
    greedy(without, prompt, 40)
    assert sums(without, "prefetches") == (0,)


def test_several_ranks_by_default(checkpoint: Checkpoints, cache_dir: Path):
    folder = checkpoint("qwen3_moe")
    grouped = Grouped(folder, cache_dir, slots=[3, 2], link=LINK)
    compare(grouped, zoo.reference(folder))
    assert sum(sums(model, "prefetches")[0] for model in grouped.models)


def test_a_cpu_without_a_link_predicts_nothing(checkpoint: Checkpoints, cache_dir: Path):
    model = load(checkpoint("qwen3_moe"), cache_dir)
    assert all(runner.ahead is None for runner in runtime_of(model).runners)


def test_ranks_must_predict_alike(checkpoint: Checkpoints, cache_dir: Path):
    folder = checkpoint("qwen3_moe")
    models = [load(folder, cache_dir, link=LINK, prefetch=prefetch) for prefetch in ("auto", "off")]

    def form(transport: LocalTransport) -> None:
        model = models[transport.rank]
        group_up(
            model, transport, settings=shared_settings(model, "lrfu"), costs=TOKENS_TRAVEL, display=ProgressDisplay(False)
        )

    with pytest.raises(RankMismatchError, match="predictions"):
        run_threads(form, 2)


def test_a_budget_of_less_than_an_expert_fetches_nothing_ahead(checkpoint: Checkpoints, cache_dir: Path):
    folder = checkpoint("qwen3_moe")
    model = load(folder, cache_dir, slots="50%", link=LINK, prefetch="1KB")
    greedy(model, zoo.random_ids(1, 9, seed=2), 20)
    assert sums(model, "prefetches") == (0,)


class TestExecutePredicted:
    """The approximate mode, by name only."""

    def test_executes_what_was_predicted_with_the_router_s_weights(self, checkpoint: Checkpoints, cache_dir: Path):
        folder = checkpoint("qwen3_moe")
        exact, model = load(folder, cache_dir), load(folder, cache_dir, execute_predicted=True)
        ids = zoo.random_ids(1, 12, seed=3)
        runners = runtime_of(model).runners
        executed: dict[int, torch.Tensor] = {}
        given: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for runner in runners:
            self._watch(runner, executed, given)
        with torch.no_grad():
            logits = model(input_ids=ids).logits
            assert not torch.allclose(logits, exact(input_ids=ids).logits, atol=1e-3)
        assert torch.equal(executed[0], given[0][0]), "nothing tells of the first layer"
        differing = [layer for layer in executed if not torch.equal(executed[layer], given[layer][0])]
        assert differing == [runner.index for runner in runners[1:]]

    def _watch(self, runner: Any, executed: dict[int, torch.Tensor], given: dict[int, Any]) -> None:
        replace = runner.expected.execute_predicted

        def watch(index: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            given[runner.index] = index, weights
            found = replace(index, weights)
            executed[runner.index] = found[0]
            assert torch.equal(found[1].sort(-1).values, weights.sort(-1).values)
            return found

        runner.expected.execute_predicted = watch

    @pytest.mark.parametrize("settings", [{"prefetch": "off", "link": LINK}, {"prefetch": "auto"}])
    def test_fetches_nothing_ahead_by_itself(self, settings: dict[str, Any], checkpoint: Checkpoints, cache_dir: Path):
        model = load(checkpoint("qwen3_moe"), cache_dir, execute_predicted=True, **settings)
        greedy(model, zoo.random_ids(1, 9, seed=2), 10)
        assert sums(model, "prefetches") == (0,)

    def test_off_by_default(self, checkpoint: Checkpoints, cache_dir: Path):
        model = load(checkpoint("qwen3_moe"), cache_dir, link=LINK)
        greedy(model, zoo.random_ids(1, 9, seed=2), 4)
        assert all(runner.expected.ids is None for runner in runtime_of(model).runners)


class TestSettings:
    @pytest.mark.parametrize(
        ("value", "setting"),
        [
            ("auto", PrefetchSetting()),
            (True, PrefetchSetting()),
            ("off", PrefetchSetting(on=False)),
            (False, PrefetchSetting(on=False)),
            ("2MiB", PrefetchSetting(bytes_per_step=2 * 2**20)),
        ],
    )
    def test_prefetch(self, value: str | bool, setting: PrefetchSetting):
        assert parse_prefetch(value) == setting

    @pytest.mark.parametrize("value", ["on", "", "64", "-1MiB", "0GiB", 3, None])
    def test_what_is_none(self, value: Any):
        with pytest.raises(ConfigError, match="prefetch"):
            parse_prefetch(value)

    def test_a_named_predictor_must_be_one(self, checkpoint: Checkpoints, cache_dir: Path, tmp_path: Path):
        folder = checkpoint("qwen3_moe")
        with pytest.raises(ConfigError, match="missing"):
            load(folder, cache_dir, link=LINK, predictor=tmp_path / "missing.safetensors")

    def test_one_that_lies_there_and_is_none_is_passed_over(
        self, checkpoint: Checkpoints, cache_dir: Path, caplog: pytest.LogCaptureFixture
    ):
        folder = checkpoint("qwen3_moe")
        path = folder / FILE_NAME
        path.write_bytes(b"nothing")
        try:
            model = load(folder, cache_dir, link=LINK)
        finally:
            path.unlink()
        assert "is not used" in caplog.text
        assert runtime_of(model).foresight.settings.startswith("fetched ahead by routers")


def test_prefetches_count_where_their_bytes_do(checkpoint: Checkpoints, cache_dir: Path):
    model = load(checkpoint("qwen3_moe"), cache_dir, slots="50%", link=LINK)
    greedy(model, zoo.random_ids(1, 9, seed=2), 40)
    runtime = runtime_of(model)
    fetched = np.array(sums(model, "misses", "prefetches")).sum()
    record = runtime.layers[0].layout.nbytes
    (crossed,) = sums(model, "host_bytes")
    assert crossed % record == 0 and 0.5 * fetched * record < crossed <= fetched * record, "some are dropped in time"
    assert sums(model, "late")[0] <= sums(model, "hits")[0]


class Interrupted(LateLink):
    """Ctrl-C comes while a slot is waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.at: int | None = None

    def land(self, landing: Any) -> None:
        if self.at == 0:
            self.at = None
            raise KeyboardInterrupt
        self.at = None if self.at is None else self.at - 1
        super().land(landing)

    def drop(self, landing: Any) -> bool:
        if self.at == 0:
            self.at = None
            raise KeyboardInterrupt
        return super().drop(landing)


@pytest.mark.parametrize("at", range(6))
def test_an_interrupted_wait_leaves_the_model_as_it_was(at: int, checkpoint: Checkpoints, cache_dir: Path):
    folder = checkpoint("qwen3_moe")
    reference, model = zoo.reference(folder), load(folder, cache_dir, slots="50%")
    mislead(runtime_of(model))
    link = Interrupted()
    for mover in runtime_of(model).movers:
        mover.link = link
    ids = zoo.random_ids(1, 4, seed=5)
    greedy(model, ids, 2)
    link.at = at
    with pytest.raises(KeyboardInterrupt):
        greedy(model, ids, 40)
    assert_equal(model, reference, input_ids=ids)
    runtime_of(model).check_integrity()
