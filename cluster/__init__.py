"""The ranks of epslots under Ray.

from cluster import Cluster

with Cluster("path/or/id", ranks=8, slots="25%") as cluster:
    for result in cluster.generate(prompts, max_new_tokens=64):
        print(result.text)
"""

from __future__ import annotations
