"""Placements: homes, replicas and slots of experts, planned from load windows."""
