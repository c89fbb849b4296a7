"""Simulated clusters: the same decisions on recorded or synthetic traffic, and their step times."""
