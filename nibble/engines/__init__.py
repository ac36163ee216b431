"""Engines: whatever turns a conversation into a stream of text. `base` is the contract; the rest fulfil it."""
