"""A service over scripted ranks, one for a module's tests; a module that needs other settings has a ``there`` of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.http_service import Client, serving
from tests.support.scripted_cluster import SAYS, ScriptedCluster


@pytest.fixture(scope="module")
def there() -> Iterator[tuple[Client, ScriptedCluster]]:
    with ScriptedCluster() as cluster, serving(cluster) as client:
        yield client, cluster


@pytest.fixture
def client(there: tuple[Client, ScriptedCluster]) -> Client:
    return there[0]


@pytest.fixture
def cluster(there: tuple[Client, ScriptedCluster]) -> ScriptedCluster:
    """The scripted ranks, with their usual text and no requests of earlier tests."""
    there[1].requests.clear()
    there[1].says = SAYS
    return there[1]
