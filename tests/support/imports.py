"""Modules' imports, read from their source."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

Layers = Sequence[Sequence[str]]


def modules_of(package: Path) -> dict[str, Path]:
    """Each module's dotted name below the package; a package's ``__init__`` has the package's own name ("" at the top)."""
    found = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(path: Path) -> frozenset[str]:
    """Everything that a file imports, also within functions; what it names for type checkers alone is left out."""
    found = set[str]()
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def assert_one_way(package: str, modules: dict[str, Path], layers: Layers) -> None:
    """Every module imports from layers below its own room's, and no modules import each other in a circle.

    Args:
        modules: as ``modules_of`` gives them.
        layers: from the bottom up, the rooms: a package, or a module that stands alone.
    """
    level = {room: number for number, rooms in enumerate(layers) for room in rooms}
    assert {name.partition(".")[0] for name in modules} - {""} == set(level), "each room has its place in the layers"
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        graph[name] = set()
        room = name.partition(".")[0]
        for imported in imports(path):
            root, _, inner = imported.partition(".")
            if root != package or inner not in modules or inner in ("", name):
                continue
            graph[name].add(inner)
            below = inner.partition(".")[0]
            assert not room or below == room or level[below] < level[room], f"{name} imports {imported}, which is not below it"
    TopologicalSorter(graph).prepare()  # raises where it finds a circle
