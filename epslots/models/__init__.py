"""transformers' models and their checkpoints, as this project needs them."""
