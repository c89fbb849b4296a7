"""Ray for all tests of the cluster: one for the session, whichever tests use it."""

from tests.support.ray_helpers import ray_nodes, ray_tokens

__all__ = ["ray_nodes", "ray_tokens"]
