"""A request that goes on in another batcher, with its cache, gets the tokens that it would have got where it was."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache
from typing import Any

import msgspec
import pytest
import torch
from transformers import PreTrainedModel

from epslots.errors import RankMismatchError, UnsupportedModelError
from epslots.generation.batcher import Batcher
from epslots.generation.batchers import batcher_for
from epslots.generation.cache_image import CacheGone
from epslots.generation.cache_layout import CacheLayout, KeptTensor
from epslots.generation.requests import Request
from epslots.generation.row_batcher import RowBatcher
from epslots.generation.sampling import Sampling
from tests.support import zoo
from tests.support.batches import Collected, drawn, is_empty, prompt_of
from tests.support.handed_over import copy_image, hand_over

MODELS = {**zoo.ZOO, **zoo.STRESSED}
# States; windows; latents and an indexer; layers with objects of their own; a cache with states of its own. In pages: full
# attention and windows; flat rows.
ROWS = ("qwen3_next", "mimo_v2_flash", "glm_moe_dsa", "deepseek_v4", "minimax")
PAGES = ("gpt_oss", "deepseek_v3")
if os.environ.get("EPSLOTS_WHOLE_ZOO"):
    ROWS, PAGES = tuple(MODELS), tuple(MODELS)
CASES = [(name, "rows") for name in ROWS] + [(name, "pages") for name in PAGES]
GREEDY = Request("greedy", prompt_of(23), 9)
DRAWN = Request("drawn", prompt_of(40), 8, sampling=Sampling(1.2, seed=5, presence_penalty=0.7, repetition_penalty=1.3))
LONG = Request("long", prompt_of(60), 9)
MATES = [Request("mate", prompt_of(9), 12), Request("late", prompt_of(31), 5)]


@cache
def model_of(name: str) -> PreTrainedModel:
    model = MODELS[name].build()
    if MODELS[name].interface:
        model.set_experts_implementation("eager")  # takes any strides
    return model


def opened(name: str, kind: str, **given: Any) -> Batcher:
    return batcher_for(model_of(name), cache=kind, **{"kv_tokens": 256, "max_requests": 4, "max_batch_tokens": 32} | given)


def decode(batcher: Batcher, requests: list[Request], tokens: int) -> Collected:
    """Until each has so many tokens."""
    for request in requests:
        batcher.add(request)
    collected = Collected(batcher)
    while min(len(collected.tokens.get(request.id, ())) for request in requests) < tokens:
        collected.run(1)
    return collected


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_tokens_go_on_as_they_were(name: str, kind: str):
    """One that is drawn, and a greedy one; beside others on both sides, in pieces of any size; and once more, back."""
    expected = {request.id: drawn(model_of(name), request) for request in (GREEDY, DRAWN)}
    try:
        source, target = opened(name, kind), opened(name, kind)
    except UnsupportedModelError:
        pytest.skip("it has no pages")
    here, there = decode(source, [GREEDY, DRAWN, MATES[0]], 2), decode(target, [MATES[1]], 1)
    rests = {DRAWN.id: hand_over(DRAWN, here, target, 1000), GREEDY.id: hand_over(GREEDY, here, target, 1 << 20)}
    here.take()
    there.run(2)
    target.cancel("late")
    rest = rests[GREEDY.id]
    back = rest.after(there.tokens.get(GREEDY.id, []))
    hand_over(rest, there, source)
    there.run()
    again = Collected(source).run()
    for id, tokens in expected.items():
        assert here.tokens[id] + there.tokens[id] + again.tokens.get(id, []) == tokens, id
    assert len(again.tokens[GREEDY.id]) == back.max_new_tokens
    computed = target.stats().prompt_tokens
    assert computed <= 31 + 2, "the prompts that came with their caches weren't computed"
    assert is_empty(source) and is_empty(target)
    target.close()
    source.close()  # last, as it was opened first: each leaves the model as it found it


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_cache_travels_while_it_is_computed(name: str, kind: str):
    """Parts read after a step are final, or come with the last token: windows, and states that steps change in place."""
    expected = {request.id: drawn(model_of(name), request) for request in (LONG, MATES[0])}
    try:
        source, target = opened(name, kind), opened(name, kind)
    except UnsupportedModelError:
        pytest.skip("it has no pages")
    here = decode(source, [MATES[0]], 1)
    source.add(LONG)
    while not source.prompts() and LONG.id not in here.tokens:
        here.run(1)
    if LONG.id in here.tokens:
        assert isinstance(source, RowBatcher)
        assert source.cache.keeps_objects or source._support.whole_prompts, "no others wait for the end"
        return
    image = source.hold(LONG.id)
    assert image is not None and not source._entries[LONG.id].held
    room = target.reserve(LONG.id, image.layout)
    assert room is not None
    parts = [0]
    for _ in range(20):
        parts.append(image.advance())
        for piece in image.layout.pieces(1000, *parts[-2:]):
            room.write(piece, image.read(piece))
        here.run(1)
        if parts[-1] == len(LONG.prompt):
            break
    assert parts[-1] == len(LONG.prompt) and parts == sorted(parts) and len(set(parts)) > 2
    assert len(here.tokens[LONG.id]) == 1, "it paused at its first token"
    room.complete()
    rest = LONG.after(here.tokens[LONG.id])
    target.add(rest)
    source.cancel(LONG.id)
    there = Collected(target).run()
    assert here.tokens[LONG.id] + there.tokens[LONG.id] == expected[LONG.id]
    assert target.stats().prompt_tokens <= 1
    here.run()
    assert here.tokens["mate"] == expected["mate"]
    assert is_empty(source) and is_empty(target)
    target.close()
    source.close()  # last, as it was opened first: each leaves the model as it found it


@pytest.mark.parametrize("kind", ["rows", "pages"])
class TestRoom:
    """Places that are held or reserved, and requests that need them."""

    name = "mixtral"

    def test_a_full_cache_reserves_nothing(self, kind: str):
        source, target = opened(self.name, kind), opened(self.name, kind, kv_tokens=64)
        here = decode(source, [GREEDY], 1)
        there = decode(target, [replace(DRAWN, max_new_tokens=20)], 1)
        image = source.hold("greedy")
        assert image is not None
        assert target.reserve("greedy", image.layout) is None
        source.resume("greedy")
        assert here.run().tokens["greedy"] == drawn(model_of(self.name), GREEDY), "it went on where it was"
        there.run()
        assert target.reserve("greedy", image.layout) is not None, "now there is room"
        target.release("greedy")
        assert is_empty(source) and is_empty(target)

    def test_a_prompts_last_token_is_computed_where_the_others_were(self, kind: str):
        """Its hand-over begins when all but that one are there, and goes on with it."""
        source = opened(self.name, kind)
        source.add(request := Request("greedy", prompt_of(33), 4))
        collected = Collected(source).run(1)
        assert (source.stats().prompt_tokens, source.hold("greedy") is not None) == (32, True)
        assert source.has_work, "it isn't held before its first token"
        collected.run()
        assert source.stats().prompt_tokens == 33
        assert collected.tokens["greedy"] == drawn(model_of(self.name), request)[:1], "it waits for its place then"
        source.cancel("greedy")
        collected.run()
        assert is_empty(source)

    def test_an_incomplete_place_is_not_used(self, kind: str):
        """Nor one of another sequence: the prompt is computed."""
        source, target = opened(self.name, kind), opened(self.name, kind)
        here = decode(source, [GREEDY], 2)
        image = source.hold("greedy")
        assert image is not None
        rest = GREEDY.after(here.tokens["greedy"])
        assert target.reserve("greedy", image.layout) is not None
        other = target.reserve("drawn", image.layout)
        assert other is not None
        copy_image(image, other, 4096)
        target.add(rest)
        target.add(DRAWN)
        there = Collected(target).run()
        assert here.tokens["greedy"] + there.tokens["greedy"] == drawn(model_of(self.name), GREEDY)
        assert there.tokens["drawn"] == drawn(model_of(self.name), DRAWN)
        assert target.stats().prompt_tokens == len(rest.prompt) + len(DRAWN.prompt)
        with pytest.raises(CacheGone):
            other.read(next(image.layout.pieces(100)))
        source.cancel_all()
        assert not source.prepare()
        assert is_empty(source) and is_empty(target)

    def test_a_held_place_is_given_up_for_others(self, kind: str):
        """A request that is first in turn goes on though another is held; the held one is computed again."""
        first, held = Request("first", prompt_of(20), 60), Request("held", prompt_of(30), 20)
        source = opened(self.name, kind, kv_tokens=96, prefix_cache=False)
        here = decode(source, [first, held], 1)
        image = source.hold("held")
        assert image is not None
        before = len(here.tokens["held"])
        while not image.gone:
            here.run(1)
        assert len(here.tokens["held"]) == before, "it made no step while it was held"
        assert source.stats().preempted == 1
        here.run()
        for request in (first, held):
            assert here.tokens[request.id] == drawn(model_of(self.name), request)
        assert is_empty(source)

    @pytest.mark.parametrize("prepared", [False, True])
    def test_a_forgotten_request_may_come_back_at_once(self, kind: str, prepared: bool):
        """Under its old id, whether it was held or is in a step that is kept; nothing is said of its first end."""
        source = opened(self.name, kind)
        here = decode(source, [GREEDY, DRAWN], 2)
        assert source.prepare() if prepared else source.hold("greedy") is not None
        source.forget("greedy")
        source.add(GREEDY.after(here.tokens["greedy"]))
        source.forget("unknown")
        here.run()
        for request in (GREEDY, DRAWN):
            assert here.tokens[request.id] == drawn(model_of(self.name), request)
            assert here.reasons[request.id] == "length"
        assert is_empty(source)

    def test_waiting_requests_wait_for_hand_overs(self, kind: str):
        """There is no step to make until the place is free, and no request is lost for it."""
        source = opened(self.name, kind, kv_tokens=64)
        here = decode(source, [DRAWN], 1)
        image = source.hold("drawn")
        assert image is not None
        source.add(replace(GREEDY, max_new_tokens=20))
        assert not source.prepare() and source.has_work
        assert not image.gone and source.stats().preempted == 0
        source.cancel("drawn")
        assert here.run().tokens["greedy"] == drawn(model_of(self.name), replace(GREEDY, max_new_tokens=20))
        target = opened(self.name, kind, kv_tokens=64)
        source.add(DRAWN)
        here.reasons.clear()
        here.run(4)
        image = source.hold("drawn")
        assert image is not None
        assert target.reserve("drawn", image.layout) is not None
        target.add(replace(GREEDY, max_new_tokens=20))
        assert not target.prepare()
        target.cancel_all()
        assert is_empty(target), "all that is reserved goes with all requests"
        assert not source.has_work, "a request that is held needs no step"

    def test_others_begin_beside_one_that_is_held(self, kind: str):
        source = opened(self.name, kind)
        here = decode(source, [DRAWN], 1)
        image = source.hold("drawn")
        source.add(GREEDY)
        assert here.run().tokens["greedy"] == drawn(model_of(self.name), GREEDY)
        assert image is not None and not image.gone
        source.resume("drawn")
        assert here.run().tokens["drawn"] == drawn(model_of(self.name), DRAWN)

    def test_a_reserved_place_is_one_of_those_that_run(self, kind: str):
        source, target = opened(self.name, kind), opened(self.name, kind, max_requests=2)
        decode(source, [GREEDY], 1)
        there = decode(target, [DRAWN], 1)
        image = source.hold("greedy")
        assert image is not None and target.reserve("greedy", image.layout) is not None
        target.add(third := Request("third", prompt_of(5), 3))
        there.run(2)
        assert (target.stats().running, target.stats().waiting) == (1, 1)
        target.release("greedy")
        assert there.run().tokens["third"] == drawn(model_of(self.name), third)

    def test_others_layouts_are_refused(self, kind: str):
        source, target = opened(self.name, kind), opened(self.name, kind)
        decode(source, [GREEDY], 1)
        image = source.hold("greedy")
        assert image is not None
        wrong = msgspec.structs.replace(image.layout, tensors=image.layout.tensors[1:])
        with pytest.raises(RankMismatchError, match="a request's cache"):
            target.reserve("greedy", wrong)
        assert is_empty(target)

    def test_tokens_of_a_step_under_way_dont_count(self, kind: str):
        source = opened(self.name, kind)
        assert source.hold("nobody") is None
        source.add(LONG)
        assert source.hold(LONG.id) is None, "it has no place yet"
        assert source.prepare()
        assert source.hold(LONG.id) is None and not source.prompts(), "its batch is prepared"
        source.step()
        image = source.hold(LONG.id)
        assert image is not None and source.prompts() == [(LONG.id, 32, 28, 0)]
        assert (image.advance(), image.layout.tokens) == (32, 60)
        assert source.prepare()
        assert image.advance() == 32
        source.step()
        assert image.advance() == 60 and not source.prompts()
        assert not source.prepare() and not source.has_work, "it pauses"
        source.resume(LONG.id)
        assert image.gone and Collected(source).run().tokens[LONG.id] == drawn(model_of(self.name), LONG)

    @pytest.mark.parametrize("way", ["length", "cancelled", "error"])
    def test_a_prompt_that_ends_has_no_image(self, kind: str, way: str):
        """Its place may be another's at once."""
        source = opened(self.name, kind)
        source.add(replace(LONG, max_new_tokens=1))
        here = Collected(source).run(1)
        image = source.hold(LONG.id)
        assert image is not None and not image.gone
        if way == "cancelled":
            source.cancel(LONG.id)
        elif way == "error":
            source._entries[LONG.id].end("error", "a fault, says the test")
        else:
            here.run()
        assert image.gone
        with pytest.raises(CacheGone):
            image.advance()
        if way != "error":
            here.run()
            assert is_empty(source)


