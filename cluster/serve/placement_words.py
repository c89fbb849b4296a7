"""Each group's placement and the controller's last decision about it, in sentences. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from cluster.driver.controller_client import ControllerStats
from cluster.messages.controller import Explanation, Judgement
from cluster.reports import ClusterStats, GroupStats

T = TypeVar("T")

_STATES = {
    "waiting": "The controller waits for a group of ranks.",
    "watching": "The controller watches the load.",
    "moving": "The controller waits until the ranks have reached the placement.",
    "frozen": "The placement is frozen: the load is learned from, and nothing is published.",
    "absent": "No controller runs now; the ranks keep their placement.",
}


def placement_words(stats: ClusterStats, explanations: Sequence[Explanation | None]) -> tuple[str, ...]:
    """The placements, and the controller's reasons: a sentence each; of several groups, a paragraph each.

    Args:
        stats: the ranks' latest numbers.
        explanations: the controller's, by group; None if it has told none.
    """
    groups = stats.by_group()
    words = [_of_group(group, _at(stats.controllers, group.number), _at(explanations, group.number)) for group in groups]
    if len(groups) == 1:
        return tuple(words[0])
    return tuple(f"{_name(group)}: {' '.join(own)}" for group, own in zip(groups, words, strict=True))


def _name(group: GroupStats) -> str:
    return f"Group {group.number}" if group.role == "mixed" else f"Group {group.number}, {group.role}"


def _of_group(group: GroupStats, controller: ControllerStats | None, explanation: Explanation | None) -> list[str]:
    """A group's sentences, the most important first."""
    found = []
    if group.placement >= 0:
        name = f"placement {group.placement}" if group.placement else "the default placement"
        left = group.pending_migrations
        moves = f"; {left:,} {'copy or slot' if left == 1 else 'copies and slots'} still to move"
        found.append(f"The ranks follow {name}{moves if left else ', and have reached it'}.")
    if controller is None:
        return [*found, "There is no controller (window_steps=0): the placement stays as it is."]
    if explanation is not None:
        if explanation.published is not None:
            found.append(_published(explanation.published))
        if (latest := explanation.latest) is not None and latest.kept:
            found.append(_kept(latest))
        elif latest is None:
            found.append(f"No decision yet, after {_counted(explanation.windows, 'window')} of load.")
    return [*found, _STATES.get(controller.state, controller.state)]


def _at(values: Sequence[T], number: int) -> T | None:
    return values[number] if number < len(values) else None


def _published(made: Judgement) -> str:
    why = "on request" if made.asked else "because it pays"
    return (
        f"Placement {made.placement} was published {why}: balance {made.balance_now:.2f} to {made.balance_then:.2f}, for "
        f"{_copies(made.copies)}; expected to save {_seconds(made.gain_s)} and to cost {_seconds(made.migration_s)}."
    )


def _kept(made: Judgement) -> str:
    return f"Last decision: keep the placement. Balance is {made.balance_now:.2f}, and nothing better pays for its moves."


def _copies(count: int) -> str:
    return f"{count:,} {'copy' if count == 1 else 'copies'}"


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _seconds(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.1f} s"
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"
