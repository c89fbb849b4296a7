"""Texts: requests, batches, sampling, captured decoding."""
