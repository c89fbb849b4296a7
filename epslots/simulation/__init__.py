"""Clusters that aren't here: the same decisions on recorded or made-up traffic, and how long they would take."""
