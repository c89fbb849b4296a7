"""A model as an HTTP service with OpenAI's API: requests, streams, limits, metrics."""
