"""Every error that epslots raises on purpose.

    EpslotsError
    ├── ConfigError              a setting is not one of those allowed (also a ValueError)
    ├── UnsupportedModelError    the model's experts can't be run from slots
    ├── DoesNotFitError          the memory plan exceeds the device or the node
    ├── CheckpointError          files are missing, truncated, mis-shaped or of a refused kind
    ├── StoreError               the host store can't be built, opened or trusted
    │   └── CorruptExpertError   one expert's record differs from its digest
    ├── RequestError             one request ended with an error; others go on
    ├── RankUnusable             this process can't join another group of ranks: it must be replaced
    └── GroupError               ranks can't work together
        ├── RankMismatchError    they were started with different checkpoints, versions or settings
        ├── PeerLost             one of them is gone, or didn't answer within the deadline
        ├── StepFailed           this rank's own part of a step failed, while it computed or in an exchange
        ├── StaleEpoch           one of them belongs to an older process group
        └── ExchangeError        they disagree about an exchange, or about which rank holds which expert

A message names the value that was given and those that are allowed: the command line prints it alone. A broken invariant of
epslots itself is an ``AssertionError``: a bug, and not a user's mistake.
"""

from __future__ import annotations

import reprlib


class EpslotsError(Exception):
    """Base of all deliberate errors; catching it catches no bug."""


class ConfigError(EpslotsError, ValueError):
    """A setting given by the user is not one of those allowed."""


class UnsupportedModelError(EpslotsError):
    """The model has no experts, or experts that transformers doesn't route through its interface."""


class DoesNotFitError(EpslotsError):
    """A configuration exceeds the available memory; raised before any weight is read."""


class CheckpointError(EpslotsError):
    """The checkpoint on disk can't be used as it is."""


class StoreError(EpslotsError):
    """The host store can't be built, opened or trusted."""


class RequestError(EpslotsError):
    """A request ended with an error of its own. Others go on."""


class CorruptExpertError(StoreError):
    """A record's bytes differ from its digest.

    Attributes:
        layer: the experts module's path in the model.
        expert: the expert's id in that layer.
    """

    def __init__(self, layer: str, expert: int, where: str) -> None:
        super().__init__(
            f"expert {expert} of {layer} is corrupt in the host store ({where}): its bytes differ from the digest "
            f"taken when the store was built. It was not served. Delete the store and load again to rebuild it "
            f"from the checkpoint."
        )
        self.layer = layer
        self.expert = expert


class RankUnusable(EpslotsError):
    """This process can't join another group of ranks: a library is left in the middle of a call. It must be replaced."""


class GroupError(EpslotsError):
    """Ranks of one process group can't work together."""


class RankMismatchError(GroupError):
    """Ranks were started with different checkpoints, versions or settings."""


class PeerLost(GroupError):
    """A rank is gone, didn't answer within the deadline, or the group was aborted."""


class StepFailed(GroupError):
    """This rank failed in a step where the others wait for it; the group was aborted.

    Attributes:
        __cause__: the error that it failed with.
        computing: whether it failed while it computed; else in an exchange.
    """

    def __init__(self, message: str, *, computing: bool) -> None:
        super().__init__(message)
        self.computing = computing


class StaleEpoch(GroupError):
    """A rank belongs to an older epoch of the process group."""


class ExchangeError(GroupError):
    """Ranks disagree about an exchange, or about which of them holds which expert."""


def shown(value: object) -> str:
    """A user's value as messages show it: cut short if it is long."""
    try:
        return _shortened.repr(value)
    except Exception:  # integers of more than 4,300 digits have no text, and objects may raise anything
        return f"<{type(value).__name__}>"


_shortened = reprlib.Repr()
_shortened.maxstring = _shortened.maxother = _shortened.maxlong = 100
