"""Ranks that are one model: how they form a group, and what they agree on."""
