"""The placement and the controller's last decision, in sentences. Pure."""

from __future__ import annotations

from cluster.messages.controller import Explanation, Judgement
from cluster.reports import ClusterStats

_STATES = {
    "waiting": "The controller waits for a group of ranks.",
    "watching": "The controller watches the load.",
    "moving": "The controller waits until the ranks have followed the placement.",
    "frozen": "The placement is frozen: the load is learned from, and nothing is published.",
    "absent": "No controller runs now; the ranks keep their placement.",
}


def placement_words(stats: ClusterStats, explanation: Explanation | None) -> tuple[str, ...]:
    """The controller's reasons in sentences, the most important first.

    Args:
        stats: the ranks' latest numbers.
        explanation: the controller's; None if it has told none.
    """
    found = []
    if stats.groups > 1:
        found.append(f"There are {stats.groups} groups of ranks, each with a placement of its own; this is the first one's.")
    report, controller = stats.placement, stats.controller
    if report is not None and report.placement_version >= 0:
        name = f"placement {report.placement_version}" if report.placement_version else "the default placement"
        left = report.pending_migrations
        found.append(f"The ranks follow {name}{f'; {_copies(left)} still to move' if left else ', fully'}.")
    if controller is None:
        return (*found, "There is no controller (window_steps=0): the placement stays as it is.")
    if explanation is None:
        return (*found, _STATES.get(controller.state, controller.state))
    if explanation.published is not None:
        found.append(_published(explanation.published))
    if (latest := explanation.latest) is not None and latest.kept:
        found.append(_kept(latest))
    elif latest is None:
        found.append(f"No decision yet, after {_counted(explanation.windows, 'window')} of load.")
    return (*found, _STATES.get(controller.state, controller.state))


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
