"""``EchoLoop`` runs in a worker's process in place of a ``RankLoop``: most commands are answered by themselves.

torch is imported when it is needed: it would take each worker's start two seconds.
"""

from __future__ import annotations

import os
import queue
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from cluster.lasting.descriptions import RankDescription
    from cluster.messages.rank import Contact, Form, Load
    from cluster.rank.contact_store import ContactStore
    from cluster.rank.rank_loop import FormTransport

TELL, FACTS, FAIL = b"tell:", b"facts", b"fail"


class EchoLoop:
    """A command is answered with itself; some do more."""

    def __init__(self, form: FormTransport) -> None:
        self._form = form
        self._contacts: ContactStore | None = None
        self._load: Load | None = None
        self._told: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def start(self) -> None:
        pass

    def command(self, message: bytes) -> bytes:
        if message.startswith(TELL):
            self._told.put(message.removeprefix(TELL))
            return b""
        if message == FACTS:
            import torch

            return msgspec.msgpack.encode(
                {
                    "threads": torch.get_num_threads(),
                    "interface": os.environ.get("GLOO_SOCKET_IFNAME"),
                    "status": Path("/proc/self/status").read_text(),
                }
            )
        if message == FAIL:
            raise ValueError("told to fail")
        if len(message) > 10:
            from cluster.messages.rank import Contacts, Form, Load, decode_command
            from cluster.rank.contact_store import ContactStore

            match decode_command(message):
                case Form() as form:
                    self._contacts = ContactStore(form.epoch, self._publish, form.form_s)
                    threading.Thread(target=self._meet, args=(form, self._contacts)).start()
                case Load() as load:
                    self._load = load
                case Contacts(_, entries) if self._contacts is not None:
                    self._contacts.take(entries)
        return message

    def begin_term(self, term: int) -> None:
        pass

    def describe(self) -> RankDescription:
        from cluster.lasting.descriptions import RankDescription

        return RankDescription(load=self._load, loaded=self._load is not None, running=True)

    def events(self, term: int = 0) -> bytes:
        return self._told.get()

    def _publish(self, contact: Contact) -> None:
        from cluster.messages.rank import encode

        self._told.put(encode([contact]))

    def _meet(self, form: Form, contacts: ContactStore) -> None:
        import torch

        try:
            transport = self._form(form, torch.device("cpu"), contacts)
            self._told.put(bytes(transport.all_gather(torch.tensor([form.rank])).flatten().tolist()))
        except Exception as error:
            self._told.put(repr(error).encode())


class BrokenLoop(EchoLoop):
    """Can't even be made."""

    def __init__(self, form: FormTransport) -> None:
        raise ValueError("this node has no such thing")
