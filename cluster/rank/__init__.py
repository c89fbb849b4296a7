"""A rank's side: the worker that runs the engine in lock-step with its peers."""
