"""Objects are finished by their constructors: no other code assigns their attributes. Records are filled by anyone."""

from __future__ import annotations

import ast
from collections import defaultdict
from dataclasses import dataclass, field

from tests.support import ROOT

PACKAGES = ("epslots", "cluster")
RECORD_BASES = {"Struct", "NamedTuple", "BaseModel", "TypedDict", "local"}
# Records by the names that variables for them have: they are filled step by step, by those that know.
RECORDS = {
    "_counters": "EngineCounters",
    "counters": "EngineCounters",
    "counts": "Counts",
    "entry": "ScheduledRequest, TrackedRequest",
    "summary": "RequestSummary",
    "worker": "Worker",
}
# Objects of others, which have no constructor of ours: names of variables, and whose they are.
FOREIGN = {
    "block": "transformers' module",
    "cache": "transformers' cache",
    "_cache": "transformers' cache",
    "called": "numba's dispatcher",
    "config": "transformers' configuration",
    "dispatcher": "numba's dispatcher",
    "layer": "transformers' cache layer",
    "manager": "transformers' manager",
    "model_runner": "transformers' model runner",
    "rows": "transformers' configuration",
    "scheduler": "block_new_requests is transformers'",
    "state": "transformers' request",
    "twin": "transformers' module or configuration, copied",
}
# What remains, and why.
ALLOWED = {
    "epslots/bench/decode.py: layer.mlp.gate": "transformers' module",
    "epslots/bench/exchange.py: lockstep._layer": "a layer is timed by itself, without a step's header",
    "epslots/bench/exchange.py: lockstep.steps": "and as in later steps",
    "epslots/bench/exchange.py: runner.experts.kernel": "and without its product",
    "epslots/generation/row_attention.py: own.layers": "a copy of transformers' cache",
    "epslots/simulated_gpu/machine.py: self._here.now_s": "a thread's own values",
    "epslots/simulated_gpu/nccl_group.py: _open_calls.count": "a thread's own values",
    "epslots/simulated_gpu/operators.py: GpuTensor.copy_to_host": "operators take tensors, and tensors call operators",
    "epslots/simulated_gpu/operators.py: GpuTensor.execute": "operators take tensors, and tensors call operators",
}


@dataclass
class Module:
    """The names that a module's statements assign.

    Attributes:
        attributes: of each class, those that it declares, and those of ``self`` that it assigns.
        settable: properties that a class lets others set.
        foreign: attributes of other objects than ``self`` that are assigned, with these objects.
    """

    path: str
    classes: list[ast.ClassDef] = field(default_factory=list)
    attributes: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    settable: set[str] = field(default_factory=set)
    foreign: list[tuple[ast.expr, str]] = field(default_factory=list)

    def read(self, node: ast.AST, owner: str = "") -> None:
        if isinstance(node, ast.ClassDef):
            owner = node.name
            self.classes.append(node)
            names = [each.target for each in node.body if isinstance(each, ast.AnnAssign)]
            self.attributes[owner] |= {name.id for name in names if isinstance(name, ast.Name)}
        elif isinstance(node, ast.FunctionDef):
            setters = (each for each in node.decorator_list if isinstance(each, ast.Attribute) and each.attr == "setter")
            self.settable |= {node.name for _ in setters}
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                self.attributes[owner].add(node.attr)
            else:
                self.foreign.append((node.value, node.attr))
        for child in ast.iter_child_nodes(node):
            self.read(child, owner)


def is_record(node: ast.ClassDef, records: set[str]) -> bool:
    names = {ast.unparse(base).partition("[")[0].rpartition(".")[2] for base in node.bases}
    decorated = any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)
    return decorated or bool(names & (RECORD_BASES | records))


def strangers() -> dict[str, set[str]]:
    """Assignments to attributes of our objects outside of their classes' modules: variables, and where they are assigned."""
    modules = [Module(str(path.relative_to(ROOT))) for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    for module in modules:
        module.read(ast.parse((ROOT / module.path).read_text()))
    records: set[str] = set()
    for _ in range(3):  # records of records
        records |= {node.name for module in modules for node in module.classes if is_record(node, records)}
    ours = {name for module in modules for owner, names in module.attributes.items() if owner not in records for name in names}
    ours = ours.difference(*(module.settable for module in modules))
    found: dict[str, set[str]] = defaultdict(set)
    for module in modules:
        here = set().union(*module.attributes.values())
        for owner, name in module.foreign:
            holder = owner.attr if isinstance(owner, ast.Attribute) else ast.unparse(owner)
            if name in ours - here:
                found[holder].add(f"{module.path}: {ast.unparse(owner)}.{name}")
    return found


def test_no_object_is_finished_from_elsewhere():
    found, known = strangers(), RECORDS.keys() | FOREIGN.keys()
    assert set().union(*(places for name, places in found.items() if name not in known)) == ALLOWED.keys()
    assert known <= found.keys(), "names that aren't needed"
