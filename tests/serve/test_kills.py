"""SIGKILLs of ranks under HTTP load: no request that was taken is lost or different, and nothing is left of it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.api import Cluster
from cluster.bench.http_load import HttpLoad, Reached, WaveAnswers, wave_of
from cluster.bench.http_users import Users
from cluster.bench.serve_here import bodies_of, serving_here
from cluster.bench.serve_soak import soak_over_http
from cluster.bench.soak import SoakLeft, SoakTally
from cluster.serve.service import Service
from epslots.example import example_model
from tests.support.grouped_ranks import TOKENS_TRAVEL
from tests.support.process_backend import ProcessBackend
from tests.support.rank_helpers import PATIENCE_S

PROMPTS = ["def read(path):\n", "import os\n", "class Point:\n    def __init__(self, ", "for line in "]
SEED_OF_A_KILL = 2
"""With it, the soak's first and, in its first seconds, only disturbance is a kill."""


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cluster, ProcessBackend, Service, HttpLoad]]:
    """Two ranks that are processes, a service for them, and its clients in a process of their own."""
    backend, stores = ProcessBackend(), tmp_path_factory.mktemp("stores")
    with (
        Cluster(
            example_model(),
            ranks=2,
            backend=backend,
            cache_dir=Path(stores),
            progress=False,
            slots=8,
            dtype="float32",
            kv_tokens=4096,
            costs=TOKENS_TRAVEL,
            silence_s=PATIENCE_S,
            window_steps=0,
        ) as cluster,
        serving_here(cluster) as (url, service),
        HttpLoad(url) as load,
    ):
        yield cluster, backend, service, load


Parts = tuple[Cluster, ProcessBackend, Service, HttpLoad]


def test_streams_go_on_when_a_rank_is_killed(there: Parts):
    """Where they were: nothing twice, nothing missing; and answers that aren't streams come whole."""
    cluster, backend, _, load = there
    right = [cluster.submit(prompt, max_new_tokens=60, stop_tokens=()).result().text for prompt in PROMPTS]
    bodies = bodies_of(PROMPTS, 60, stream=True)
    killed = backend.workers[0]
    load.tell(wave_of(bodies, tell_at=3))
    assert isinstance(load.hear(), Reached)
    os.kill(killed.pid, signal.SIGKILL)
    found = load.hear()
    assert isinstance(found, WaveAnswers)
    whole = load.ask(bodies_of(PROMPTS, 60, stream=False))
    for answers in (found.answers, whole.answers):
        assert [(answer.status, answer.error) for answer in answers] == [(200, "")] * 4
        assert [answer.text for answer in answers] == right
        assert [answer.tokens for answer in answers] == [60] * 4
    cluster.scale(2)
    assert backend.workers[0] is not killed


def test_users_find_everything_whole_and_leave_nothing(there: Parts):
    """The bench's soak for some seconds: they ask, leave and read slowly while a rank is killed."""
    cluster, _, service, load = there
    tally, left = SoakTally(), SoakLeft()
    held = soak_over_http(cluster, service, load, Users(8, 2.0, [], SEED_OF_A_KILL), tally, left)
    assert (tally.lost, tally.different, tally.hanging) == (0, 0, 0)
    assert tally.events == {"kill": 1}
    assert tally.requests["whole"] > 0
    assert not any(held.values()), held
