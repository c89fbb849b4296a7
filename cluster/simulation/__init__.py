"""Simulated clusters: the same scheduler, hand-overs and controller for requests that arrive, and their times."""
