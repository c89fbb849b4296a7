"""One MoE layer's step on the device: dispatch, fetch, execute, combine."""
