"""Captured decoding: a step whose slot decisions are made on the device, in a CUDA graph."""
