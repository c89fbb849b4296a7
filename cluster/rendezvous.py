"""Where ranks meet: a ``TCPStore`` in a process of its own, so that no rank's death takes it along."""

from __future__ import annotations

import socket

import msgspec
import ray


class Rendezvous:
    """The actor. It has no thread that runs, but that of the store, which sleeps.

    Args:
        host: the address to listen on, and no other; None for this node's, as the other nodes have it.
    """

    def __init__(self, host: str | None) -> None:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]  # in this process alone

        self._host = host or ray.util.get_node_ip_address()
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        with socket.socket(family) as listening:
            listening.bind((self._host, 0))
            listening.listen(1024)
            self._port = listening.getsockname()[1]
            # The store would listen on all of the node's addresses by itself.
            self._store = TCPStore(
                self._host,
                self._port,
                is_master=True,
                wait_for_workers=False,
                master_listen_fd=listening.detach(),
            )

    def address(self) -> bytes:
        """Host and port; also a sign of life."""
        return msgspec.msgpack.encode((self._host, self._port))
