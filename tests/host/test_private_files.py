"""Stores, locks and compiled code are this user's alone; what another user put in their place is refused by name."""

from __future__ import annotations

import errno
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from epslots import StoreError
from epslots.cache.host_store import HostStore
from epslots.cache.node_store import check_room, store_path
from epslots.cache.store_build import appearing_whole
from epslots.private_files import default_cache_dir, make_private_folder, open_private_file
from tests.support.store_helpers import MANIFEST, NamedExperts, open_store

KINDS = ("file", "memory")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.fixture(autouse=True)
def open_umask() -> Any:
    """The usual one, under which a careless file is readable to all."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def give_to_another(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a user owned it who is neither this one nor root: only root may really give a file away."""
    number, another = path.lstat().st_ino, os.geteuid() + 1

    def disguised(call: Callable[..., os.stat_result]) -> Callable[..., os.stat_result]:
        def look(*arguments: Any, **keywords: Any) -> os.stat_result:
            found = call(*arguments, **keywords)
            return os.stat_result((*found[:4], another, *found[5:])) if found.st_ino == number else found

        return look

    monkeypatch.setattr(os, "stat", disguised(os.stat))
    monkeypatch.setattr(os, "fstat", disguised(os.fstat))


def make_read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if all files were on a volume that is mounted read-only, which hinders root as well."""

    def refuse(*arguments: Any, **keywords: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), arguments[0])

    really = os.open

    def open_to_read(path: Any, flags: int, *arguments: Any, **keywords: Any) -> int:
        at = Path(os.fsdecode(path))
        writes = flags & os.O_ACCMODE != os.O_RDONLY or (flags & os.O_CREAT and not at.exists())
        return refuse(path) if writes and not at.is_relative_to("/proc") else really(path, flags, *arguments, **keywords)  # type: ignore[return-value]

    monkeypatch.setattr(os, "open", open_to_read)
    monkeypatch.setattr(os, "access", lambda path, how, **keywords: not how & os.W_OK)
    for name in ("mkdir", "unlink", "link", "rename", "replace", "chmod"):
        monkeypatch.setattr(os, name, refuse)


# --- modes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_stores_locks_and_folders_are_for_one_user(kind: str, cache_dir: Path):
    store = open_store(cache_dir / "deep", NamedExperts(), kind)
    made = list((cache_dir / "deep").iterdir())
    assert len(made) == 2
    assert {mode(path) for path in made} == {0o600}
    assert mode(cache_dir) == mode(cache_dir / "deep") == 0o700
    store.close()


@pytest.mark.parametrize("named", [False, True])
def test_a_store_that_is_being_built_is_for_one_user(named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With a name from the start where the file system has no nameless files."""
    if named:
        monkeypatch.setattr(os, "O_TMPFILE", 0, raising=False)
    with appearing_whole(tmp_path / "store") as fd:
        assert len(list(tmp_path.iterdir())) == named
        assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o600


def test_an_older_store_is_used_and_closed_to_others(cache_dir: Path):
    open_store(cache_dir, NamedExperts()).close()
    path = store_path(MANIFEST, cache_dir)
    path.chmod(0o644)
    cache_dir.chmod(0o755)
    source = NamedExperts()
    open_store(cache_dir, source).close()
    assert source.reads == 0
    assert mode(path) == 0o600
    assert mode(cache_dir) == 0o755, "a folder that the user chose keeps the mode that the user gave it"


def test_the_default_folder_is_closed_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / "caches" / name))
    default_cache_dir().mkdir(parents=True)
    make_private_folder(default_cache_dir() / "compiled")
    make_private_folder(default_cache_dir())
    assert mode(default_cache_dir()) == mode(default_cache_dir() / "compiled") == 0o700
    assert mode(tmp_path / "caches") == 0o755


@pytest.mark.skipif(sys.platform != "linux", reason="XDG_CACHE_HOME is Linux's")
def test_compiled_code_is_for_one_user(tmp_path: Path):
    """It is pickled: others who could write there could run code."""
    (tmp_path / "epslots/compiled").mkdir(parents=True)
    for folder in ("epslots", "epslots/compiled"):
        (tmp_path / folder).chmod(0o777)
    code = "from epslots.compiled import compiled, prepare\n@compiled('int64(int64)')\ndef same(number):\n    return number\n"
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "compiling.py").write_text(code)
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", "import compiling; compiling.prepare()"]
    subprocess.run(command, cwd=tmp_path / "code", env=environment, check=True)
    folders = [tmp_path / "epslots", *(path for path in (tmp_path / "epslots").rglob("*") if path.is_dir())]
    assert len(folders) >= 3
    assert {mode(folder) for folder in folders} == {0o700}


# --- owners ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["folder", "lock", "store"])
def test_what_another_user_owns_is_refused(what: str, kind: str, cache_dir: Path, monkeypatch: pytest.MonkeyPatch):
    open_store(cache_dir, NamedExperts()).close()
    store = store_path(MANIFEST, cache_dir)
    path = {"folder": cache_dir, "lock": store.with_suffix(".lock"), "store": store}[what]
    if what == "lock":
        store.unlink()  # with a store there, no lock is taken
    give_to_another(path, monkeypatch)
    source = NamedExperts()
    with pytest.raises(StoreError, match=f"{path} belongs to user {os.geteuid() + 1}, and this process runs as user"):
        open_store(cache_dir, source, kind)
    assert source.reads == 0


