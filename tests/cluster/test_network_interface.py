"""The interface of a rank's connections, on nodes with several."""

from __future__ import annotations

import os
from types import SimpleNamespace

import psutil
import pytest

from cluster.rank.network_interface import use_interface

NAMES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@pytest.fixture(autouse=True)
def node(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = {"lo": ["127.0.0.1", "::1"], "eth0": ["10.0.0.5", "fe80::1%eth0"], "eth01": ["10.0.1.5"], "cni0": ["10.4.0.1"]}
    found = {name: [SimpleNamespace(address=one) for one in all_] for name, all_ in addresses.items()}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def chosen() -> list[str | None]:
    return [os.environ.get(name) for name in NAMES]


@pytest.mark.parametrize(("host", "name"), [("10.0.0.5", "eth0"), ("10.0.1.5", "eth01"), ("fe80::1", "eth0")])
def test_gloo_and_nccl_use_the_interface_of_an_address(host: str, name: str):
    """NCCL takes a bare name for a beginning: eth0 would allow eth01."""
    use_interface(host)
    assert chosen() == [name, f"={name}"]


def test_nccl_is_not_tied_to_a_loopback():
    """Ranks of one node connect by shared memory; NCCL refuses lo for all else."""
    use_interface("127.0.0.1")
    assert chosen() == ["lo", None]


def test_an_unknown_address_sets_nothing():
    use_interface("192.168.7.7")
    assert chosen() == [None, None]


def test_a_users_choice_stays(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "^cni")
    use_interface("10.0.0.5")
    assert chosen() == ["eth0", "^cni"]
