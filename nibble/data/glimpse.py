"""A data set looked at before anything is trained: what it is, what is wrong with it, and its first rows as tokens.

Promises an answer within some seconds for a file of any length, which then covers its first rows, and that a tokenizer
is loaded in a process of its own, with little time and memory, from a folder that was screened. Imports no torch. The
other end is `nibble.data.looking`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from nibble.data.rows import ColumnMap
from nibble.errors import DataError, EngineDied, NibbleError

ROOT = Path(__file__).parents[2]

COMMAND = (sys.executable, "-m", "nibble.data.looking")

WALL_S = 90
"""Longest wait. Reading takes some seconds at most; importing transformers on a busy machine takes the rest."""

ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_OFFLINE": "1",
}
"""What the child's libraries are told, where the person has not."""


def glimpse(
    model_folder: Path, data_path: Path, *, mapping: ColumnMap | None = None, max_length: int = 512, n: int = 3,
    trusted: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Look at a data set as a model would be trained on it.

    Args:
        model_folder: of the base, for its tokenizer and chat template.
        data_path: as `nibble.data.store.find` returns it.
        mapping: what the person says of the columns.
        max_length: tokens of a sample at most.
        n: samples to show.
        trusted: whether Python code in the model's folder may run.

    Returns:
        Plain JSON: what `nibble.data.looking.look` returns.

    Raises:
        NibbleError: the child died or took too long. What is wrong with the data or the model stands in the result.
    """
    mapping = mapping or ColumnMap()
    spec = {
        "model": str(model_folder), "data": str(data_path), "form": mapping.form, "columns": dict(mapping.columns),
        "leave_out": mapping.leave_out, "max_length": max_length, "n": n, "trusted": trusted,
    }  # fmt: skip
    with tempfile.TemporaryFile() as errors:
        try:
            done = subprocess.run(  # noqa: S603 - our own module, by a list of arguments
                COMMAND, cwd=ROOT, input=json.dumps(spec).encode(), stdout=subprocess.PIPE, stderr=errors,
                timeout=WALL_S, env={**ENVIRONMENT, **os.environ}, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise DataError(
                f"Looking at {data_path.name} took longer than {WALL_S} s.", "Try again when the machine is less busy."
            ) from None
        answer = _parsed(done.stdout)
        if answer is None:
            errors.seek(0)
            lines = errors.read()[-10_000:].decode("utf-8", "replace").strip().splitlines()
            raise _death(done.returncode, lines[-1][:300] if lines else "")
    if "error" in answer:
        raise NibbleError(*answer["error"])
    return answer


def _parsed(output: bytes) -> dict[str, Any] | None:
    try:
        answer = json.loads(output)
    except ValueError:
        return None
    return answer if isinstance(answer, dict) else None


def _death(code: int, last: str) -> EngineDied:
    if code in (-signal.SIGKILL, -signal.SIGXCPU):
        return EngineDied(
            "The process that looked at the data was ended by the system: it took too much memory or time.",
            "Close other programs, or look at a smaller part of the data set.",
        )
    how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
    return EngineDied(f"The process that looked at the data ended unexpectedly ({how}).", last)
