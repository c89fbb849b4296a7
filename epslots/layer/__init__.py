"""One MoE layer's step, from router to combine."""
