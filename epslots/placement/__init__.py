"""Where experts live and how many slots a layer has: decided from windows of telemetry."""
