"""Requests for batchers, the tokens that they must get, and what drives a batcher to its end."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation.continuous_batching.requests import FutureRequestState

from epslots.errors import PeerLost
from epslots.generation.batcher import Batcher
from epslots.generation.engine import Engine
from epslots.generation.next_token import choose
from epslots.generation.paged_batcher import PagedBatcher
from epslots.generation.requests import Output, Request
from epslots.generation.row_batcher import RowBatcher
from epslots.generation.tracked_request import GrammarProgress, TrackedRequest
from epslots.models.experts_interface import mixes_tokens
from tests.support import zoo
from tests.support.remembered import Reference, remembered


def drawn(model: PreTrainedModel, request: Request, grammar: GrammarProgress | None = None) -> list[int]:
    """The tokens that a request has to get: drawn one by one, from the model run anew over all before.

    Where the tokens of a pass change one another, with a cache: the prompt is one pass, and so is each new token.
    """
    entry = TrackedRequest(request, grammar_state=grammar if request.grammar else None)
    mixes, past = mixes_tokens(model), None
    with torch.no_grad():
        while entry.reason is None:
            ids = entry.tokens[-1:] if past else (*request.prompt, *entry.tokens)
            output = model(torch.tensor([ids]), use_cache=mixes, past_key_values=past)
            past = output.past_key_values if mixes else None
            (choice,) = choose(output.logits[:, -1].float(), [entry]).read()
            entry.append(choice)
    return entry.tokens


def prompt_of(length: int, seed: int = 2) -> tuple[int, ...]:
    return tuple(zoo.random_ids(1, length, seed=seed + length)[0].tolist())


def requests_of(sizes: tuple[tuple[int, int], ...], seed: int = 2) -> list[Request]:
    return [Request(f"r{i}", prompt_of(length, seed), new) for i, (length, new) in enumerate(sizes)]


def generated(model: PreTrainedModel | Reference, request: Request) -> list[int]:
    """The request's tokens by plain transformers, alone."""
    settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": sorted(request.stop_tokens) or None}
    ids = torch.tensor([request.prompt])
    return model.generate(ids, max_new_tokens=request.max_new_tokens, **settings)[0, len(request.prompt) :].tolist()


def expected_of(
    model: PreTrainedModel,
    requests: Sequence[Request],
    make: Callable[[PreTrainedModel, Request], list[int]] = generated,
) -> dict[str, list[int]]:
    """The results of ``make`` for each request, by id: computed once a session for models alike, which nothing may disturb."""
    kind = type(model).__name__, model.config.to_json_string(), model.config._attn_implementation
    weights = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values())).hexdigest()
    key = (*kind, getattr(model.config, "_experts_implementation", None), weights, make.__name__, requests)
    return remembered(key, lambda: {request.id: make(model, request) for request in requests})


class Collected:
    """Runs a batcher and gathers what comes out of it."""

    def __init__(self, batcher: Batcher) -> None:
        self.batcher = batcher
        self.tokens: dict[str, list[int]] = {}
        self.reasons: dict[str, str | None] = {}
        self.steps = 0
        self._threads = set(threading.enumerate())

    def take(self) -> list[Output]:
        assert set(threading.enumerate()) <= self._threads, "it starts none; earlier ones may end"
        outputs = self.batcher.outputs()
        for output in outputs:
            assert output.id not in self.reasons, "nothing follows an end"
            assert output.finished == (output.reason is not None)
            assert output.finished or output.tokens or output.prompt_logprobs
            assert output.error is None
            self.tokens.setdefault(output.id, []).extend(output.tokens)
            if output.finished:
                self.reasons[output.id] = output.reason
        return outputs

    def run(self, steps: int = 10_000, step: Callable[[], None] | None = None) -> Collected:
        for _ in range(steps):
            if not self.batcher.prepare():
                break
            (step or self.batcher.step)()
            self.steps += 1
            self.take()
        return self


