"""``cluster.job`` that goes on no further after some results, until it is stopped: ``python -m tests.support.held_job``."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from typing import Any

from cluster.api import Cluster
from cluster.generation import Result
from cluster.job.command import app

HELD = "held by the test"
_RESULTS = 5

generate = Cluster.generate


def held(cluster: Cluster, prompts: Any, **settings: Any) -> Iterator[Result]:
    for number, result in enumerate(generate(cluster, prompts, **settings)):
        if number == _RESULTS:
            print(HELD, file=sys.stderr, flush=True)
            threading.Event().wait()
        yield result


if __name__ == "__main__":
    Cluster.generate = held  # type: ignore[method-assign]
    app()
