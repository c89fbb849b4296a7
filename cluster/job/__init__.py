"""python -m cluster.job: a file of prompts in, a file of results out, resumable."""
