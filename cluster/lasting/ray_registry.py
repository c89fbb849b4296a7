"""Ray's knowledge of a cluster that outlives its driver: claims and beats in its key-value store, placement groups, actors.

All calls ask the cluster's head, and wait for it. The names are those of ``descriptions.py``.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import msgspec
import ray
import ray._private.state as ray_state
from ray._raylet import PlacementGroupID
from ray.actor import ActorHandle
from ray.core.generated.gcs_pb2 import WorkerTableData
from ray.experimental import internal_kv
from ray.util import list_named_actors
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from cluster.lasting.descriptions import GroupName, RankName
from cluster.lasting.lease import Claim, Sight

NAMESPACE = "epslots"
_DIGITS = 12  # of a term, in keys: they sort as terms do


def own_id() -> str:
    """Ray's id of this process, in hexadecimal."""
    return str(ray.get_runtime_context().get_worker_id())


def put_claim(name: str, claim: Claim) -> bool:
    """Make a claim; returns False if another process has claimed this term. Earlier ones are forgotten."""
    if internal_kv._internal_kv_put(_key(name, claim.term), msgspec.msgpack.encode(claim), False, namespace=NAMESPACE):
        return False
    for term in _terms(name):
        if term < claim.term:
            for key in (_key(name, term), _beat_key(name, term)):
                internal_kv._internal_kv_del(key, namespace=NAMESPACE)
    return True


def put_beat(name: str, term: int, beat: bytes) -> None:
    """Show that the holder of this term's claim lives."""
    internal_kv._internal_kv_put(_beat_key(name, term), beat, True, namespace=NAMESPACE)


def doom(name: str, id: str) -> None:
    """Mark a rank or a placement group as doomed, by its id. From now on no driver adopts it."""
    internal_kv._internal_kv_put(_doom_key(name) + id, b"", True, namespace=NAMESPACE)


def doomed(name: str) -> frozenset[str]:
    """Ids of the ranks and placement groups that are to be ended, and of those that have been."""
    prefix = _doom_key(name)
    return frozenset(key.decode().removeprefix(prefix) for key in internal_kv._internal_kv_list(prefix, namespace=NAMESPACE))


def forget_doomed(name: str, ids: Iterable[str]) -> None:
    """Forget ids of ranks and placement groups that are no more."""
    for id in ids:
        internal_kv._internal_kv_del(_doom_key(name) + id, namespace=NAMESPACE)


def look(name: str, *, at_holder: bool = True) -> Sight:
    """The newest claim.

    Args:
        at_holder: see whether its holder's process has ended, too.
    """
    terms = _terms(name)
    if not terms:
        return Sight(None)
    term = max(terms)
    found = internal_kv._internal_kv_get(_key(name, term), namespace=NAMESPACE)
    if found is None:  # forgotten just now, for a newer one
        return look(name, at_holder=at_holder)
    claim = msgspec.msgpack.decode(found, type=Claim)
    beat = internal_kv._internal_kv_get(_beat_key(name, term), namespace=NAMESPACE) or b""
    return Sight(claim, beat, dead=at_holder and _has_ended(claim.worker))


def _has_ended(worker: str) -> bool:
    """Whether a process has ended, as far as Ray knows: at once if its node goes on, which tells."""
    found = ray_state.state._connect_and_get_accessor().get_worker_info(ray.WorkerID.from_hex(worker))
    return found is not None and not WorkerTableData.FromString(found).is_alive


def groups_of(name: str) -> list[tuple[GroupName, PlacementGroup, int]]:
    """A cluster's placement groups, in the order of their bundles: name, group, number of bundles."""
    found = []
    for table in placement_group_table().values():
        group = GroupName.of(table["name"])
        if group is not None and group.cluster == name and table["state"] not in ("REMOVED", "PENDING"):
            id = PlacementGroupID(bytes.fromhex(table["placement_group_id"]))
            found.append((group, PlacementGroup(id), len(table["bundles"])))
    return sorted(found, key=lambda each: each[0])


def ranks_of(name: str) -> list[RankName]:
    """The names of a cluster's ranks, the older one of a bundle first."""
    named = (each["name"] for each in list_named_actors(all_namespaces=True) if each["namespace"] == NAMESPACE)
    return sorted(rank for rank in map(RankName.of, named) if rank is not None and rank.cluster == name)


def actors_of(name: str) -> list[tuple[RankName, ActorHandle[Any]]]:
    """A cluster's ranks, the older one of a bundle first."""
    found = []
    for rank in ranks_of(name):
        # It may have just ended: Ray then knows no such actor, or not even its class.
        with suppress(ValueError, AssertionError):
            found.append((rank, ray.get_actor(str(rank), namespace=NAMESPACE)))
    return found


def remove_groups(name: str, before_term: int, *, pending: bool = False) -> None:
    """Remove a cluster's placement groups of earlier terms, and end the ranks on them.

    This process ends last, if it is one of them.

    Args:
        pending: only those that Ray hasn't made yet.
    """
    own = ray.util.get_current_placement_group()
    for table in placement_group_table().values():
        group = GroupName.of(table["name"])
        if group is None or group.cluster != name or group.term >= before_term:
            continue
        if table["state"] == "PENDING" or not (pending or table["state"] == "REMOVED"):
            id = PlacementGroupID(bytes.fromhex(table["placement_group_id"]))
            if own is None or own.id != id:
                remove_placement_group(PlacementGroup(id))
    if own is not None and not pending:
        remove_placement_group(own)


def _terms(name: str) -> list[int]:
    prefix = _key(name)
    return [int(key.decode().removeprefix(prefix)) for key in internal_kv._internal_kv_list(prefix, namespace=NAMESPACE)]


def _key(name: str, term: int | None = None) -> str:
    return f"claim of {name}/" + ("" if term is None else f"{term:0{_DIGITS}d}")


def _doom_key(name: str) -> str:
    return f"doom of {name}/"


def _beat_key(name: str, term: int) -> str:
    return f"beat of {name}/{term:0{_DIGITS}d}"
