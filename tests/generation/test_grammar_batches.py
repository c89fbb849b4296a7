"""Requests with grammars among others: texts are valid, mates' tokens unchanged, and no step waits for a grammar."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator
from transformers import PreTrainedModel

from epslots.errors import PeerLost
from epslots.generation.batcher import Batcher
from epslots.generation.engine import Engine
from epslots.generation.grammar import GrammarCompiler
from epslots.generation.grammar_queue import GrammarQueue
from epslots.generation.paged_batcher import PagedBatcher
from epslots.generation.requests import Grammar, Output, Request
from epslots.generation.row_batcher import RowBatcher
from epslots.generation.sampling import Sampling
from epslots.transport.local_transport import LocalTransport
from tests.support import zoo
from tests.support.batches import Faults, drawn, generated, is_empty, prompt_of, requests_of, serve_all
from tests.support.grouped_ranks import Grouped
from tests.support.hand_executor import HandExecutor
from tests.support.handed_over import copy_image
from tests.support.rank_helpers import run_threads
from tests.support.tokenizers import byte_level

SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "integer", "minimum": -9, "maximum": 99},
        "b": {"enum": ["x", "yy", True]},
        "c": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["a", "b", "c"],
    "additionalProperties": False,
}
TOKENIZER = byte_level(['{"', '":', "true", "false", "],", ', "', "11", "yy"])
END = TOKENIZER.eos_token_id
COMPILER = GrammarCompiler(TOKENIZER, zoo.VOCAB, [END])
BATCHERS = [PagedBatcher, RowBatcher]
# An untrained model likes blanks as much as anything.
NO_BLANKS = tuple((ord(blank), -100.0) for blank in " \n\t")
JSON = Request(
    "json",
    prompt_of(21),
    80,
    frozenset([END]),
    Sampling(logit_bias=NO_BLANKS),
    grammar=Grammar("json_schema", json.dumps(SCHEMA)),
)
DRAWN = replace(JSON, id="drawn", sampling=Sampling(1.0, seed=4, logit_bias=NO_BLANKS, min_tokens=2))
WORDS = replace(
    JSON, id="words", prompt=prompt_of(9), grammar=Grammar("regex", "(?:ab|cd){2,5}!"), sampling=Sampling(1.0, seed=9)
)
CONSTRAINED = [JSON, DRAWN, WORDS]
MATES = requests_of(((3, 12), (40, 8), (17, 5)))


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return zoo.ZOO["qwen3_moe"].build()


def opened(kind: type[Batcher], model: PreTrainedModel, executor: HandExecutor | None = None, **settings: Any) -> Batcher:
    batcher = kind(model, **{"kv_tokens": 512, "max_batch_tokens": 32, "max_requests": 16} | settings)
    batcher.grammars = GrammarQueue(lambda: COMPILER, executor)
    return batcher


def outputs_of(batcher: Batcher, step: Callable[[], None] | None = None) -> dict[str, Output]:
    """All tokens of each request, and its end."""
    found: dict[str, Output] = {}
    while batcher.has_work or len(batcher.grammars):
        if batcher.prepare():
            (step or batcher.step)()
        else:
            batcher.grammars.wait(10)
        for output in batcher.outputs():
            before = found[output.id].tokens if output.id in found else ()
            found[output.id] = replace(output, tokens=before + output.tokens)
    return found


def by_hand(model: PreTrainedModel, request: Request) -> list[int]:
    """A greedy text: at each place, the likeliest of the tokens that the mask allows."""
    assert request.grammar is not None
    state, tokens = COMPILER.start(request.grammar, request.stop_tokens), list(request.prompt)
    biases = dict(request.sampling.logit_bias)
    while not state.finished:
        with torch.no_grad():
            logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1].tolist()
        words = [int(word) for word in state.allowed()]
        allowed = [token for token in range(len(logits)) if words[token // 32] >> token % 32 & 1]
        tokens.append(max(allowed, key=lambda token: logits[token] + biases.get(token, 0.0)))
        state.accept(tokens[-1])
    return tokens[len(request.prompt) :]


def text_of(tokens: tuple[int, ...]) -> str:
    return str(TOKENIZER.decode(tokens, skip_special_tokens=True))


def check(found: dict[str, Output], model: PreTrainedModel) -> None:
    """Valid texts, the tokens that the requests have alone, and the mates' own."""
    for request in (JSON, DRAWN):
        assert Draft202012Validator(SCHEMA).is_valid(json.loads(text_of(found[request.id].tokens)))
    assert re.fullmatch("(?:ab|cd){2,5}!", text_of(found["words"].tokens))
    assert all(found[request.id].reason == "stop" for request in CONSTRAINED)
    assert list(found["json"].tokens) == by_hand(model, JSON)
    for request in (DRAWN, WORDS):
        assert request.grammar is not None
        assert list(found[request.id].tokens) == drawn(model, request, COMPILER.start(request.grammar, request.stop_tokens))
    for mate in MATES:
        assert list(found[mate.id].tokens) == generated(model, mate)


