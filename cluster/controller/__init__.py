"""The placement controller: an actor that turns load reports into placements."""
