"""``bench gpu``: its result as one page of markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from epslots.bench.gpu_kit import StepOutcome


def page(result: Mapping[str, Any], outcomes: Sequence[StepOutcome]) -> str:
    """The page: the runs and their machines, the outcome of each step, and every table.

    Args:
        result: of the bench's report: date, versions, machine.
    """
    machine = result["machine"]
    where = machine["gpu"] if "gpu" in machine else f"no GPU: {machine['cpu']}"
    parts = [
        f"# epslots on {where}",
        f"{result['date']}, `{result['command']}`. "
        + ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        + f". {machine['cores']} cores, {machine['memory_GiB']} GiB of memory.",
        "## Steps",
        _table([{"step": o.step, "state": o.state, "seconds": round(o.seconds, 1), "why": o.why} for o in outcomes]),
    ]
    for outcome in outcomes:
        for title, rows in outcome.tables.items():
            parts += [f"## {title[0].upper()}{title[1:]}", _table(rows)]
    return "\n\n".join(parts) + "\n"


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names), *([_cell(row.get(name)) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: object) -> str:
    if value is None:
        return ""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