@pytest.mark.parametrize("kind", BATCHERS)
def test_texts_are_valid_and_mates_are_as_without_them(kind: type[Batcher], model: PreTrainedModel):
    batcher = opened(kind, model)
    for request in (MATES[0], JSON, MATES[1], DRAWN, WORDS, MATES[2]):
        batcher.add(request)
    check(outputs_of(batcher), model)
    batcher.close()


@pytest.mark.parametrize("kind", BATCHERS)
def test_steps_that_fail_leave_grammars_as_they_were(kind: type[Batcher], model: PreTrainedModel):
    """Every forward pass fails twice; and memory is so short that requests are computed again."""
    batcher, faults = opened(kind, model, kv_tokens=160), Faults(model)

    def step() -> None:
        while True:
            try:
                return batcher.step()
            except PeerLost:
                continue

    for request in (*MATES, *CONSTRAINED):
        batcher.add(request)
    found = outputs_of(batcher, step)
    faults.remove()
    assert faults.raised > 20
    check(found, model)
    batcher.close()


@pytest.mark.parametrize("kind", BATCHERS)
def test_others_go_on_while_a_grammar_is_compiled(kind: type[Batcher], model: PreTrainedModel):
    executor = HandExecutor()
    batcher = opened(kind, model, executor)
    batcher.add(JSON)
    assert not batcher.prepare() and batcher.has_work, "there is no step to make yet"
    batcher.add(replace(WORDS, id="cancelled"))
    for request in MATES:
        batcher.add(request)
    found: dict[str, list[int]] = {request.id: [] for request in MATES}
    for _ in range(3):
        assert batcher.prepare()
        batcher.step()
    batcher.cancel("cancelled")
    executor.run(0)
    executor.run(1)
    ends = {}
    while batcher.prepare():
        batcher.step()
        for output in batcher.outputs():
            found.setdefault(output.id, []).extend(output.tokens)
            ends |= {output.id: output.reason} if output.finished else {}
    assert ends == {"json": "stop", "cancelled": "cancelled", **{mate.id: "length" for mate in MATES}}
    assert found.pop("json") == by_hand(model, JSON)
    assert found.pop("cancelled") == []
    assert found == {mate.id: generated(model, mate) for mate in MATES}
    batcher.close()


@pytest.mark.parametrize("kind", BATCHERS)
def test_a_faulty_grammar_ends_its_request_alone(kind: type[Batcher], model: PreTrainedModel):
    """At once, or in the middle of its text; or because the checkpoint has no tokenizer."""
    batcher = opened(kind, model)
    batcher.add(replace(JSON, id="wrong", grammar=Grammar("regex", "(")))
    batcher.add(replace(JSON, id="none", grammar=Grammar("regex", "[a-z&&[0-9]]")))
    batcher.add(
        replace(JSON, id="heavy", grammar=Grammar("regex", "(?:(?:[ab]{0,100}){0,100}){0,100}"), stop_tokens=frozenset())
    )
    batcher.add(MATES[0])
    found = outputs_of(batcher)
    assert list(found[MATES[0].id].tokens) == generated(model, MATES[0])
    assert (found["wrong"].reason, found["wrong"].error) == ("error", "regex: unclosed group")
    assert (found["none"].reason, found["none"].tokens) == ("error", ())
    assert found["heavy"].error == "regex: lexer error: too many expressions constructed"
    assert re.fullmatch("[ab]+", text_of(found["heavy"].tokens)), "its text so far is delivered"
    batcher.close()