def finish(batcher: Batcher, requests: list[Request]) -> Collected:
    for request in requests:
        batcher.add(request)
    return Collected(batcher).run()


def pages_are_free(batcher: PagedBatcher) -> bool:
    cache = batcher.processor.cache
    cache.evict_cached_blocks()
    cache.pool.try_to_free_sectors()
    return bool(cache.pool.num_free_sectors == cache.num_sectors)


def is_empty(batcher: Batcher) -> bool:
    """Whether no request has a place in the cache."""
    if isinstance(batcher, PagedBatcher):
        return pages_are_free(batcher)
    assert isinstance(batcher, RowBatcher)
    batcher.admission.make_room(batcher.capacity, batcher.max_requests)  # rows are kept for prompts that begin alike
    batcher.cache.check()
    return batcher.cache.free_rows == batcher.max_requests and batcher.cache.free_tokens == batcher.stats().kv_tokens


class ModelFree:
    """Lets a batcher make its steps without its model: all logits are 0. Only what is scheduled matters then.

    Args:
        step: called for each step.
    """

    def __init__(self, batcher: PagedBatcher, step: Callable[[list[FutureRequestState]], None] = lambda _: None) -> None:
        self._processor, self._step = batcher.processor, step
        self._processor._generation_step = self._generate

    def _generate(self, _model: PreTrainedModel) -> None:
        batch = self._processor.inputs_and_outputs
        self._step(batch.requests_in_batch)
        rows = len(batch.get_model_kwargs()["logits_indices"])
        self._processor.model_runner._sample(torch.zeros(1, rows, zoo.VOCAB), batch.output_ids)


class RowsModelFree:
    """The same for rows.

    Attributes:
        passes: of each pass, its requests in the order of their rows, and the new tokens of each.
    """

    def __init__(self, batcher: RowBatcher, step: Callable[[int], None] = lambda _: None) -> None:
        self.passes: list[tuple[tuple[str, ...], int]] = []
        self._batcher, self._step = batcher, step
        batcher._forward = self._forward  # type: ignore[method-assign]

    def _forward(self, part: Sequence[Any], width: int, _step: Any, wanted: range, *, is_last: bool) -> torch.Tensor:
        self.passes.append((tuple(running.entry.request.id for running in part), width))
        self._step(len(part) * width)
        return torch.zeros(len(part), len(wanted) + is_last, zoo.VOCAB)


class StepClock:
    """Time that passes with the tokens of a step: 10 ms, and 0.2 ms for each."""

    def __init__(self) -> None:
        self.now = 100.0
        self.steps: list[float] = []

    def __call__(self) -> float:
        return self.now

    def step(self, tokens: int) -> None:
        self.steps.append(0.010 + 0.0002 * tokens)
        self.now += self.steps[-1]


class Faults:
    """Makes each step's forward pass fail twice: before the last layer, and after it, when every layer has kept something."""

    def __init__(self, model: PreTrainedModel) -> None:
        last = next(m for m in model.get_decoder().modules() if isinstance(m, torch.nn.ModuleList))[-1]
        self.raised = self.calls = 0
        self._handles = [last.register_forward_pre_hook(self._before), last.register_forward_hook(self._after)]

    def _fail_at(self, call: int) -> None:
        if self.calls % 3 == call:
            self.raised += 1
            raise PeerLost("a peer was lost")

    def _before(self, *_: Any) -> None:
        self.calls += 1
        self._fail_at(1)

    def _after(self, *_: Any) -> None:
        self._fail_at(2)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def serve_all(engine: Engine, requests: list[Request]) -> dict[str, list[int]]:
    """The tokens of requests that an engine serves together, by id; it is closed then."""
    found: dict[str, list[int]] = {request.id: [] for request in requests}
    for request in requests:
        engine.batcher.add(request)
    for output in engine.run():
        assert output.error is None
        found[output.id] += output.tokens
    engine.batcher.close()
    return found