def layout_of(*entries: tuple[int, int]) -> CacheLayout:
    """A layout of tensors with so many entries, of so many bytes."""
    kept = tuple(KeptTensor(f"{i}.keys", "bool", count, (size,)) for i, (count, size) in enumerate(entries))
    return CacheLayout("rows", 5, b"", kept)


@pytest.mark.parametrize("most", [1, 7, 16, 100])
def test_pieces_have_every_byte_once(most: int):
    """In order; and none has more bytes than it may, but for a single larger entry."""
    layout = layout_of((5, 4), (0, 8), (3, 0), (1, 9), (7, 1))
    pieces = list(layout.pieces(most))
    covered = [(part.tensor, entry) for piece in pieces for part in piece for entry in range(part.start, part.end)]
    assert covered == [(0, i) for i in range(5)] + [(3, 0)] + [(4, i) for i in range(7)]
    for piece in pieces:
        entries = sum(part.end - part.start for part in piece)
        assert layout.piece_bytes(piece) <= most or entries == 1
    assert sum(map(layout.piece_bytes, pieces)) == layout.nbytes == 36


@pytest.mark.parametrize("most", [1, 7, 100])
def test_parts_have_every_byte_once(most: int):
    """Of tensors that grow, each part has its tokens; others come with the last one."""
    fixed, grown = layout_of((4, 3), (0, 8), (7, 1)), layout_of((5, 4), (5, 9))
    layout = msgspec.structs.replace(
        fixed, tensors=(*(msgspec.structs.replace(kept, grows=True) for kept in grown.tensors), *fixed.tensors)
    )
    assert layout.grows and not fixed.grows
    covered: list[tuple[int, int]] = []
    for first, end in ((0, 2), (2, 3), (3, 5)):
        part = {
            (each.tensor, entry)
            for piece in layout.pieces(most, first, end)
            for each in piece
            for entry in range(each.start, each.end)
        }
        grows = {(tensor, token) for tensor in (0, 1) for token in range(first, end)}
        assert part - grows == (set() if end < 5 else {(2, i) for i in range(4)} | {(4, i) for i in range(7)})
        assert grows <= part
        covered += part
    assert len(covered) == len(set(covered)) == 10 + 4 + 7


def test_layouts_travel_as_messages():
    batcher = opened("deepseek_v4", "rows")
    decode(batcher, [GREEDY], 1)
    image = batcher.hold("greedy")
    assert image is not None and image.layout.facts
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(image.layout), type=CacheLayout) == image.layout
    assert all(tensor.dtype in ("float32", "int64") for tensor in image.layout.tensors)
    assert image.read(next(image.layout.pieces(64))).dtype == torch.uint8
