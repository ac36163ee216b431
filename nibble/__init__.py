"""Nibble: chat with a language model, shrink it and teach it, in low bit, on the machine you have.

This package is the engine. It knows nothing of Gradio and nothing of the page that stands before it.
"""

__version__ = "0.1.0"
