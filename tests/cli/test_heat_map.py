"""Pictures of placements."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from epslots.cli.heat_map import plot_map, text_map
from epslots.placement.placement import Placement, default_placement

TOKENS = np.array([10, 80, 10, 20])


def placed() -> Placement:
    """Expert 1, the hottest, on both ranks; 0 and 2 on rank 0, 3 on rank 1."""
    start = default_placement([4], np.full((1, 2), 3))
    wanted = np.array([[[1, 1, 1, 0], [0, 1, 0, 1]]], bool)
    return replace(start, version=1, wanted_LRE=wanted, home_LE=np.array([[0, 0, 0, 1]]))


def test_the_map_shows_who_holds_what_and_loads_before_and_after():
    lines = text_map(placed(), 0, TOKENS)
    rows = [line.split("|")[1] for line in lines[1:3]]
    assert [[cell != " " for cell in row] for row in rows] == [[True, False, True, True], [True, True, False, False]]
    assert rows[0][0] == "█" and rows[1][1] != "█"
    assert "3 copies" in lines[1] and "2 copies" in lines[2]
    loads = [[float(word) for word in line.split() if "." in word] for line in lines[5:7]]
    assert loads == [[1.5, 1.0], [0.5, 1.0]]
    assert "balance 0.667 -> 1.000" in lines[-1]


def test_many_experts_share_columns():
    start = default_placement([300], np.full((1, 4), 100))
    lines = text_map(start, 0, np.arange(300), width=50)
    assert all(len(line.split("|")[1]) == 50 for line in lines[1:5])


def test_a_png_is_written(tmp_path: Path):
    path = tmp_path / "map.png"
    plot_map(placed(), 0, TOKENS, path)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
