"""Several choices of a prompt, and log-probabilities, on real ranks in threads that are lost in the middle."""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.errors import Overloaded
from cluster.generation import Result
from epslots.errors import ConfigError
from epslots.generation.requests import TokenLogprobs
from epslots.generation.sampling import choice_seed
from tests.support import zoo
from tests.support.fake_backend import LOADING
from tests.support.thread_cluster import PROMPTS, expected

pytestmark = pytest.mark.usefixtures("one_load_at_a_time", "clock_loops")

SAMPLED = {"temperature": 0.9, "max_new_tokens": 15, "stop_tokens": ()}


def choices_of(results: Iterator[Result]) -> dict[int, list[tuple[int, ...]]]:
    """The tokens of each prompt's choices, in order."""
    found: dict[int, dict[int, tuple[int, ...]]] = defaultdict(dict)
    for result in results:
        assert result.reason == "length", result
        assert result.choice not in found[result.index]
        found[result.index][result.choice] = result.tokens
    assert all(sorted(of_prompt) == list(range(len(of_prompt))) for of_prompt in found.values())
    return {index: [of_prompt[choice] for choice in sorted(of_prompt)] for index, of_prompt in sorted(found.items())}


def test_a_choice_is_the_request_with_its_seed(open_cluster: Any):
    """On one rank, and on three of which one is lost."""
    alone, _ = open_cluster(1)
    prompts = [{"prompt": prompt, "seed": seed, "n": seed % 3 + 1} for seed, prompt in enumerate(PROMPTS)]
    right = {
        index: [
            alone.submit(each["prompt"], **SAMPLED, seed=choice_seed(each["seed"], choice)).result(60).tokens
            for choice in range(each["n"])
        ]
        for index, each in enumerate(prompts)
    }
    assert len({tuple(tokens) for of_prompt in right.values() for tokens in of_prompt}) == sum(each["n"] for each in prompts)
    assert choices_of(alone.generate(prompts, **SAMPLED)) == right
    cluster, backend = open_cluster(3)
    backend.at(1, 9, "crash")
    assert choices_of(cluster.generate(prompts, **SAMPLED)) == right
    assert backend.faults_done == [(1, "crash")]
    together = cluster.submit_choices(PROMPTS[1], **SAMPLED, seed=1, n=2)
    assert [(each.choice, each.result(60).tokens) for each in together] == list(enumerate(right[1]))
    assert [(each.result().choices, each.prompt_tokens) for each in together] == [(2, tuple(PROMPTS[1]))] * 2


def test_choices_are_sent_to_one_rank(open_cluster: Any):
    """Where the prompt is computed once; those of another prompt to the other rank."""
    cluster, _ = open_cluster(2)
    going = [
        cluster.submit_choices(prompt, max_new_tokens=400, stop_tokens=(), n=n)
        for prompt, n in ((PROMPTS[0], 3), (PROMPTS[1], 2))
    ]
    for each in (*going[0], *going[1]):
        next(each._portions())
    assert sorted(rank.requests for rank in cluster.stats().ranks) == [2, 3]


def test_room_is_for_all_choices_or_none(open_cluster: Any, folder: Path):
    cluster, _ = open_cluster(1, max_queue=4)
    long = {"max_new_tokens": 300, "stop_tokens": ()}
    with pytest.raises(ConfigError, match="n=5; allowed: up to max_queue, which is 4"):
        cluster.submit_choices(PROMPTS[0], n=5)
    for _ in range(2):
        held = cluster.submit_choices(PROMPTS[0], n=3, **long)
        with pytest.raises(Overloaded, match="4 requests wait or run already, or would with this prompt's"):
            cluster.submit_choices(PROMPTS[1], n=2, **long)
        with pytest.raises(ConfigError, match="an empty prompt"):
            cluster.submit([], **long)
        one = cluster.submit(PROMPTS[1], max_new_tokens=4, stop_tokens=())  # there is room for one more, and no less
        assert one.result(60).tokens == expected(folder, PROMPTS[1:2], 4)[0]
        held[0].cancel()
        assert held[0].result(60).reason == "cancelled"
        assert len(cluster.submit_choices(PROMPTS[1], n=2, **long)) == 2, "each choice leaves room by itself"
        del held
        gc.collect()
    counts = (4, 1, 3, 2, 4, 5, 1, 4)
    mixed = [{"prompt": prompt, "n": n} for prompt, n in zip(PROMPTS, counts, strict=True)]
    results = list(cluster.generate(mixed, max_new_tokens=3, stop_tokens=()))
    right = expected(folder, PROMPTS, 3)
    refused = [result for result in results if result.reason == "error"]
    assert [(result.index, result.choice, result.choices) for result in refused] == [(5, 0, 1)]
    assert "n=5; allowed: up to max_queue" in str(refused[0].error)
    found = choices_of(iter([result for result in results if result.reason != "error"]))
    assert found == {i: [right[i]] * n for i, n in enumerate(counts) if i != 5}


