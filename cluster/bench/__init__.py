"""Benchmarks of a cluster: start, throughput, recovery, soak, the service."""
