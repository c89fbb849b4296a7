"""The network interface that a rank's connections to its peers go through."""

from __future__ import annotations

import ipaddress
import os

import psutil


def use_interface(host: str) -> None:
    """Have gloo and NCCL bind to an address of this node, as far as the user has not chosen. Called before torch is imported.

    By default gloo takes the address of the host's name, on many systems a loopback, and NCCL an interface of its own choice,
    of several perhaps one that leads nowhere.

    Args:
        host: an IP address; nothing is set if no interface has it.
    """
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address.partition("%")[0] == host for address in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)  # both read it only from the environment
            if not ipaddress.ip_address(host.partition("%")[0]).is_loopback:
                os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # exactly this one, and not all that begin so
