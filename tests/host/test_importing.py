"""Imports that are deferred: nothing is executed before it is needed, and then all of it, once, for all threads."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from epslots.importing import defer_import

NAME = "a_package_of_the_test"
CODE = """
import threading
import a_package_of_the_test as itself
began = threading.Event()
may_end = threading.Event()
there = hasattr(itself, "value")
import a_package_of_the_test.part
began.set()
may_end.wait()
value = 5
def __getattr__(name):
    if name == "old":
        return value
    raise AttributeError(name)
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / "__init__.py").write_text(CODE.replace("may_end.wait()", "pass"))
    (tmp_path / NAME / "part.py").write_text("here = True")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / NAME
    for name in [name for name in sys.modules if name.partition(".")[0] == NAME]:
        del sys.modules[name]


def is_executed() -> bool:
    return "value" in vars(sys.modules[NAME])


def test_a_package_comes_when_it_is_needed(package: Path):
    defer_import(NAME)
    found: Any = importlib.import_module(NAME)
    assert importlib.util.find_spec(NAME) is found.__spec__
    assert Path(found.__file__) == package / "__init__.py"
    assert not is_executed()
    assert found.value == 5
    assert type(found) is ModuleType
    assert not found.there, "while it is executed, it isn't there yet"
    assert found.old == 5, "its own rule for attributes"
    assert importlib.reload(found) is found


def test_a_part_brings_its_package(package: Path):
    defer_import(NAME)
    assert importlib.import_module(f"{NAME}.part").here
    assert is_executed()


def test_names_of_a_package_bring_it(package: Path):
    defer_import(NAME)
    space: dict[str, Any] = {}
    exec(f"from {NAME} import value, part", space)
    assert (space["value"], space["part"].here) == (5, True)


def test_what_is_there_or_nowhere_is_left_alone(package: Path):
    there = importlib.import_module(NAME)
    defer_import(NAME)
    assert sys.modules[NAME] is there
    defer_import("no_such_package_of_the_test")
    assert "no_such_package_of_the_test" not in sys.modules


def test_another_thread_waits_until_all_is_there(package: Path):
    (package / "__init__.py").write_text(CODE)
    defer_import(NAME)
    module: Any = sys.modules[NAME]
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(module.value)) for _ in range(2)]
    threads[0].start()
    while "may_end" not in vars(module):
        threads[0].join(0.001)
    vars(module)["began"].wait()
    threads[1].start()
    threads[1].join(0.01)
    assert found == []
    vars(module)["may_end"].set()
    for thread in threads:
        thread.join()
    assert found == [5, 5]


def test_a_package_that_fails_says_why(package: Path):
    (package / "__init__.py").write_text("raise ImportError('a library is missing')")
    defer_import(NAME)
    module: Any = sys.modules[NAME]
    with pytest.raises(ImportError, match="a library is missing"):
        module.value  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'value'"):
        module.value  # noqa: B018
