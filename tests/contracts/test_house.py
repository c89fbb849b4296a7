"""The house rules that a script can see: names that stand for one thing, short files, a map that is true."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.imports import imports

PACKAGES = ("epslots", "cluster")
LONGEST_FILE = 400
LONGEST_FUNCTION = 60
# Functions that are longer, and why.
LONG_FUNCTIONS = {
    "epslots/cli/generate.py:generate": "options with their help",
    "epslots/cli/plan.py:plan": "options with their help",
    "cluster/job/command.py:job": "options with their help",
    "epslots/loading.py:load": "arguments with their meanings",
    "epslots/transport/forming.py:form_group": "half of it are the arguments' meanings and errors",
    "epslots/cuda_graph/triton_decisions.py:choose": "a kernel with a line for each argument",
    "epslots/cuda_graph/triton_decisions.py:decide": "a kernel with a line for each argument",
    "epslots/moe/grouped_kernel.py:_multiply": "a kernel with a line for each argument",
    "epslots/moe/packed_kernel.py:_multiply": "a kernel with a line for each argument",
}
LONGEST_TEST_NAME = 60


def files(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


def test_no_class_name_is_used_twice():
    """A reader who has met a class knows it wherever its name comes up again, with or without an underscore."""
    places = defaultdict(list)
    for path in files(*PACKAGES):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                places[node.name.strip("_")].append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_product_files_are_short():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files(*PACKAGES)}
    assert {path: length for path, length in lengths.items() if length > LONGEST_FILE} == {}


def test_functions_fit_a_screen():
    """But those that say why."""
    found = {
        f"{path.relative_to(ROOT)}:{node.name}"
        for path in files(*PACKAGES)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno + 1 > LONGEST_FUNCTION
    }
    assert found == LONG_FUNCTIONS.keys()


def test_test_names_are_short():
    """A name is read in a list of failures: it states the rule, and the docstring says why."""
    for path in files("tests"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name.lower().startswith("test"):
                assert len(node.name) <= LONGEST_TEST_NAME, f"{path.relative_to(ROOT)}: {node.name}"


def test_test_modules_import_no_test_module():
    """Shared code of tests is in tests/support."""
    for path in files("tests"):
        strangers = [name for name in imports(path) if re.match(r"tests\.(?!support)", name)]
        assert not strangers, f"{path.relative_to(ROOT)} imports {strangers}"


def test_named_modules_exist():
    """In docstrings and comments, where a reader follows them; and in the list of fast tests."""
    known = {path.name for path in files(*PACKAGES, "tests", "examples")}
    for path in files(*PACKAGES):
        named = {name.rpartition("/")[2] for name in re.findall(r"``([a-z_/]+\.py)``", path.read_text())}
        strangers = named - known - {"cluster.py", "torch.py"}  # files that a user's folder may have
        assert not strangers, f"{path.relative_to(ROOT)} names {strangers}"
    listed = re.search(r"^FAST = (\(.*?^\))", (ROOT / "tests/conftest.py").read_text(), re.DOTALL | re.MULTILINE)
    assert listed and [name for name in ast.literal_eval(listed[1]) if not (ROOT / "tests" / name).exists()] == []


def documented_packages() -> dict[str, str]:
    """The first line of the docstring of every package below epslots/ and cluster/, by its path."""
    return {
        str(path.parent.relative_to(ROOT)): (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()[0]
        for path in files(*PACKAGES)
        if path.name == "__init__.py" and path.parent.name not in PACKAGES
    }


def map_of_the_readme() -> dict[str, str]:
    """The table of README's section "Map": what stands beside each path. A pipe within a cell is written ``\\|``."""
    section = re.search(r"^## Map\n(.*?)(?=^## |\Z)", (ROOT / "README.md").read_text(), re.M | re.S)
    assert section, 'README.md has no section "## Map"'
    rows = re.findall(r"^\| *`([^`]+)` *\| *((?:\\\||[^|])*?) *\|$", section[1], re.M)
    assert len({path for path, _ in rows}) == len(rows), "a path has two rows"
    return {path.strip("/"): text.replace(r"\|", "|") for path, text in rows}


def test_the_readme_maps_every_package():
    written, packages = map_of_the_readme(), documented_packages()
    patterns = {f"{package}/*.py" for package in PACKAGES}  # modules above all packages: their rows are free text
    assert packages.keys() | patterns == written.keys(), "rows that the map lacks, or should not have"
    assert {path: written[path] for path in packages} == packages


@pytest.mark.parametrize("path", sorted(documented_packages()))
def test_a_package_has_tests(path: str):
    """Tests mirror the packages: epslots/moe is tested in tests/moe, cluster/ in tests/cluster."""
    package, _, room = path.partition("/")
    assert list((ROOT / "tests" / (room if package == "epslots" else package)).glob("test_*.py"))