def test_a_grammar_needs_the_checkpoint_s_tokenizer(checkpoint: Callable[[str], Path]):
    batcher = PagedBatcher(zoo.reference(checkpoint("qwen3_moe")), kv_tokens=256)
    batcher.add(JSON)
    found = outputs_of(batcher)
    assert found["json"].error is not None
    assert re.match("a request with a grammar can't be served: .* has no tokenizer", found["json"].error)
    batcher.close()


@pytest.mark.parametrize("kind", BATCHERS)
def test_a_moved_request_goes_on_in_its_text(kind: type[Batcher], model: PreTrainedModel):
    """Also one whose text was complete, but for its end."""
    for steps in (3, 5, 9):
        batcher = opened(kind, model, HandExecutor())
        executor: Any = batcher.grammars._executor
        batcher.add(JSON)
        batcher.add(WORDS)
        executor.run(0)
        executor.run(1)
        found: dict[str, tuple[int, ...]] = {"json": (), "words": ()}
        for _ in range(steps):
            assert batcher.prepare()
            batcher.step()
            for output in batcher.outputs():
                found[output.id] += output.tokens
        unfinished = batcher.unfinished()
        batcher.close()
        other = opened(kind, model)
        for request, tokens in unfinished:
            other.add(request.after(tokens))
        for id, output in outputs_of(other).items():
            assert output.reason == "stop"
            found[id] += output.tokens
        other.close()
        assert list(found["json"]) == by_hand(model, JSON)
        assert WORDS.grammar is not None
        assert list(found["words"]) == drawn(model, WORDS, COMPILER.start(WORDS.grammar, WORDS.stop_tokens))


@pytest.mark.parametrize("kind", BATCHERS)
def test_requests_that_end_before_their_first_token_make_no_step(kind: type[Batcher], model: PreTrainedModel):
    """Cancelled while their grammar is compiled, complete when they were moved, or without any text to write."""
    executor = HandExecutor()
    batcher = opened(kind, model, executor)
    batcher.add(replace(WORDS, id="complete", prompt=(7, *b"abcd!"), resumed=5))
    batcher.add(replace(WORDS, id="none", grammar=Grammar("regex", "[a-z&&[0-9]]")))
    batcher.add(replace(WORDS, id="cancelled"))
    batcher.cancel("cancelled")
    assert [output.id for output in batcher.outputs()] == ["cancelled"]
    for job in range(3):
        executor.run(job)
    assert not batcher.prepare()
    assert [(output.id, output.tokens, output.reason) for output in batcher.outputs()] == [
        ("complete", (), "stop"),
        ("none", (), "error"),
    ]
    assert not batcher.has_work
    batcher.close()


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_next"])
def test_ranks_go_on_beside_one_that_waits_for_a_grammar(name: str, checkpoint: Callable[[str], Path], cache_dir: Path):
    """Rank 0 has nothing else; ``run`` ends for all when its text is complete, too."""
    folder = checkpoint(name)
    grouped = Grouped(folder, cache_dir, [2, 3])
    reference = zoo.reference(folder)

    def work(transport: LocalTransport) -> dict[str, list[int]]:
        engine = Engine(grouped.models[transport.rank], kv_tokens=512, max_batch_tokens=32)
        engine.batcher.grammars = GrammarQueue(lambda: COMPILER)
        requests = MATES if transport.rank else CONSTRAINED
        return serve_all(engine, requests)

    constrained, mates = run_threads(work, 2, hub=grouped.hub)
    assert constrained["json"] == by_hand(reference, JSON)
    assert mates == {mate.id: generated(reference, mate) for mate in MATES}
    grouped.check()


