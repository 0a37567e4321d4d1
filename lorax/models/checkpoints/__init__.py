"""Checkpoints: where they are, their tensors by name, and our parameters read from them."""
