"""Experts on the device: the pool of slots, its tables, and the links that fill it."""