def test_no_rank_ends_while_one_waits_for_a_grammar(checkpoint: Callable[[str], Path], cache_dir: Path):
    """Rank 0's is ready when it has waited three times; rank 1 has nothing to do at all."""
    grouped = Grouped(checkpoint("qwen3_moe"), cache_dir, [2, 3])

    class SlowQueue(GrammarQueue[Any]):
        waits = 0

        def wait(self, timeout_s: float) -> None:
            self.waits += 1
            if self.waits == 3:
                assert isinstance(self._executor, HandExecutor)
                self._executor.run(0)

    def work(transport: LocalTransport) -> str:
        engine = Engine(grouped.models[transport.rank], kv_tokens=512)
        engine.batcher.grammars = queue = SlowQueue(lambda: COMPILER, HandExecutor())
        if transport.rank == 0:
            engine.batcher.add(WORDS)
        text = text_of(tuple(token for output in engine.run() for token in output.tokens))
        engine.batcher.close()
        assert queue.waits == (3 if transport.rank == 0 else 0)
        return text

    text, nothing = run_threads(work, 2, hub=grouped.hub)
    assert re.fullmatch("(?:ab|cd){2,5}!", text) and nothing == ""


def test_ends_come_by_the_end_token_where_the_text_may_go_on(model: PreTrainedModel):
    """A bias for the end token can't end a text too early, and ends it where it may end."""
    batcher = opened(PagedBatcher, model)
    wants_to_end = Sampling(logit_bias=((END, 100.0),))
    batcher.add(replace(WORDS, grammar=Grammar("regex", "ab(?:cd)*"), sampling=wants_to_end))
    found = outputs_of(batcher)["words"]
    assert (text_of(found.tokens), found.tokens[-1], found.reason) == ("ab", END, "stop")
    batcher.close()


@pytest.mark.parametrize("kind", BATCHERS)
def test_a_grammar_goes_on_in_another_batcher(kind: type[Batcher], model: PreTrainedModel):
    """With the cache of its request: what it allows next follows from the text so far."""
    source, target = opened(kind, model), opened(kind, model)
    for request in CONSTRAINED:
        source.add(request)
    before: dict[str, tuple[int, ...]] = {request.id: () for request in CONSTRAINED}
    while min(map(len, before.values())) < 3:
        if source.prepare():
            source.step()
        else:
            source.grammars.wait(10)
        for output in source.outputs():
            assert not output.finished
            before[output.id] += output.tokens
    for request in CONSTRAINED:
        image = source.hold(request.id)
        room = None if image is None else target.reserve(request.id, image.layout)
        assert image is not None and room is not None
        copy_image(image, room, 5000)
        target.add(request.after(before[request.id]))
        source.cancel(request.id)
    found = {id: (*before[id], *output.tokens) for id, output in outputs_of(target).items()}
    assert list(found["json"]) == by_hand(model, JSON)
    for request in (DRAWN, WORDS):
        assert request.grammar is not None
        assert list(found[request.id]) == drawn(model, request, COMPILER.start(request.grammar, request.stop_tokens))
    assert target.stats().prompt_tokens <= len(CONSTRAINED), "no prompt was computed again"
    assert not source.prepare() and not target.prepare()
    assert is_empty(source) and is_empty(target)


def test_a_place_is_given_up_with_its_request(model: PreTrainedModel):
    """One that is cancelled before its grammar is compiled."""
    executor = HandExecutor()
    source, target = opened(RowBatcher, model), opened(RowBatcher, model, executor)
    source.add(replace(JSON, grammar=None))
    while not source.outputs():
        assert source.prepare()
        source.step()
    image = source.hold("json")
    assert image is not None and target.reserve("json", image.layout) is not None
    target.add(JSON)
    target.cancel("json")
    executor.run(0)
    assert not target.prepare()
    assert is_empty(target)