def test_a_folder_of_another_user_is_refused_early(cache_dir: Path, monkeypatch: pytest.MonkeyPatch):
    cache_dir.mkdir()
    give_to_another(cache_dir, monkeypatch)
    with pytest.raises(StoreError, match="belongs to user"):
        check_room(MANIFEST, kind="file", cache_dir=cache_dir)


def test_holders_of_another_user_are_none(cache_dir: Path, monkeypatch: pytest.MonkeyPatch):
    held = open_store(cache_dir, NamedExperts(), "memory")
    (holder,) = cache_dir.glob("*.holder")
    give_to_another(holder, monkeypatch)
    source = NamedExperts()
    second = open_store(cache_dir, source, "memory")
    assert source.reads == 9
    assert holder.exists()
    held.close()
    second.close()


# --- what isn't a file -------------------------------------------------------------------------------------------------


def put(kind: str, path: Path) -> None:
    """Something at ``path`` that is no regular file."""
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as one:
            before = Path.cwd()
            os.chdir(path.parent)  # a socket's name is short
            try:
                one.bind(path.name)
            finally:
                os.chdir(before)
    else:
        path.symlink_to({"link": path.parent.parent / "precious", "link to nothing": "nothing", "device": "/dev/zero"}[kind])


@pytest.mark.parametrize("suffix", [".lock", ".experts"])
@pytest.mark.parametrize("kind", ["FIFO", "folder", "socket", "link", "link to nothing", "device"])
def test_what_is_no_file_is_refused_at_once(kind: str, suffix: str, cache_dir: Path):
    """An open of a FIFO would wait for ever; one through a link would empty another file."""
    precious = cache_dir.parent / "precious"
    precious.write_text("content")
    cache_dir.mkdir()
    path = store_path(MANIFEST, cache_dir).with_suffix(suffix)
    put(kind, path)
    with pytest.raises(StoreError, match=f"{path} is no regular file"):
        open_store(cache_dir, NamedExperts())
    assert precious.read_text() == "content"
    assert not (cache_dir / "nothing").exists()


def test_a_file_that_is_opened_is_not_emptied(tmp_path: Path):
    path = tmp_path / "lock"
    path.write_text("content")
    os.close(open_private_file(path, os.O_RDWR | os.O_CREAT))
    assert path.read_text() == "content"


# --- read-only volumes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_store_on_a_read_only_volume_serves(kind: str, cache_dir: Path, monkeypatch: pytest.MonkeyPatch):
    """Without a lock, a holder file or any other trace; a store in memory is served from its file."""
    open_store(cache_dir, NamedExperts()).close()
    store_path(MANIFEST, cache_dir).with_suffix(".lock").unlink()
    before = sorted(cache_dir.iterdir())
    make_read_only(monkeypatch)
    source = NamedExperts()
    check_room(MANIFEST, kind=kind, cache_dir=cache_dir)
    store = open_store(cache_dir, source, kind)
    assert source.reads == 0
    assert store.verify() == []
    store.close()
    assert sorted(cache_dir.iterdir()) == before


def test_memory_is_joined_where_nothing_can_be_announced(cache_dir: Path, monkeypatch: pytest.MonkeyPatch):
    """A volume that was remounted read-only: a rank that is replaced finds the memory of the others."""
    held = open_store(cache_dir, NamedExperts(), "memory")
    dead = next(cache_dir.glob("*.holder"))
    dead = dead.with_name(f"{dead.name.split('.')[0]}.1-999.holder")
    dead.touch()
    with monkeypatch.context() as patched:
        make_read_only(patched)
        source = NamedExperts()
        check_room(MANIFEST, kind="memory", cache_dir=cache_dir)
        joined = open_store(cache_dir, source, "memory")
        assert source.reads == 0
        assert joined.shared
        joined.close()
    assert held.verify() == []
    held.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_read_only_volume_without_the_store_is_refused_early(kind: str, cache_dir: Path, monkeypatch: pytest.MonkeyPatch):
    cache_dir.mkdir()
    make_read_only(monkeypatch)
    with pytest.raises(StoreError, match="can't be written to, and holds no store of this checkpoint"):
        check_room(MANIFEST, kind=kind, cache_dir=cache_dir)
    with pytest.raises(StoreError, match="choose another cache_dir"):
        open_store(cache_dir / "more", NamedExperts(), kind)


def test_a_store_of_root_in_a_folder_of_root_serves(cache_dir: Path, monkeypatch: pytest.MonkeyPatch):
    """As an administrator puts it there for all."""
    open_store(cache_dir, NamedExperts()).close()
    make_read_only(monkeypatch)
    monkeypatch.setattr("epslots.private_files._ROOT_USER", os.geteuid())
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    store: HostStore = open_store(cache_dir, NamedExperts())
    assert store.verify() == []
    store.close()
