"""transformers' models and their checkpoints: opened, checked, planned for, loaded."""
