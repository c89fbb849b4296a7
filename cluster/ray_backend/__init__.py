"""Ray: sessions, nodes, placement groups and actors. Of cluster/, only `api.py` imports it."""
