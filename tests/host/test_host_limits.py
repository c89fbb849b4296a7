"""A process's limits on its machine: the tightest of all limits that can be seen, in fake trees of control groups."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from epslots.config import load_config
from epslots.devices import memory_limit
from epslots.errors import DoesNotFitError, StoreError
from epslots.host_limits import MemoryLimit, tightest_memory_limit, total_memory, usable_cores
from epslots.load_plan import default_store_kind
from epslots.loading import load_alone
from epslots.models.checkpoint import CheckpointSource
from epslots.progress import ProgressDisplay
from tests.support.store_helpers import NamedExperts, open_store

GIB = 1 << 30
V2 = "31 23 0:28 {root} {at} rw shared:9 - cgroup2 cgroup2 rw"
V1 = "32 31 0:29 {root} {at} rw,relatime - cgroup cgroup rw,{controller}"


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 64 GiB with 16 cores, on any real machine; without limits of the process itself."""
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=64 * GIB, available=48 * GIB))
    monkeypatch.setattr("psutil.cpu_count", lambda logical: 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    monkeypatch.setattr(resource, "getrlimit", lambda number: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def tree(root: Path, groups: str, *mounts: str) -> Path:
    write(root / "proc/self", cgroup=groups, mountinfo="\n".join(["22 1 8:1 / / rw - ext4 /dev/sda rw", *mounts]))
    return root


def v2(at: str = "/sys/fs/cgroup", root: str = "/") -> str:
    return V2.format(at=at, root=root)


def v1(at: str = "/sys/fs/cgroup/memory", root: str = "/", controller: str = "memory") -> str:
    return V1.format(at=at, root=root, controller=controller)


def limits(root: Path) -> tuple[float, float]:
    """Free and total memory in GiB."""
    return tightest_memory_limit(root).free_bytes / GIB, total_memory(root) / GIB


def test_without_control_groups_the_machine_counts(tmp_path: Path):
    assert limits(tmp_path) == (48, 64)
    assert str(tightest_memory_limit(tmp_path)) == "48 GiB free of the machine's 64 GiB"


def test_a_limit_of_version_2(tmp_path: Path):
    tree(tmp_path, "0::/job", v2())
    group = tmp_path / "sys/fs/cgroup/job"
    write(group, memory__max=16 * GIB, memory__current=5 * GIB, memory__stat=f"anon 1\ninactive_file {GIB}\nactive_file 0")
    assert limits(tmp_path) == (12, 16)
    assert str(tightest_memory_limit(tmp_path)) == f"12 GiB free of the cgroup's 16 GiB ({group})"


def test_file_cache_of_a_group_counts_as_free(tmp_path: Path):
    """As it does for the machine: a mapped host store lives there, and a rank that is replaced finds it full."""
    tree(tmp_path, "0::/", v2())
    stat = f"file {9 * GIB}\nshmem {3 * GIB}\ninactive_file {2 * GIB}\nactive_file {4 * GIB}"
    write(tmp_path / "sys/fs/cgroup", memory__max=16 * GIB, memory__current=14 * GIB, memory__stat=stat)
    assert limits(tmp_path) == (8, 16)


def test_every_ancestor_limits(tmp_path: Path):
    tree(tmp_path, "0::/a/b/c", v2())
    write(tmp_path / "sys/fs/cgroup/a/b/c", memory__max="max", memory__current=1)
    write(tmp_path / "sys/fs/cgroup/a/b", memory__max=32 * GIB, memory__high="max", memory__current=GIB)
    write(tmp_path / "sys/fs/cgroup/a", memory__max=40 * GIB, memory__current=38 * GIB)
    assert limits(tmp_path) == (2, 32), "what is free and what there is may be different groups' limits"


def test_what_slows_a_group_down_is_its_limit(tmp_path: Path):
    tree(tmp_path, "0::/job", v2())
    write(tmp_path / "sys/fs/cgroup/job", memory__max=16 * GIB, memory__high=8 * GIB, memory__current=GIB)
    assert limits(tmp_path) == (7, 8)


def test_a_limit_of_version_1(tmp_path: Path):
    tree(tmp_path, "9:pids:/job\n4:cpu,memory:/job\n0::/", v1(controller="cpu,memory"))
    stat = f"inactive_file 1\ntotal_inactive_file {2 * GIB}\ntotal_active_file {GIB}\nhierarchical_memory_limit {16 * GIB}"
    group = tmp_path / "sys/fs/cgroup/memory/job"
    write(group, memory__limit_in_bytes=16 * GIB, memory__usage_in_bytes=10 * GIB, memory__stat=stat)
    assert limits(tmp_path) == (9, 16)


def test_version_1_tells_of_ancestors_that_are_hidden(tmp_path: Path):
    tree(tmp_path, "4:memory:/", v1())
    usage = {"memory__limit_in_bytes": 2**63 - 4096, "memory__usage_in_bytes": GIB}
    write(tmp_path / "sys/fs/cgroup/memory", **usage, memory__stat=f"hierarchical_memory_limit {4 * GIB}")
    assert limits(tmp_path) == (3, 4)


@pytest.mark.parametrize("own", ["/docker/abc", "/", "/../../docker/abc"])
def test_a_container_sees_its_group_as_the_root(own: str, tmp_path: Path):
    """With a namespace of control groups the path is "/"; without one it is the path outside of the container."""
    tree(tmp_path, f"4:memory:{own}\n0::{own}", v1(root="/docker/abc"), v2("/sys/fs/cgroup/unified", root="/docker/abc"))
    write(tmp_path / "sys/fs/cgroup/memory", memory__limit_in_bytes=8 * GIB, memory__usage_in_bytes=GIB)
    assert limits(tmp_path) == (7, 8)


def test_a_group_inside_of_a_container(tmp_path: Path):
    tree(tmp_path, "0::/docker/abc/job", v2(root="/docker/abc"))
    write(tmp_path / "sys/fs/cgroup/job", memory__max=5 * GIB, memory__current=GIB)
    write(tmp_path / "sys/fs/cgroup", memory__max=8 * GIB, memory__current=GIB)
    assert limits(tmp_path) == (4, 5)


def test_both_versions_at_once(tmp_path: Path):
    tree(tmp_path, "4:memory:/a\n0::/b", v1(), v2("/sys/fs/cgroup/unified"))
    write(tmp_path / "sys/fs/cgroup/memory/a", memory__limit_in_bytes=8 * GIB, memory__usage_in_bytes=0)
    write(tmp_path / "sys/fs/cgroup/unified/b", memory__max=4 * GIB, memory__current=0)
    assert limits(tmp_path) == (4, 4)
    assert limits(tree(tmp_path, "4:memory:/a\n0::/c", v1(), v2("/sys/fs/cgroup/unified"))) == (8, 8)


def test_a_mount_in_an_unusual_place(tmp_path: Path):
    tree(tmp_path, "0::/a", v2(r"/groups\040of\040mine"))
    write(tmp_path / "groups of mine/a", memory__max=3 * GIB, memory__current=0)
    assert limits(tmp_path) == (3, 3)


def test_the_usual_place_where_the_mount_table_tells_nothing(tmp_path: Path):
    tree(tmp_path, "4:memory:/a\n0::/a")
    write(tmp_path / "sys/fs/cgroup/a", memory__max=3 * GIB, memory__current=0)
    assert limits(tmp_path) == (3, 3)


@pytest.mark.parametrize("content", ["max", "9223372036854771712", "-1", "", "1e9", "9" * 5000, "²"])
def test_what_is_no_limit(content: str, tmp_path: Path):
    tree(tmp_path, "4:memory:/\n0::/", v1(), v2())
    write(tmp_path / "sys/fs/cgroup", memory__max=content, memory__high=content, memory__current=GIB)
    write(tmp_path / "sys/fs/cgroup/memory", memory__limit_in_bytes=content, memory__stat=f"inactive_file {content}\nx")
    assert limits(tmp_path) == (48, 64)


def test_files_that_cannot_be_read_limit_nothing(tmp_path: Path):
    tree(tmp_path, "0::/a", v2())
    (tmp_path / "sys/fs/cgroup/a/memory.max").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/a/memory.stat").mkdir(parents=True)
    assert limits(tmp_path) == (48, 64)
    write(tmp_path / "proc/self", cgroup="nonsense\n::\n0", mountinfo="1\n - \n- cgroup2 x")
    assert limits(tmp_path) == (48, 64)


def test_a_full_group_has_nothing_free(tmp_path: Path):
    tree(tmp_path, "0::/", v2())
    write(tmp_path / "sys/fs/cgroup", memory__max=GIB, memory__current=GIB + 4096)
    assert limits(tmp_path) == (0, 1)


@pytest.mark.parametrize("limited", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_limits_of_the_process_itself(limited: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    number = getattr(resource, limited)
    infinite = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda n: (10 * GIB, 10 * GIB) if n == number else infinite)
    used = SimpleNamespace(memory_info=lambda: SimpleNamespace(vms=4 * GIB, data=4 * GIB))
    monkeypatch.setattr("psutil.Process", lambda: used)
    assert limits(tmp_path) == (6, 10)
    assert str(tightest_memory_limit(tmp_path)) == f"6 GiB free of the process's 10 GiB ({limited})"


# --- cores -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", 16), ("400000 100000", 4), ("250000 100000", 2), ("50000 100000", 1), ("9999999 100000", 16), ("7 0", 16)],
)
def test_a_cpu_quota_of_version_2(quota: str, cores: int, tmp_path: Path):
    tree(tmp_path, "0::/a/b", v2())
    write(tmp_path / "sys/fs/cgroup/a", cpu__max=quota)
    write(tmp_path / "sys/fs/cgroup/a/b", cpu__max="max 100000")
    assert usable_cores(tmp_path) == cores


@pytest.mark.parametrize(("quota", "cores"), [(-1, 16), (300000, 3), (1000, 1)])
def test_a_cpu_quota_of_version_1(quota: int, cores: int, tmp_path: Path):
    tree(tmp_path, "5:cpu,cpuacct:/a", v1("/sys/fs/cgroup/cpu,cpuacct", controller="cpu,cpuacct"))
    write(tmp_path / "sys/fs/cgroup/cpu,cpuacct/a", cpu__cfs_quota_us=quota, cpu__cfs_period_us=100000)
    assert usable_cores(tmp_path) == cores


def test_cores_of_the_affinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 5, 7}, raising=False)
    assert usable_cores(tmp_path) == 3


