"""Docstrings that are read at speed: a short first sentence, and module docstrings that leave the file in sight."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache

from tests.support import ROOT

MODULE_LINES = 12
FIRST_WORDS = 20
# Module docstrings that are longer, and why.
LONG_MODULES = {
    "epslots/errors.py": "the tree of all errors",
    "epslots/moe/moe_layer.py": "the phases of a layer's step, and the words of the hot path",
}
# A sentence ends before the next one's first letter, or with its paragraph.
_SENTENCE_END = re.compile(r"(?<=[.?!])\s+(?=[A-Z0-9`\"'(])|\n\s*\n")


def first_sentence(docstring: str) -> str:
    return _SENTENCE_END.split(docstring.strip(), maxsplit=1)[0]


def public_docstrings(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[str, str]]:
    for child in node.body:
        if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or child.name.startswith("_"):
            continue
        if docstring := ast.get_docstring(child):
            yield f"{prefix}{child.name}", docstring
        if isinstance(child, ast.ClassDef):
            yield from public_docstrings(child, f"{prefix}{child.name}.")


@cache
def trees() -> dict[str, ast.Module]:
    paths = sorted(path for package in ("epslots", "cluster") for path in (ROOT / package).rglob("*.py"))
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in paths}


def test_module_docstrings_are_short():
    """But those that say why."""
    lines = {path: len((ast.get_docstring(tree) or "").splitlines()) for path, tree in trees().items()}
    long = {path: count for path, count in lines.items() if count > MODULE_LINES}
    assert long.keys() == LONG_MODULES.keys(), f"allowed: {MODULE_LINES} lines; found {long}"


def test_first_sentences_are_short():
    """Of modules, and of public classes, functions and methods: they say what it is; the rest comes after them."""
    long = {}
    for path, tree in trees().items():
        for name, docstring in [("", ast.get_docstring(tree) or ""), *public_docstrings(tree, "")]:
            count = len(first_sentence(docstring).split())
            if count > FIRST_WORDS:
                long[f"{path}:{name}"] = count
    assert not long, f"allowed: {FIRST_WORDS} words"


def test_the_rules_see_what_they_forbid():
    tree = ast.parse(f'"""{"line" + chr(10)}"""\nclass A:\n    def f(self): "{"word " * 21}"\n    def _g(self): "x"')
    assert [name for name, _ in public_docstrings(tree, "")] == ["A.f"]
    assert len(first_sentence("word " * 21).split()) == 21
    assert first_sentence("One of two, e.g. this. Two.") == "One of two, e.g. this."
    assert first_sentence("No full stop\n\nNext") == "No full stop"
