"""Compiled code is kept by what it was compiled from; and takes what it was made for alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from epslots.step.residency import settle

MODULE = """
import numpy as np
from epslots.compiled import compiled, prepare

@compiled("int64(int64[::1])")
def total(numbers):
    result = 0
    for number in numbers:
        result += number
    return result

def main():
    prepare()
    print(total(np.arange(5)), sum(total.stats.cache_hits.values()), sum(total.stats.cache_misses.values()))
"""


def run(folder: Path, cache: Path, module: str = MODULE, name: str = "summing") -> list[int]:
    """The sum, how often code was found, and how often it wasn't."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text(module)
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", f"import {name}; {name}.main()"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return [int(word) for word in done.stdout.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="XDG_CACHE_HOME is Linux's")
def test_what_was_compiled_in_one_folder_is_found_from_another(tmp_path: Path):
    cache = tmp_path / "cache"
    assert run(tmp_path / "first", cache) == [10, 0, 1]
    assert run(tmp_path / "second", cache) == [10, 1, 0]
    assert run(tmp_path / "third", cache, MODULE.replace("result = 0", "result = 1")) == [11, 0, 1]
    assert run(tmp_path / "fourth", cache, name="adding") == [10, 0, 1], "the same source elsewhere in a package is other code"


@pytest.mark.skipif(sys.platform != "linux", reason="XDG_CACHE_HOME is Linux's")
@pytest.mark.parametrize("harm", ["torn", "no folder"])
def test_a_cache_that_is_broken_or_not_there_costs_time_alone(harm: str, tmp_path: Path):
    cache = tmp_path / "cache"
    if harm == "no folder":
        cache.write_text("a file where the folder should be")
        assert run(tmp_path / "code", cache)[0] == 10
        return
    assert run(tmp_path / "code", cache) == [10, 0, 1]
    for kept in cache.rglob("*.nb?"):
        kept.write_bytes(kept.read_bytes()[:20])
    assert run(tmp_path / "code", cache) == [10, 0, 1]
    assert run(tmp_path / "code", cache) == [10, 1, 0], "and it is whole again"


def test_two_threads_prepare(tmp_path: Path):
    several = "threads = [threading.Thread(target=prepare) for _ in range(4)]"
    module = "import threading\n" + MODULE.replace(
        "    prepare()\n", f"    {several}\n    [t.start() for t in threads]\n    [t.join() for t in threads]\n"
    )
    assert "Thread" in module
    assert run(tmp_path / "code", tmp_path / "cache", module)[0] == 10


def test_other_types_are_an_error():
    with pytest.raises(TypeError):
        settle(np.zeros((1, 4), np.int32), np.zeros((1, 4), bool), np.array([2]), np.zeros(4, np.int64))  # type: ignore[arg-type]
