"""Groups' places near each other, by nodes' labels: as near as there is room, and never where there is none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.ray_backend.nodes import Node
from cluster.ray_backend.topology import LEVELS, near_labels

RACK, ZONE, REGION = "epslots/rack", "ray.io/availability-zone", "ray.io/region"
CPU = {"CPU": 1.0}


def node(id: str, room: int, **labels: str) -> Node:
    names = {"rack": RACK, "zone": ZONE, "region": REGION}
    return Node(id, "10.0.0.1", id, CPU, {"CPU": room}, {names[name]: value for name, value in labels.items()})


FLEET = [
    node("a1", 4, rack="a", zone="x", region="r"),
    node("a2", 4, rack="a", zone="x", region="r"),
    node("b1", 4, rack="b", zone="x", region="r"),
    node("c1", 4, rack="c", zone="y", region="r"),
    node("c2", 8, rack="c", zone="y", region="r"),
]


@pytest.mark.parametrize(
    ("parts", "wanted"),
    [
        ([4], [{}]),
        ([8], [{}]),  # c2
        ([7, 7], [{}, {RACK: "a"}]),  # c2 is taken; then rack a, which is fuller than rack c
        ([9], [{RACK: "c"}]),
        ([12, 8], [{RACK: "c"}, {RACK: "a"}]),
        ([12, 12], [{RACK: "c"}, {ZONE: "x"}]),
        ([13], [{REGION: "r"}]),
        ([24, 1], [{REGION: "r"}, {}]),  # no room for the second: Ray says so
    ],
)
def test_a_group_gets_the_smallest_domain_with_room(parts: list[int], wanted: list[dict[str, str]]):
    assert near_labels(FLEET, CPU, [(count, ()) for count in parts]) == wanted


def test_nodes_without_labels_are_any_nodes():
    assert near_labels([node("1", 2), node("2", 2)], CPU, [(3, ()), (1, ())]) == [{}, {}]
    assert near_labels([node("1", 2), node("2", 2, rack="a"), node("3", 2, rack="a")], CPU, [(3, ())]) == [{RACK: "a"}]


def test_a_group_that_grows_stays_where_it_is():
    assert near_labels(FLEET, CPU, [(6, ["a1"])]) == [{RACK: "a"}]
    assert near_labels(FLEET, CPU, [(6, ["b1"]), (6, ["a1"])]) == [{ZONE: "x"}, {RACK: "a"}], "two left on a1, four on a2"
    assert near_labels(FLEET, CPU, [(7, ["b1"]), (6, ["a1"])]) == [{ZONE: "x"}, {REGION: "r"}], "one less"
    assert near_labels(FLEET, CPU, [(6, ["lost"])]) == [{}], "no domain is nearer to it than another"
    assert near_labels(FLEET, CPU, [(1, ["a1"])]) == [{RACK: "a"}], "Ray doesn't know that a1 has room for it, and is its node"


NODES = st.lists(
    st.tuples(st.integers(0, 6), st.sampled_from([None, "a", "b"]), st.sampled_from([None, "x", "y"])), min_size=1, max_size=7
)


@given(NODES, st.lists(st.integers(1, 9), min_size=1, max_size=3))
def test_labels_have_room_and_none_nearer_has(fleet: list[tuple[int, str | None, str | None]], parts: list[int]):
    """Of the first group: the rooms of the next ones depend on where it went."""
    labels = [{name: value for name, value in (("rack", rack), ("zone", zone)) if value} for _, rack, zone in fleet]
    nodes = [node(str(number), room, **labels[number]) for number, (room, *_) in enumerate(fleet)]
    rooms = {
        (level, value): sum(int(one.free["CPU"]) for one in nodes if one.labels.get(level) == value)
        for level in LEVELS
        for value in {one.labels.get(level) for one in nodes} - {None}
    }
    found = near_labels(nodes, CPU, [(count, ()) for count in parts])
    assert len(found) == len(parts)
    fits_one = max(one.free["CPU"] for one in nodes) >= parts[0]
    if found[0]:
        ((level, value),) = found[0].items()
        assert not fits_one and rooms[level, value] >= parts[0]
        nearer = LEVELS[: LEVELS.index(level)]
        assert not any(room >= parts[0] for (other, _), room in rooms.items() if other in nearer)
        assert all(room >= rooms[level, value] for (other, _), room in rooms.items() if other == level and room >= parts[0])
    else:
        assert fits_one or not any(room >= parts[0] for room in rooms.values())
