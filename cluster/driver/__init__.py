"""The driver's side: starts workers, forms groups, routes requests, asks the controller."""