# --- decisions ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """A control group of 4 GiB, of which 1 GiB is in use, around this process."""
    monkeypatch.setattr(
        "epslots.host_limits._cgroup_limits", lambda root: [MemoryLimit("the cgroup", "/job", 4 * GIB, 3 * GIB)]
    )


def test_memory_of_the_cpu_is_what_the_group_leaves(small_group: None):
    assert memory_limit(torch.device("cpu")).free_bytes == 3 * GIB


def test_half_of_the_group_holds_a_store_in_memory(small_group: None):
    cuda = torch.device("cuda")
    assert [default_store_kind(cuda, size * GIB) for size in (2, 3)] == ["memory", "file"]


def test_the_plan_shows_which_limit_holds(small_group: None, run: Callable[..., tuple[int, str, str]]):
    arguments = ("plan", "--model", "mixtral-8x7b", "--slots", "1", "--device", "cpu")
    code, told, _ = run(*arguments)
    (line,) = (line for line in told.splitlines() if "available" in line)
    assert code == 1 and "3 GiB free of the cgroup's 4 GiB (/job)" in line
    planned = json.loads(run(*arguments, "--json")[1])
    assert planned["memory_bytes"] == 3 * GIB
    assert planned["memory_note"] == "3 GiB free of the cgroup's 4 GiB (/job)"
    assert json.loads(run(*arguments, "--memory", "80GiB", "--json")[1])["memory_note"] == "--memory"


def test_a_refusal_names_the_limit_and_the_ranks_that_share_it(
    small_group: None, checkpoint: Callable[[str], Path], cache_dir: Path
):
    with pytest.raises(DoesNotFitError, match=r"available.*3 GiB free of the cgroup's 4 GiB \(/job\), shared by 64 ranks"):
        load_alone(
            CheckpointSource(checkpoint("qwen3_moe")),
            load_config(slots=1, device="cpu", policy="lru", host_store="file", cache_dir=cache_dir, kv_tokens=16),
            neighbours=64,
            ranks=64,
            display=ProgressDisplay(shown=False),
        )


def test_a_store_in_memory_needs_room_in_the_group(cache_dir: Path, monkeypatch: pytest.MonkeyPatch):
    full = MemoryLimit("the cgroup", "/job", 4 * GIB, GIB // 4)
    monkeypatch.setattr("epslots.host_limits._cgroup_limits", lambda root: [full])
    with pytest.raises(StoreError, match=r"256 MiB free of the cgroup's 4 GiB \(/job\); use host_store='file'"):
        open_store(cache_dir, NamedExperts(), "memory")
