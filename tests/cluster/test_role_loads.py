"""Which ranks a prompt may go to, by role: prompts wait only for ranks that compute prompts, and move only if they can."""

from __future__ import annotations

from cluster.driver.hand_over_costs import FIRST_SHORT_TOKENS
from cluster.driver.rank_loads import RankCapacity
from cluster.driver.role_loads import RoleLoads
from cluster.driver.scheduled_request import MoveClaim
from epslots.rank_groups import Role


def loads_of(**roles: Role) -> RoleLoads:
    loads = RoleLoads()
    for worker, role in roles.items():
        loads.serve(worker, RankCapacity(1000, 16, role=role))
    return loads


def test_prompts_wait_for_no_decode_rank():
    """One that forms anew will not compute them before the others do."""
    loads = loads_of(d="decode", e="decode")
    loads.pause("d", soon=True)
    assert loads.for_prompt(MoveClaim(50, 60), lambda _: 0) is loads._decoding
    loads = loads_of(p="prefill", d="decode")
    loads.pause("p", soon=True)
    assert loads.for_prompt(MoveClaim(50, 60), lambda _: 0) is loads._prompts


def test_a_prompt_stays_where_most_of_it_is_cached():
    loads, request = loads_of(p="prefill", d="decode"), MoveClaim(10 * FIRST_SHORT_TOKENS, 60)
    assert loads.for_prompt(request, lambda _: 8 * FIRST_SHORT_TOKENS) is loads._prompts
    assert loads.for_prompt(request, lambda _: 9 * FIRST_SHORT_TOKENS) is loads._decoding


def test_a_prompt_waits_for_no_long_line():
    """It stays where decoding is when the prompts before it, elsewhere, take longer than it would hold up others."""
    loads = loads_of(p="prefill", d="decode")
    loads.costs.observe(100, 0.03, prompt_token_s=0.001, near=False)
    loads._decoding.add("d", MoveClaim(50, 60))
    request = MoveClaim(100, 120)
    found = []
    for _ in range(3):
        found.append(loads.for_prompt(request, lambda _: 0) is loads._prompts)
        loads._prompts.add("p", MoveClaim(100, 100))
    assert found == [True, True, False], "200 ms of two requests, against 30 ms and 100 of each prompt"


def test_the_longest_line_is_one_without_room():
    """A prompt that fits nowhere else doesn't wait for it either, and holds up none behind it."""
    loads = loads_of(p="prefill", q="prefill", d="decode")
    loads.costs.observe(100, 0.03, prompt_token_s=0.001, near=False)
    for worker in "pq":
        loads._prompts.add(worker, MoveClaim(900, 900))
    request = MoveClaim(200, 220)
    assert loads._prompts.least_loaded(request) is None and loads._prompts.mean_cost == 900
    assert loads.for_prompt(request, lambda _: 0) is loads._decoding
    for worker in "pq":
        loads._prompts.drop(worker, MoveClaim(900, 900))
    assert loads._prompts.mean_cost == 0 and loads.for_prompt(request, lambda _: 0) is loads._prompts
    loads._prompts.add("q", MoveClaim(60, 60))
    loads.remove("q")
    assert loads._prompts.mean_cost == 0


def test_requests_are_handed_over_where_another_rank_decodes():
    loads = loads_of(p="prefill", d="decode", m="mixed")
    assert [loads.hands_over(worker) for worker in ("p", "d", "m", "gone")] == [True, False, False, False]
    loads.pause("d")
    assert loads.hands_over("p"), "once it serves again: until then the rank has no more to compute than prompts"
    loads.remove("d")
    assert not loads.hands_over("p")
