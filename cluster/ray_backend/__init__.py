"""Ray: sessions, nodes, placement groups and actors. Nothing else in cluster/ imports it."""