def test_one_generation_is_one_choice(open_cluster: Any):
    cluster, _ = open_cluster(1)
    for prompt, settings in ((PROMPTS[0], {"n": 2}), ({"prompt": PROMPTS[0], "n": 2}, {})):
        with pytest.raises(ConfigError, match=r"n=2; allowed here: 1; submit_choices\(prompt, \*\*settings\) returns"):
            cluster.submit(prompt, **settings)
    assert cluster.submit({"prompt": PROMPTS[0], "n": 1}, n=2, max_new_tokens=1).result(60).choices == 1


def test_readers_that_leave_end_their_choice_alone(open_cluster: Any, folder: Path):
    cluster, _ = open_cluster(2, max_queue=3)
    first, second, third = cluster.submit_choices(PROMPTS[0], n=3, max_new_tokens=40, stop_tokens=())
    for _ in first.portions():
        break
    assert first.result(60).reason == "cancelled"
    del second
    gc.collect()
    assert third.result(60).tokens == expected(folder, PROMPTS[:1], 40)[0]
    results = cluster.generate(PROMPTS, n=3, max_new_tokens=10, stop_tokens=())
    next(results)
    results.close()
    assert choices_of(cluster.generate(PROMPTS[:2], n=3, max_new_tokens=2, stop_tokens=())) == {
        index: [tokens] * 3 for index, tokens in enumerate(expected(folder, PROMPTS[:2], 2))
    }
    assert cluster._supervisor.router._calls == {}


def reference_logprobs(folder: Path, prompt: list[int], tokens: tuple[int, ...]) -> torch.Tensor:
    """Log-probabilities of plain transformers after each token but the last, [tokens, V]."""
    with LOADING:
        model = zoo.reference(folder)
    with torch.no_grad():
        return model(torch.tensor([[*prompt, *tokens]])).logits[0, :-1].float().log_softmax(-1)


def assert_logprobs(found: tuple[TokenLogprobs, ...], right: torch.Tensor, tokens: list[int], top: int) -> None:
    assert [each.token for each in found] == tokens
    for each, row in zip(found, right, strict=True):
        assert each.logprob == pytest.approx(float(row[each.token]), abs=1e-3)
        best = row.topk(top)
        assert [number for _, number in each.top] == pytest.approx(best.values.tolist(), abs=1e-3)
        assert [token for token, _ in each.top] == best.indices.tolist()


@pytest.mark.parametrize("operation", [2, 14])
def test_logprobs_come_once_whatever_is_lost(open_cluster: Any, folder: Path, operation: int):
    """A rank is lost while prompts are computed, and among new tokens. They are the model's own, with any sampling."""
    cluster, backend = open_cluster(2, max_batch_tokens=16)
    backend.at(0, operation, "crash")
    settings = {"logprobs": 2, "prompt_logprobs": 1, "temperature": 0.9, "max_new_tokens": 12, "stop_tokens": (), "n": 2}
    results = list(cluster.generate(PROMPTS, **settings))
    assert len(results) == 2 * len(PROMPTS)
    assert backend.faults_done == [(0, "crash")]
    for result in results:
        prompt = PROMPTS[result.index]
        right = reference_logprobs(folder, prompt, result.tokens)
        assert result.logprobs is not None
        assert_logprobs(result.logprobs, right[len(prompt) - 1 :], list(result.tokens), 2)
        if result.choice:
            assert result.prompt_logprobs is None
        else:
            assert result.prompt_logprobs is not None
            assert_logprobs(result.prompt_logprobs, right[: len(prompt) - 1], prompt[1:], 1)
