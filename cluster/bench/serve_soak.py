"""A soak over HTTP: users who ask, leave and read slowly, while ranks are killed. Nothing may be lost, different, or left."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from cluster.api import Cluster
from cluster.bench.common import open_cluster, prompts
from cluster.bench.http_load import HttpLoad
from cluster.bench.http_users import AskedText, Users, UserTally
from cluster.bench.serve_here import serving_here
from cluster.bench.soak import RANKS_MAX, SoakLeft, SoakTally, disturbed_looks, judge_soak
from cluster.serve.service import Service
from epslots.bench.report import BenchReport

_TEXTS = 24
_IDLE_WITHIN_S = 30.0


def bench_serve_soak(report: BenchReport, cache_dir: Path, *, minutes: float = 10.0, users: int = 64, seed: int = 0) -> None:
    """Users and disturbances at once for ``minutes``; every text is compared with that of an undisturbed run.

    Raises:
        AssertionError: a request was lost, hangs, or has another text; a level grew; or something was left behind.
    """
    left, tally = SoakLeft(), SoakTally()
    with ExitStack() as stack:
        cluster = stack.enter_context(open_cluster(cache_dir, ranks=RANKS_MAX, silence_s=3.0))
        url, service = stack.enter_context(serving_here(cluster))
        load = stack.enter_context(HttpLoad(url))
        held = soak_over_http(cluster, service, load, Users(users, 60 * minutes, [], seed), tally, left)
    judge_soak(report, f"{minutes:g} minutes, up to {RANKS_MAX} ranks, {users} users over HTTP", tally, left.found() | held)


def soak_over_http(
    cluster: Cluster, service: Service, load: HttpLoad, users: Users, tally: SoakTally, left: SoakLeft
) -> dict[str, int]:
    """Let users ask, and disturb the ranks meanwhile.

    Args:
        users: without what they ask, which is chosen here.
        tally: filled.

    Returns:
        The things that an idle service still holds, by name: nothing, if all is well.
    """
    users.asked = _asked(cluster)
    load.tell(users)
    for _ in disturbed_looks(cluster, users.seconds, random.Random(users.seed), tally):
        left.look()
    found = load.hear()
    assert isinstance(found, UserTally)
    tally.requests.update(found.requests)
    tally.different, tally.hanging = found.different, found.hanging
    for problem in found.problems:
        print(problem, flush=True)
    return _held_when_idle(cluster, service)


def _asked(cluster: Cluster) -> list[AskedText]:
    """Requests with their right texts; every second one samples, and lengths differ."""
    found = []
    for number, prompt in enumerate(prompts(_TEXTS)):
        settings = {"temperature": 0.8 * (number % 2), "seed": number, "ignore_eos": True}
        found.append({"prompt": prompt, "max_new_tokens": 20 + 17 * number % 150, **settings})
    texts = {result.index: result.text or "" for result in cluster.generate(found)}
    bodies = [{"max_tokens": each.pop("max_new_tokens"), **each} for each in found]
    return [AskedText(body, texts[number]) for number, body in enumerate(bodies)]


def _held_when_idle(cluster: Cluster, service: Service) -> dict[str, int]:
    """Places and cells that are held although no request runs."""

    def held() -> dict[str, int]:
        state, engine = cluster.state(), cluster.stats().engine
        return {
            "places in the queue": state.places - state.free,
            "requests of the service": service.running,
            "requests of ranks": engine.running + engine.waiting,
            "tokens in caches": engine.kv_used,
        }

    return _until_nothing(held)


def _until_nothing(held: Callable[[], dict[str, int]]) -> dict[str, int]:
    """The things that are held; asked until there are none, or for half a minute."""
    pause, ends_s = threading.Event(), time.monotonic() + _IDLE_WITHIN_S
    while any((found := held()).values()) and time.monotonic() < ends_s:
        pause.wait(0.2)
    return found
