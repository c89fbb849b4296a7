"""Experts in the node's RAM: records built from a checkpoint, shared by processes, checked and pinned."""
