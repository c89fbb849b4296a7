"""Between ranks: collectives, forming a group, and the lock-step of their layers."""
