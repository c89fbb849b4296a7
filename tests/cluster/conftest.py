"""Fixtures that several modules share: one Ray for the session, clusters on threads, and clocks that tests can skip on."""

from tests.support.clock_loop import clock_loops
from tests.support.fake_backend import one_load_at_a_time
from tests.support.ray_helpers import ray_nodes, ray_tokens
from tests.support.thread_cluster import folder, open_cluster

__all__ = ["clock_loops", "folder", "one_load_at_a_time", "open_cluster", "ray_nodes", "ray_tokens"]
