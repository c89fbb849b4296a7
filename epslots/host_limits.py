"""The memory and the CPU cores that this process may use: the machine's, or fewer where a limit is set.

A container's limits are those of its control group. Versions 1 and 2 of control groups may be mounted side by side, and every
ancestor of a group limits it too. So all limits that are visible are read, and the tightest counts. Files that are missing or
can't be read limit nothing.
"""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil

from epslots.units import format_bytes

_ROOT = Path("/")
# Where control groups are mounted by convention: a sandbox may hide the mount table's entries.
_USUAL_MOUNTS = {"v2": ("/sys/fs/cgroup",), "memory": ("/sys/fs/cgroup/memory",), "cpu": ("/sys/fs/cgroup/cpu",)}
_OCTAL = re.compile(r"\\([0-7]{3})")
_MOST_DIGITS = 20  # of 2**64


@dataclass(frozen=True)
class MemoryLimit:
    """One limit of this process's memory.

    Attributes:
        name: owner of the limit, for messages: the machine, a control group, the process.
        where: name of the limit among its owner's; empty for the machine's.
        total_bytes: the limit.
        free_bytes: bytes left to this process. File cache counts as free: the kernel reclaims it before it ends a process,
            and a mapped host store is file cache.
    """

    name: str
    where: str
    total_bytes: int
    free_bytes: int

    def __str__(self) -> str:
        where = f" ({self.where})" if self.where else ""
        return f"{format_bytes(self.free_bytes)} free of {self.name}'s {format_bytes(self.total_bytes)}{where}"


def tightest_memory_limit(root: Path = _ROOT) -> MemoryLimit:
    """The limit that leaves this process the least memory.

    Args:
        root: folder that has ``proc`` and ``sys``.
    """
    return min(_memory_limits(root), key=lambda limit: limit.free_bytes)


def total_memory(root: Path = _ROOT) -> int:
    """Bytes of the smallest limit of this process's memory, whether in use or not."""
    return min(limit.total_bytes for limit in _memory_limits(root))


def usable_cores(root: Path = _ROOT) -> int:
    """Physical cores that this process may keep busy: by its affinity, and by the CPU quotas of its control groups.

    A quota of 2.5 cores is 2: a third thread would be stopped for half of each period while the others wait for it.
    """
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = min(cores, len(os.sched_getaffinity(0)))
    return max(1, min([cores, *map(int, _cpu_quotas(root))]))


def _memory_limits(root: Path) -> Iterator[MemoryLimit]:
    machine = psutil.virtual_memory()
    yield MemoryLimit("the machine", "", machine.total, machine.available)
    yield from _cgroup_limits(root)
    used = psutil.Process().memory_info()
    for name, number, used_bytes in (
        ("RLIMIT_AS", resource.RLIMIT_AS, used.vms),
        ("RLIMIT_DATA", resource.RLIMIT_DATA, used.data),
    ):
        soft, _ = resource.getrlimit(number)
        if soft != resource.RLIM_INFINITY:
            yield MemoryLimit("the process", name, soft, max(0, soft - used_bytes))


def _cgroup_limits(root: Path) -> Iterator[MemoryLimit]:
    for folder in _group_folders(root, "v2"):
        used = _number(folder / "memory.current") or 0
        stat = _table(folder / "memory.stat")
        cache = stat.get("inactive_file", 0) + stat.get("active_file", 0)
        # Above memory.high a group isn't ended, but slowed down until it is below.
        yield from _limits_of_group(folder, [_number(folder / name) for name in ("memory.max", "memory.high")], used, cache)
    for folder in _group_folders(root, "memory"):
        used = _number(folder / "memory.usage_in_bytes") or 0
        stat = _table(folder / "memory.stat")
        cache = sum(stat.get(f"total_{name}", stat.get(name, 0)) for name in ("inactive_file", "active_file"))
        # The second is the limit of ancestors, which a container may not see.
        limits = [_number(folder / "memory.limit_in_bytes"), stat.get("hierarchical_memory_limit")]
        yield from _limits_of_group(folder, limits, used, cache)


def _limits_of_group(folder: Path, limits: list[int | None], used: int, cache: int) -> Iterator[MemoryLimit]:
    for limit in limits:
        if limit is not None:
            yield MemoryLimit("the cgroup", str(folder), limit, max(0, limit - max(0, used - cache)))


def _cpu_quotas(root: Path) -> Iterator[float]:
    """Cores of each quota, with fractions."""
    for folder in _group_folders(root, "v2"):
        quota, _, period = _text(folder / "cpu.max").strip().partition(" ")
        if _is_number(quota) and _is_number(period) and int(period):
            yield int(quota) / int(period)
    for folder in _group_folders(root, "cpu"):
        v1_quota, v1_period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        if v1_quota is not None and v1_period:
            yield v1_quota / v1_period


# --- the folders of this process's control groups ----------------------------------------------------------------------


def _group_folders(root: Path, kind: str) -> Iterator[Path]:
    """The folders of this process's group and its ancestors, as far as they are mounted.

    Args:
        kind: ``"v2"``, or a controller of version 1.
    """
    own = _own_group(root, kind)
    if own is None:
        return
    seen = set()
    for mounted, at in [*_mounts(root, kind), *((PurePosixPath("/"), usual) for usual in _USUAL_MOUNTS[kind])]:
        # A container sees its own group as the mount's root, though the path that it reads may be the one outside.
        inside = own.relative_to(mounted) if own.is_relative_to(mounted) else PurePosixPath()
        for part in (inside, *inside.parents):
            folder = root / at.lstrip("/") / part
            if folder not in seen:
                seen.add(folder)
                yield folder


def _own_group(root: Path, kind: str) -> PurePosixPath | None:
    """The path of this process's group in its hierarchy; None if it is in none of this kind."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if kind in controllers.split(",") or (kind == "v2" and number == "0" and not controllers):
            own = PurePosixPath("/", path)
            return PurePosixPath("/") if ".." in own.parts else own  # outside of the process's namespace
    return None


def _mounts(root: Path, kind: str) -> Iterator[tuple[PurePosixPath, str]]:
    """Each mount of a hierarchy: the path of its root in the hierarchy, and the mount point."""
    for line in _text(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, described = before.split(" "), after.split(" ")
        if len(fields) < 5 or len(described) < 3:
            continue
        matches = described[0] == "cgroup2" if kind == "v2" else described[0] == "cgroup" and kind in described[2].split(",")
        if matches:
            yield PurePosixPath(_unescaped(fields[3])), _unescaped(fields[4])


def _unescaped(field: str) -> str:
    """A path of the mount table, where blanks are written in octal."""
    return _OCTAL.sub(lambda found: chr(int(found[1], 8)), field)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    """A file's whole number from 0; None for anything else ("max", -1), or no file."""
    text = _text(path).strip()
    return int(text) if _is_number(text) else None


def _table(path: Path) -> dict[str, int]:
    """The lines of a file that are a name and a whole number."""
    lines = (line.split(" ") for line in _text(path).splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) == 2 and _is_number(words[1])}


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= _MOST_DIGITS
