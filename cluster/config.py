"""The settings of a cluster: declared, explained and checked here, once. Those of each rank's model are ``LoadConfig``'s.

``Cluster`` takes them as keywords, ``python -m cluster.job`` and ``epslots serve`` as options; all make one frozen
``ClusterConfig`` of them.
"""

from __future__ import annotations

import os
import re
from typing import Any, Unpack

import msgspec

from epslots.config import (
    LoadConfig,
    LoadSettings,
    check_count,
    load_config,
    refuse_unknown,
)
from epslots.errors import ConfigError, shown
from epslots.planner.cost_model import Costs
from epslots.rank_groups import check_division, divide_ranks

STRATEGIES = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")
_MAX_SECONDS = 7 * 24 * 3600
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class ClusterConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How ranks are started and kept, and how requests get to them.

    Attributes:
        ranks: one for each GPU or CPU slot; None = all GPUs of the cluster, or one rank if it has none.
        groups: into which the ranks are divided, equally. Each is a whole model with expert parallelism of its own: it forms,
            breaks and moves its experts without the others, which go on.
        prefill_ranks: ranks that compute only prompts, in groups of their own; 0 = every group does all. When a prompt is
            computed, its cache is handed over to one of the other ranks, which decode: a long prompt holds up no stream there.
        decode_ranks: the other ranks; by default, all that there are.
        address: the Ray cluster to run in: ``"auto"`` for the running one, ``"host:port"``, or None to start Ray on this
            machine.
        name: of the cluster, by which another driver finds ranks that outlive theirs; None = none can.
        orphan_s: seconds that ranks wait, with their model, for another driver of this name when theirs is gone; 0 = they end
            with their driver.
        replace: end the ranks of this name that wait for a driver, and start new ones, in place of adopting them.
        strategy: how ranks are placed: ``"PACK"`` (on few nodes), ``"SPREAD"`` (over many), or the same strictly:
            ``"STRICT_PACK"`` (one node), ``"STRICT_SPREAD"`` (a node each).
        placement: file of ``epslots placement plan``: the experts' first placement, for as many ranks and slots.
        max_queue: requests that may wait or run at once.
        costs: time that each operation costs, by which ranks divide their work; measured by default.
        window_steps: steps after which ranks report their load to the controller; 0 = there is no controller, and the
            placement stays.
        deadline_s: seconds that one operation between ranks may take before they give each other up.
        silence_s: seconds in which a rank must answer while there is work; it is replaced otherwise.
        give_up_after_s: seconds after which a rank that can't be replaced, or a Ray that doesn't come back, is given up; with
            the last rank the cluster ends. None = it is tried without an end, twice a minute.
        progress: show how the start goes; None = if standard error is a terminal.
        model: settings of each rank's model.
    """

    ranks: int | None = None
    groups: int = 1
    prefill_ranks: int = 0
    decode_ranks: int = 0
    address: str | None = None
    name: str | None = None
    orphan_s: float = 0.0
    replace: bool = False
    strategy: str = "PACK"
    placement: str | None = None
    max_queue: int = 1024
    costs: Costs | None = None
    window_steps: int = 64
    deadline_s: float = 60.0
    silence_s: float = 10.0
    give_up_after_s: float | None = None
    progress: bool | None = None
    model: LoadConfig = LoadConfig()

    def __post_init__(self) -> None:
        if not isinstance(self.model.policy, str):
            raise ConfigError(f"policy={self.model.policy!r}: allowed in a cluster: a policy's name")
        self.model.check_costs(self.costs)
        if self.name is not None and not (isinstance(self.name, str) and _NAME.fullmatch(self.name)):
            raise ConfigError(
                f"name={shown(self.name)}; allowed: up to 64 letters, digits, dots, dashes and underscores, no sign first"
            )
        if self.orphan_s != 0:
            _check_seconds("orphan_s", self.orphan_s)
            if self.name is None:
                raise ConfigError(f"orphan_s={self.orphan_s:g} needs a name, by which the next driver finds the ranks")
        if not isinstance(self.replace, bool):
            raise ConfigError(f"replace={shown(self.replace)}; allowed: True, False")
        if self.replace and not self.outlives_driver:
            raise ConfigError("replace=True; allowed with a name and orphan_s > 0: other ranks end with their driver")
        if self.strategy not in STRATEGIES:
            raise ConfigError(f"strategy={self.strategy!r}; allowed: {', '.join(STRATEGIES)}")
        if not self.model.exchanges_memory:
            check_count("kv_tokens", self.model.kv_tokens)
        check_count("max_queue", self.max_queue)
        for name in ("deadline_s", "silence_s"):
            _check_seconds(name, getattr(self, name))
        if self.give_up_after_s is not None:
            _check_seconds("give_up_after_s", self.give_up_after_s)
        if self.ranks is not None:
            check_count("ranks", self.ranks)
        check_count("groups", self.groups)
        self._check_roles()
        if self.window_steps != 0:
            check_count("window_steps", self.window_steps)

    def _check_roles(self) -> None:
        given = {"prefill_ranks": self.prefill_ranks, "decode_ranks": self.decode_ranks}
        for name, ranks in given.items():
            if ranks != 0:
                check_count(name, ranks)
        if self.ranks is not None:
            check_division(self.ranks, self.groups, self.prefill_ranks, self.decode_ranks)

    @property
    def outlives_driver(self) -> bool:
        """Whether the ranks outlive their driver."""
        return self.name is not None and self.orphan_s > 0


class ClusterSettings(LoadSettings, total=False):
    """The fields of ``ClusterConfig`` and of its model, as users may write them."""

    ranks: int | None
    groups: int
    prefill_ranks: int
    decode_ranks: int
    address: str | None
    name: str | None
    orphan_s: float
    replace: bool
    strategy: str
    placement: str | os.PathLike[str] | None
    max_queue: int
    costs: Costs | None
    window_steps: int
    deadline_s: float
    silence_s: float
    give_up_after_s: float | None
    progress: bool | None


def cluster_config(**settings: Unpack[ClusterSettings]) -> ClusterConfig:
    """A ``ClusterConfig`` from the keywords of ``Cluster``.

    Raises:
        ConfigError: a setting is unknown, or its value is not one of those allowed.
    """
    refuse_unknown(settings, tuple(ClusterSettings.__annotations__))
    given: dict[str, Any] = dict(settings)
    model = load_config(**{name: given.pop(name) for name in LoadConfig.__struct_fields__ if name in given})
    if given.get("placement") is not None:
        given["placement"] = os.fspath(given["placement"])
    return ClusterConfig(**_with_roles(given), model=model)


def _with_roles(given: dict[str, Any]) -> dict[str, Any]:
    """Settings with the ranks and groups that follow from those of the roles: the largest groups that divide both.

    Raises:
        ConfigError: decode ranks are given alone, or the numbers don't go together.
    """
    roles = given.get("prefill_ranks", 0), given.get("decode_ranks", 0)
    if not any(roles) or not all(isinstance(ranks, int) and ranks >= 0 for ranks in roles):
        return given
    division = divide_ranks(given.get("ranks"), given.get("groups", 1), *roles)
    return given if division is None else {**given, "ranks": division.ranks, "groups": division.groups}


def _check_seconds(name: str, given: object) -> None:
    if not isinstance(given, int | float) or isinstance(given, bool) or not 0 < given <= _MAX_SECONDS:
        raise ConfigError(f"{name}={given!r}; allowed: seconds, more than 0, at most {_MAX_SECONDS}")
