"""Slot decisions made on the device, for decoding steps in a CUDA graph."""
