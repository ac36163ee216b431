"""What a model lost by being packed: its next-token distribution beside that of full precision, size, memory, speed.

    report = quality.measure(folder, ["sym_int4", "nf4"])           a dense model in these formats
    report = quality.measure(packed, [], against=folder)            a folder that is packed already
    quality.keep("guide", home, report); quality.kept("guide", home)
    proposal = quality.pick(folder, quality.Limits(max_kl=0.05, memory_bytes=4 * 10**9), quality.SHORT)

Every model is loaded in a child process of its own, so that its memory is its own. Nothing here imports torch but the
modules that say so.
"""

from nibble.quality.kept import keep, kept
from nibble.quality.measuring import TOKENS, Conditions, Subject, compare, measure
from nibble.quality.picking import SHORT, Limits, Proposal, pick

__all__ = [
    "SHORT",
    "TOKENS",
    "Conditions",
    "Limits",
    "Proposal",
    "Subject",
    "compare",
    "keep",
    "kept",
    "measure",
    "pick",
]
