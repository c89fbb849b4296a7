"""A CUDA device pretended on the CPU: real values, streams, copies, capture and a clock, for tests and predicted timelines."""
