"""Data sets for training: a file checked, its form told, its rows mapped, and what is trained shown before it starts.

Promises never to import torch, flat memory for files of any length, and one sentence for whatever is wrong. What needs
a tokenizer is in `nibble.data.render` and `.preview`, which are handed one. Knows nothing of training.
"""

from nibble.data.check import Problem, Report, check, rows
from nibble.data.forms import FORMS, Detection
from nibble.data.read import SUFFIXES, Source, open_source
from nibble.data.rows import ColumnMap, Record, Row, Sample
from nibble.data.shipped import SHIPPED, find

__all__ = [
    "FORMS", "SHIPPED", "SUFFIXES", "ColumnMap", "Detection", "Problem", "Record", "Report", "Row", "Sample", "Source",
    "check", "find", "open_source", "rows",
]  # fmt: skip
