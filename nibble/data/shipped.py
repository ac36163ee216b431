"""The data sets that come with Nibble, and where a data set's name leads.

Promises that only a name of ours, or a path where paths are allowed, leads to a file.
"""

from __future__ import annotations

from pathlib import Path

from nibble.errors import DataError

FOLDER = Path(__file__).parents[2] / "guide" / "data"

SHIPPED = {
    "quotes": "short sayings in English, with made-up authors, as running text",
    "instructions": "questions and tasks with answers, in English and Chinese",
}
"""Name -> what it holds; both were written for this project."""


def find(name: str, *, paths: bool = False) -> Path:
    """The file that a data set's name leads to.

    Args:
        name: one of `SHIPPED` or, where `paths`, any file. Endpoints and the page pass names and uploads only.
        paths: whether a path is accepted.

    Raises:
        DataError: nothing of that name.
    """
    if name in SHIPPED:
        return FOLDER / f"{name}.jsonl"
    if paths:
        return Path(name).expanduser()
    raise DataError(f"There is no data set {name!r}.", f"Shipped: {', '.join(SHIPPED)}; or upload a file.")
