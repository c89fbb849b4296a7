"""Shared parts of tests: tiny models, fakes of Ray and of links, ranks as processes, drivers of state machines."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The checkout."""
