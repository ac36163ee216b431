"""Checkpoints of every kind, seen alike: the tensors of a Hugging Face model, by name, read one at a time."""
