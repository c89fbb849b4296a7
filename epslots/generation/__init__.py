"""Requests in batches: scheduling a step, caches of keys and values, sampling, text."""
