"""Looking ahead changes no result, on one rank or several, however late fetches come and however wrong predictions are."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import epslots
from epslots.errors import ConfigError, RankMismatchError
from epslots.group.join import start_rank
from epslots.models.memory_report import plan_items
from epslots.models.pretrained import build_skeleton, read_config, resolve_class
from epslots.moe.prefetcher import Prefetcher
from epslots.prefetch.fit import FitQuality, FitSettings
from epslots.prefetch.predictor import HISTORY_ROWS, FittedEstimator
from epslots.prefetch.predictor_file import PREDICTOR_FILE_NAME, PredictorMetadata, file_bytes, write_predictor
from epslots.prefetch.setup import planned_bytes
from epslots.progress import ProgressDisplay
from epslots.runtime import predictor_of, runtime_of
from epslots.transport.local_transport import LocalTransport
from epslots.units import PrefetchSetting, parse_prefetch
from tests.support import zoo
from tests.support.equality import assert_equal, compare, greedy, load
from tests.support.grouped_ranks import TOKENS_TRAVEL, Grouped
from tests.support.late_link import Guesses, LateLink, mislead
from tests.support.rank_helpers import run_threads
from tests.support.remembered import Reference

Checkpoints = Callable[[str], Path]
LINK = "1000GB/s"


def sums(model: PreTrainedModel, *names: str) -> tuple[int, ...]:
    return tuple(sum(getattr(layer, name) for layer in epslots.stats(model).layers) for name in names)


class Unbegun(LateLink):
    """It begins with nothing."""

    def begun(self, transfer: Any) -> bool:
        return False


@pytest.mark.parametrize("slots", [1, "50%"])
def test_wrong_predictions_change_no_result(slots: int | str, checkpoint: Checkpoints, cache_dir: Path):
    """With three slots: tests/equality, with each layout."""
    folder = checkpoint("qwen3_moe")
    reference, model = zoo.reference(folder), load(folder, cache_dir, slots=slots)
    mislead(runtime_of(model))
    assert_equal(model, reference)
    prompt = zoo.random_ids(1, 9, seed=2)
    assert greedy(model, prompt) == greedy(reference, prompt)
    runtime_of(model).check_integrity()


def test_prefetches_for_nothing_end_with_their_step(checkpoint: Callable[[str], Path], cache_dir: Path):
    """Those that the link hasn't begun: else those of a long prompt would keep it busy for many steps."""
    model = load(checkpoint("qwen3_moe"), cache_dir, slots="50%")
    runtime = runtime_of(model)
    mislead(runtime)
    for loader in runtime.loaders:
        loader.link = Unbegun()
    for seed in range(3):
        with torch.no_grad():
            model(input_ids=zoo.random_ids(1, 9, seed=seed))
        assert not any(loader.any_in_flight for loader in runtime.loaders)
    prefetches, dropped = sums(model, "prefetches", "taken_back")
    assert 0 < dropped < prefetches
    runtime.check_integrity()


def test_a_prefetch_that_is_made_twice_is_taken_back_once(checkpoint: Checkpoints, cache_dir: Path):
    """A step in parts is predicted part by part: one's prefetch may be evicted for another's, and made again."""
    model = load(checkpoint("qwen3_moe"), cache_dir, slots="50%")
    runtime = runtime_of(model)
    mislead(runtime)
    for loader in runtime.loaders:
        loader.link = Unbegun()
    runner = runtime.runners[1]

    def step(*experts: int) -> None:
        with torch.no_grad():
            runner(torch.zeros(1, runner.experts.kernel.hidden_size), torch.tensor([experts]), torch.ones(1, len(experts)))

    for first in range(0, 8, 2):
        step(first, first + 1)
    held, absent = np.flatnonzero(runner.cache.resident_E), np.flatnonzero(~runner.cache.resident_E)
    one, other = absent[:2].tolist()
    score_E = np.full(16, 9)
    score_E[[held[0], one, held[1], other]] = 0, 1, 2, 3
    runner.prefetch_target._scores = lambda: score_E
    for guess in (one, other, one):
        usage = np.zeros((1, 16), np.int64)
        usage[0, guess] = 255
        runner.prefetch_target.fetch(usage, np.array([False]))
    assert sorted(runner.planner.own_prefetches.tolist()) == sorted({*runner.planner.own_prefetches.tolist()})
    step(int(held[3]), int(held[4]))
    (loader,) = runtime.loaders
    assert not loader.in_flight[loader.pool.slot_range(1)].any()
    runtime.check_integrity()


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "mixtral"])
def test_the_next_layers_router_predicts_by_default(name: str, checkpoint: Checkpoints, cache_dir: Path):
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
    compare(grouped, Reference(folder))
    assert sum(sums(model, "prefetches")[0] for model in grouped.models)


