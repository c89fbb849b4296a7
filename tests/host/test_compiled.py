"""Compiled code is kept by what it was compiled from; and takes what it was made for alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from epslots.planner.evictions import plan_evictions

MODULE = """
import numpy as np
from epslots.compiled import callback, compiled, prepare

@callback("void(int64)")
def nothing(number):
    pass

@compiled("int64(int64[::1])")
def total(numbers):
    result = 0
    for number in numbers:
        result += number
    return result

def main():
    prepare()
    nothing.ctypes(1)
    kept = nothing.cache_hits + sum(total.stats.cache_hits.values())
    print(total(np.arange(5)), kept, sum(total.stats.cache_misses.values()))
"""


def run(folder: Path, cache: Path, module: str = MODULE, name: str = "summing", *, warns: bool = False) -> list[int]:
    """The sum, how often code was found, and how often it wasn't."""
    path = folder.joinpath(*name.split(".")).with_suffix(".py")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(module)
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", f"import {name} as module; module.main()"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert bool(done.stderr) == warns, done.stderr
    return [int(word) for word in done.stdout.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="XDG_CACHE_HOME is Linux's")
def test_what_was_compiled_in_one_folder_is_found_from_another(tmp_path: Path):
    cache = tmp_path / "cache"
    assert run(tmp_path / "first", cache) == [10, 0, 1]
    assert run(tmp_path / "second", cache) == [10, 2, 0]
    assert run(tmp_path / "third", cache, MODULE.replace("result = 0", "result = 1")) == [11, 0, 1]
    assert run(tmp_path / "fourth", cache, name="adding.summing") == [10, 0, 1], "the same source elsewhere is other code"


@pytest.mark.skipif(sys.platform != "linux", reason="XDG_CACHE_HOME is Linux's")
def test_code_follows_the_modules_that_it_imports_from(tmp_path: Path):
    part = "from epslots.compiled import inlined\n\n@inlined\ndef first():\n    return 0\n"
    caller = MODULE.replace("import numpy as np\n", "import numpy as np\nfrom adding.part import first\n")
    caller = caller.replace("result = 0", "result = first()")
    (tmp_path / "adding").mkdir()

    def run_with(part: str) -> list[int]:
        (tmp_path / "adding" / "part.py").write_text(part)
        return run(tmp_path, tmp_path / "cache", caller, name="adding.summing")

    assert run_with(part) == [10, 0, 1]
    assert run_with(part) == [10, 2, 0]
    assert run_with(part.replace("return 0", "return 1")) == [11, 0, 1]


@pytest.mark.skipif(sys.platform != "linux", reason="XDG_CACHE_HOME is Linux's")
@pytest.mark.parametrize("harm", ["torn", "no folder"])
def test_a_cache_that_is_broken_or_not_there_costs_time_alone(harm: str, tmp_path: Path):
    cache = tmp_path / "cache"
    if harm == "no folder":
        cache.write_text("a file where the folder should be")
        assert run(tmp_path / "code", cache)[0] == 10  # it is kept beside the module
        return
    assert run(tmp_path / "code", cache) == [10, 0, 1]
    for kept in cache.rglob("*.nb?"):
        kept.write_bytes(kept.read_bytes()[:20])
    assert run(tmp_path / "code", cache, warns=True) == [10, 0, 1]
    assert run(tmp_path / "code", cache) == [10, 2, 0], "and it is whole again"


def test_several_threads_prepare(tmp_path: Path):
    """Nothing is passed over: what was not compiled with the rest would be compiled in a step, and kept nowhere."""
    more = "\n".join(f"@compiled('int64(int64)')\ndef plus{n}(number):\n    return number + {n}\n" for n in range(6))
    main = """
def main():
    threads = [threading.Thread(target=prepare) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    print(sum(each._can_compile for each in (total, plus0, plus1, plus2, plus3, plus4, plus5)))
"""
    module = "import threading\n" + MODULE.partition("def main")[0] + more + main
    assert run(tmp_path / "code", tmp_path / "cache", module) == [0]


@pytest.mark.skipif(sys.platform != "linux", reason="XDG_CACHE_HOME is Linux's")
def test_processes_that_start_together_compile_once(tmp_path: Path):
    """While this one waits for the lock, another compiles."""
    waiting = MODULE.replace("from epslots", "import epslots.compiled as compiled_code\nfrom epslots", 1).replace(
        "    prepare()\n",
        """    import fcntl, subprocess, sys
    if len(sys.argv) < 2:
        compiled_code._SEARCH_S = 0.0  # it finds that there is much to compile
        flock, other = fcntl.flock, [sys.executable, "-c", "import summing; summing.main()", "other"]
        fcntl.flock = lambda *lock: (subprocess.run(other, check=True, stdout=subprocess.DEVNULL), flock(*lock))
    prepare()
""",
    )
    assert run(tmp_path / "code", tmp_path / "cache", waiting) == [10, 2, 0]


def test_other_types_are_an_error():
    with pytest.raises(TypeError):
        plan_evictions(np.zeros((1, 4), np.int32), np.zeros((1, 4), bool), np.array([2]), np.zeros(4, np.int64))  # type: ignore[arg-type]
