"""``epslots plan --groups``: what each role has room for, and what a hand-over costs."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from cluster.config import cluster_config
from epslots.errors import ConfigError
from epslots.models.known_shapes import known_model
from epslots.piece_sizes import PIECE_BYTES
from epslots.rank_groups import RankGroups, divide_ranks
from epslots.simulation.timing import DEVICES, HAND_OVER_FIXED_S, HOST_COPY_BYTES_S, LINK_SHARE

Run = Callable[..., tuple[int, str, str]]
MODEL = ("--model", "qwen3-30b-a3b", "--slots", "25%", "--memory", "80GiB", "--device", "cuda")


def test_roles_and_hand_overs(run: Run):
    options = ("--prefill-ranks", 4, "--decode-ranks", 12, "--kv-tokens", 8000, "--hand-over-tokens", "500,2000")
    code, out, _ = run("plan", *MODEL, *options, "--json")
    assert code == 0
    found = json.loads(out)
    assert (found["ranks"], found["groups"], found["group_ranks"], found["prefill_ranks"]) == (16, 4, 4, 4)
    assert found["slots_per_expert"] == 1.0, "of a group: four ranks with a quarter of the experts each"
    roles = {one["role"]: one for one in found["roles"]}
    assert (roles["prefill"]["groups"], roles["decode"]["groups"]) == (1, 3)
    assert (roles["prefill"]["kv_tokens"], roles["decode"]["kv_tokens"]) == (4 * 8000, 12 * 8000)
    assert roles["decode"]["kv_bytes"] == 12 * found["kv_bytes"]
    few, many = found["hand_overs"]
    assert (few["nbytes"], many["nbytes"]) == (500 * found["token_bytes"], 2000 * found["token_bytes"])
    assert many["network_s"] > many["node_s"] > few["node_s"]
    assert few["nbytes"] > PIECE_BYTES
    assert many["node_s"] - few["node_s"] == pytest.approx(1500 * found["token_bytes"] / HOST_COPY_BYTES_S), (
        "the longest stage"
    )
    first_s = 2 * PIECE_BYTES / (DEVICES["h100"].host * LINK_SHARE * 1e9) + 2 * PIECE_BYTES / HOST_COPY_BYTES_S
    assert few["node_s"] - (few["nbytes"] - PIECE_BYTES) / HOST_COPY_BYTES_S - first_s == pytest.approx(HAND_OVER_FIXED_S)


def test_groups_in_words(run: Run):
    code, out, err = run("plan", *MODEL, "--ranks", 8, "--groups", 2)
    assert code == 0 and "8 ranks in 2 groups" in out and "mixed" in out and "a hand-over" not in out
    assert "each of 8 ranks has" in err
    code, out, _ = run("plan", *MODEL, "--prefill-ranks", 2, "--decode-ranks", 2, "--machine", "l40s")
    assert code == 0 and "a hand-over from a prefill to a decode rank" in out and "l40s, by data sheet" in out
    code, _, err = run("plan", *MODEL[:4], "--memory", "8GiB", "--device", "cuda", "--ranks", 8, "--groups", 2)
    assert code == 1 and "doesn't fit: short of" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ranks", "8", "--groups", "3"), "groups=3 with ranks=8; allowed: a number that divides the ranks"),
        (
            ("--ranks", "8", "--prefill-ranks", "8"),
            "prefill_ranks=8, decode_ranks=0 with ranks=8; allowed: at least one of each",
        ),
        (("--prefill-ranks", "2", "--decode-ranks", "2", "--machine", "abacus"), "--machine 'abacus': allowed: a100"),
        (
            ("--prefill-ranks", "1", "--decode-ranks", "1", "--hand-over-tokens", "9999999"),
            "hand_over_tokens=9999999; allowed: 1 to",
        ),
        (("--prefill-ranks", "1", "--decode-ranks", "1", "--hand-over-tokens", "lots"), "--hand-over-tokens 'lots'; allowed"),
        (("--prefill-ranks", "1", "--decode-ranks", "1", "--hand-over-tokens", "9" * 5000), "--hand-over-tokens '9999"),
    ],
)
def test_divisions_that_can_not_be(run: Run, options: tuple[str, ...], message: str):
    code, _, err = run("plan", *MODEL, *options)
    assert code == 2 and message in err and "Traceback" not in err


def test_a_cluster_divides_as_its_plan_does():
    """One rule: the cluster's settings are the division's."""
    assert divide_ranks(None, 1, 2, 6) == RankGroups(8, 4, 2)
    config = cluster_config(prefill_ranks=2, decode_ranks=6)
    assert (config.ranks, config.groups, config.prefill_ranks) == (8, 4, 2)
    division = RankGroups(8, 4, 2)
    assert [division.role_of(group) for group in range(4)] == ["prefill", "decode", "decode", "decode"]
    assert divide_ranks(None, 2, 0, 0) is None
    with pytest.raises(ConfigError, match="decode_ranks=3; allowed with prefill_ranks"):
        divide_ranks(8, 1, 0, 3)
    assert known_model("qwen3-30b-a3b")[0].token_bytes == 98_304