def test_a_cpu_without_a_link_predicts_nothing(checkpoint: Checkpoints, cache_dir: Path):
    model = load(checkpoint("qwen3_moe"), cache_dir)
    assert all(runner.prefetcher is None for runner in runtime_of(model).runners)


def test_ranks_must_predict_alike(checkpoint: Checkpoints, cache_dir: Path):
    folder = checkpoint("qwen3_moe")
    models = [load(folder, cache_dir, link=LINK, prefetch=prefetch) for prefetch in ("auto", "off")]

    def form(transport: LocalTransport) -> None:
        model = models[transport.rank]
        start_rank(
            model, transport, settings=runtime_of(model).rank_settings, costs=TOKENS_TRAVEL, display=ProgressDisplay(False)
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
        replace = runner.prefetch_target.take_predicted

        def watch(index: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            given[runner.index] = index, weights
            found = replace(index, weights)
            executed[runner.index] = found[0]
            assert torch.equal(found[1].sort(-1).values, weights.sort(-1).values)
            return found

        runner.prefetch_target.take_predicted = watch

    def test_each_thread_executes_what_was_predicted_for_its_own(self, checkpoint: Checkpoints, cache_dir: Path):
        """Two passes of one shape, of which each has been told of a layer before either comes to it."""
        model = load(checkpoint("qwen3_moe"), cache_dir, slots="100%", execute_predicted=True)
        inputs = [zoo.random_ids(1, 12, seed=seed) for seed in (3, 4)]
        with torch.no_grad():
            alone = [model(input_ids=ids).logits for ids in inputs]
        both = threading.Barrier(2, timeout=60)
        for runner in runtime_of(model).runners:
            execute = runner.prefetch_target.take_predicted

            def met(index: torch.Tensor, weights: torch.Tensor, execute: Any = execute) -> Any:
                both.wait()
                found = execute(index, weights)
                both.wait()
                return found

            runner.prefetch_target.take_predicted = met  # type: ignore[method-assign]

        def forward(ids: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                logits: torch.Tensor = model(input_ids=ids).logits
                return logits

        with ThreadPoolExecutor(2) as threads:
            together = list(threads.map(forward, inputs))
        for one, other in zip(together, alone, strict=True):
            assert torch.allclose(one, other, atol=1e-4)

    def test_one_layer_has_none_before_it(self, tmp_path: Path, cache_dir: Path, caplog: pytest.LogCaptureFixture):
        tiny = zoo.ZOO["deepseek_v3"]
        settings = {**tiny.settings, "first_k_dense_replace": tiny.settings["num_hidden_layers"] - 1}
        reference = replace(tiny, settings=settings, moe_layers=1).build()
        reference.save_pretrained(tmp_path / "model")
        model = load(tmp_path / "model", cache_dir, execute_predicted=True)
        assert "execute_predicted does nothing" in caplog.text
        assert_equal(model, reference)

    @pytest.mark.parametrize("settings", [{"prefetch": "off", "link": LINK}, {"prefetch": "auto"}])
    def test_fetches_nothing_ahead_by_itself(self, settings: dict[str, Any], checkpoint: Checkpoints, cache_dir: Path):
        model = load(checkpoint("qwen3_moe"), cache_dir, execute_predicted=True, **settings)
        greedy(model, zoo.random_ids(1, 9, seed=2), 10)
        assert sums(model, "prefetches") == (0,)

    def test_off_by_default(self, checkpoint: Checkpoints, cache_dir: Path):
        model = load(checkpoint("qwen3_moe"), cache_dir, link=LINK)
        greedy(model, zoo.random_ids(1, 9, seed=2), 4)
        assert all(runner.prefetch_target.predicted.ids_TK is None for runner in runtime_of(model).runners)


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

    @pytest.mark.parametrize("value", ["on", "", "64", "-1MiB", "0GiB", "9000000TiB", 3, None])
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
        path = folder / PREDICTOR_FILE_NAME
        path.write_bytes(b"nothing")
        try:
            model = load(folder, cache_dir, link=LINK)
        finally:
            path.unlink()
        assert "is not used" in caplog.text
        assert runtime_of(model).prefetch_config.settings.startswith("fetched ahead by routers")


def test_prefetches_count_where_their_bytes_do(checkpoint: Checkpoints, cache_dir: Path):
    model = load(checkpoint("qwen3_moe"), cache_dir, slots="50%", link=LINK)
    greedy(model, zoo.random_ids(1, 9, seed=2), 40)
    runtime = runtime_of(model)
    fetched = np.array(sums(model, "misses", "prefetches")).sum()
    record = runtime.layers[0].layout.nbytes
    (crossed,) = sums(model, "host_bytes")
    assert crossed % record == 0 and 0.5 * fetched * record < crossed <= fetched * record, "some are dropped in time"
    assert sums(model, "late")[0] <= sums(model, "hits")[0]


class HurriedLink(LateLink):
    """Counts awaited transfers, and those of them that were never made urgent: it would come behind the step's misses."""

    def __init__(self) -> None:
        super().__init__()
        self.urgent: set[int] = set()
        self.waited = self.surprising = 0

    def start(self, slots: Any, records: Any, put: Any, *, urgent: bool) -> list[Any]:
        transfers = super().start(slots, records, put, urgent=urgent)
        self.urgent.update(id(transfer) for transfer in transfers if urgent)
        return transfers

    def set_urgent(self, transfer: Any) -> None:
        self.urgent.add(id(transfer))

    def wait(self, transfer: Any) -> None:
        self.waited += 1
        self.surprising += id(transfer) not in self.urgent
        self.urgent.discard(id(transfer))
        super().wait(transfer)


def test_late_prefetches_go_before_the_steps_misses(checkpoint: Checkpoints, cache_dir: Path):
    model = load(checkpoint("qwen3_moe"), cache_dir, slots="50%", link=LINK)
    runtime = runtime_of(model)
    mislead(runtime)
    links = [HurriedLink() for _ in runtime.loaders]
    for loader, link in zip(runtime.loaders, links, strict=True):
        loader.link = link
    greedy(model, zoo.random_ids(2, 9, seed=2), 40)
    assert sums(model, "late")[0] > 10
    assert sum(link.waited for link in links) > 50
    assert not any(link.surprising for link in links)


class Counting(Guesses):
    """Counts, for each layer that is looked from, the rows that it was shown."""

    def __init__(self, experts: int, seed: int) -> None:
        super().__init__(experts, seed)
        self.asked: list[int] = []
        self.skipped: list[int] = []

    def usage(self, layer: int, hidden_TH: torch.Tensor, index_TK: torch.Tensor) -> torch.Tensor | None:
        self.asked.append(len(hidden_TH))
        return super().usage(layer, hidden_TH, index_TK)

    def skip(self, layer: int, hidden_TH: torch.Tensor) -> None:
        self.skipped.append(len(hidden_TH))


def test_a_predictor_sees_the_rows_of_every_step_asked_or_not(checkpoint: Checkpoints, cache_dir: Path):
    """Or what it says of the next step's would follow from rows of long ago."""
    model = load(checkpoint("qwen3_moe"), cache_dir, slots=3, link=LINK)
    runners = runtime_of(model).runners
    seen = []
    for runner, following in pairwise(runners):
        seen.append(Counting(following.cache.num_experts, runner.index))
        runner.prefetch_by(Prefetcher(runner.index, following.prefetch_target, seen[-1]))
    greedy(model, zoo.random_ids(1, 9, seed=2), 60)
    assert seen and all(found.asked and found.skipped for found in seen), "useless guesses are asked for now and then"
    assert all(sum(found.asked) + sum(found.skipped) == 9 + 59 for found in seen)


class Interrupted(LateLink):
    """Ctrl-C comes while a slot is waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.at: int | None = None

    def wait(self, transfer: Any) -> None:
        if self.at == 0:
            self.at = None
            raise KeyboardInterrupt
        self.at = None if self.at is None else self.at - 1
        super().wait(transfer)

    def cancel(self, transfer: Any) -> bool:
        if self.at == 0:
            self.at = None
            raise KeyboardInterrupt
        return super().cancel(transfer)


@pytest.mark.parametrize("at", range(6))
def test_an_interrupted_wait_leaves_the_model_as_it_was(at: int, checkpoint: Checkpoints, cache_dir: Path):
    folder = checkpoint("qwen3_moe")
    reference, model = zoo.reference(folder), load(folder, cache_dir, slots="50%")
    mislead(runtime_of(model))
    link = Interrupted()
    for loader in runtime_of(model).loaders:
        loader.link = link
    ids = zoo.random_ids(1, 4, seed=5)
    greedy(model, ids, 2)
    link.at = at
    with pytest.raises(KeyboardInterrupt):
        greedy(model, ids, 40)
    assert_equal(model, reference, input_ids=ids)
    runtime_of(model).check_integrity()


class TestMemory:
    """The predictor takes the memory that the plan leaves for it."""

    def _taken(self, model: PreTrainedModel) -> int:
        """Bytes of the estimators' tensors that aren't the model's own."""
        told = predictor_of(model)
        assert told is not None
        own = {p.data_ptr() for p in model.parameters()}
        tensors: dict[int, torch.Tensor] = {}
        for estimator in told.estimators:
            if isinstance(estimator, FittedEstimator):
                found = [estimator.first, estimator.first_bias, estimator.second, estimator.unlikely_E]
            else:
                found = [] if estimator is None else [estimator.router.weight_EH, estimator.router.bias_E]
            tensors |= {t.data_ptr(): t for t in found if t.numel() and t.data_ptr() not in own}
        few = [few for few in told._kernel_weights if few is not None]
        assert not {a.ctypes.data for f in few for a in (f.first_DN, f.bias_N, f.second_ME) if a.size} - tensors.keys() - own
        return sum(t.nbytes for t in tensors.values())

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "gemma4"])
    def test_of_routers(self, name: str, dtype: str, checkpoint: Checkpoints, cache_dir: Path):
        model = load(checkpoint(name), cache_dir, link=LINK, dtype=dtype)
        assert runtime_of(model).plan.predictor_bytes == self._taken(model) > 0
        for settings in ({"link": LINK, "prefetch": "off"}, {}):
            assert runtime_of(load(checkpoint(name), cache_dir, **settings)).plan.predictor_bytes == 0

    def test_of_a_file(self, checkpoint: Checkpoints, cache_dir: Path, tmp_path: Path):
        folder = checkpoint("qwen3_moe")
        plain = load(folder, cache_dir, link=LINK)
        runtime, random = runtime_of(plain), torch.Generator().manual_seed(0)
        experts = [layer.num_experts for layer in runtime.layers]
        fits = [
            FittedEstimator(
                torch.randn(5 + count, (2 if layer else 1) * zoo.HIDDEN, generator=random),
                torch.zeros(5 + count),
                torch.randn(5, count, generator=random),
                torch.full((count,), -0.1),
                bool(layer),
            )
            for layer, count in enumerate(experts)
        ]
        quality = [FitQuality(None, (0.5, 0.5), fit.history) for fit in fits]
        about = PredictorMetadata(
            checkpoint=runtime.checkpoint,
            model="tiny",
            experts=experts,
            tokens=1,
            settings=FitSettings(),
            quality=list(quality),
        )
        write_predictor(tmp_path / "p.safetensors", fits, about)
        model = load(folder, cache_dir, link=LINK, predictor=tmp_path / "p.safetensors")
        rows = HISTORY_ROWS * zoo.HIDDEN * 4 * (len(experts) - 1)
        plan = runtime_of(model).plan
        assert plan.predictor_bytes == self._taken(model) + rows
        told = predictor_of(model)
        assert told is not None
        for layer in range(len(experts)):
            told.usage(layer, torch.randn(HISTORY_ROWS + 9, zoo.HIDDEN), torch.zeros(1, 1, dtype=torch.int64))
        assert sum(kept.nbytes for kept in told._state.rows if kept is not None) == rows
        assert ("predictor", plan.predictor_bytes) in [item[:2] for item in plan_items(plan)]
        greedy(model, zoo.random_ids(1, 9, seed=2), 4)
        # On a GPU half of it, in the model's type. Another checkpoint's isn't used: the routers are there already.
        nbytes, _ = file_bytes(tmp_path / "p.safetensors", torch.device("cuda"), torch.bfloat16)
        of_unlikely = 4 * sum(experts)
        assert 2 * (nbytes - of_unlikely) == plan.predictor_bytes - of_unlikely

    @pytest.mark.parametrize(("content", "fitted"), [("own", True), ("other", False)])
    def test_of_one_beside_the_checkpoint(self, content: str, fitted: bool, checkpoint: Checkpoints, tmp_path: Path):
        folder = checkpoint("mixtral")
        config = read_config(folder)
        skeleton = build_skeleton(resolve_class(config), config, torch.bfloat16)
        fit = FittedEstimator(torch.zeros(8, zoo.HIDDEN), torch.zeros(8), torch.zeros(0, 8), torch.zeros(8))
        quality = [FitQuality(None, (0.5, 0.5), False), None]
        about = PredictorMetadata(
            checkpoint="own", model="m", experts=[8] * 2, tokens=1, settings=FitSettings(), quality=list(quality)
        )
        write_predictor(tmp_path / PREDICTOR_FILE_NAME, [fit, None], about)

        def planned(fetches: bool) -> int:
            settings: dict[str, Any] = {"predictor": None, "execute_predicted": False, "fetches": fetches}
            cuda = torch.device("cuda")
            return planned_bytes(skeleton, content, tmp_path, device=cuda, dtype=torch.bfloat16, **settings)

        assert planned(False) == 0
        of_file, of_biases = 8 * zoo.HIDDEN * 2 + 8 * 2 + 8 * 4, 8 * 2
        assert planned(True) == (of_file if fitted else of_biases)
