"""A child process for each model that is measured: its peak memory is its own, and the system gets every byte back.

Promises that the child ends with its parent, that a failure in it arrives as one sentence, and that its standard error
is kept for that sentence only. Imports no torch. The other end is `nibble.quality.child`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from nibble.errors import EngineDied, NibbleError

ROOT = Path(__file__).parents[2]

COMMAND = (sys.executable, "-m", "nibble.quality.child")

ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
}
"""What the child's libraries are told, where the person has not."""

Progress = Callable[[float, float], None]
"""Told how much of the child's work is done, and how much there is."""


def ask(spec: Mapping[str, Any], progress: Progress, *, fds: Sequence[int] = ()) -> dict[str, Any]:
    """Let a child do one piece of work and return its result.

    Args:
        spec: as `nibble.quality.child.work` takes it; JSON values.
        progress: told while it works.
        fds: descriptors that the child gets too, under the same numbers.

    Raises:
        NibbleError: what the child raised, or how it died.
    """
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(  # noqa: S603 - our own module, by a list of arguments
            COMMAND, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, pass_fds=tuple(fds),
            env={**ENVIRONMENT, **os.environ},
        )  # fmt: skip
        try:
            return _converse(process, spec, progress, errors)
        finally:
            # Also when this process is asked to stop: nothing that the child does is worth waiting for.
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                pipe.close()


def _converse(
    process: subprocess.Popen[bytes], spec: Mapping[str, Any], progress: Progress, errors: BinaryIO
) -> dict[str, Any]:
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(json.dumps(spec).encode() + b"\n")
        process.stdin.flush()
    except BrokenPipeError:
        raise _death(process.wait(), errors) from None
    for line in process.stdout:
        message = json.loads(line)
        if "progress" in message:
            progress(*message["progress"])
        elif "error" in message:
            raise NibbleError(*message["error"])
        else:
            return dict(message["result"])
    raise _death(process.wait(), errors)


def _death(code: int, errors: BinaryIO) -> EngineDied:
    if code == -signal.SIGKILL:
        return EngineDied(
            "The process that measured was killed by the system, probably because memory ran out.",
            "Measure fewer tokens, a smaller model or a format with fewer bits, or close other programs.",
        )
    errors.seek(0)
    lines = errors.read().decode("utf-8", "replace").strip().splitlines()
    how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
    return EngineDied(f"The process that measured ended unexpectedly ({how}).", lines[-1][:300] if lines else "")
