"""Benchmarks: ratios measured within one run, recorded with command, versions and machine."""
