"""A folder that BigDL-LLM or IPEX-LLM saved, into ours: the same weights, in safetensors, for Nibble's own engine.

Promises that its pickles are opened in a process of their own, as tensors alone, and that the new folder appears whole
or not at all. What their library merged or padded for its kernels is undone. Knows nothing of engines and jobs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nibble.bigdl.folders import check, saved_format
from nibble.checkpoint import read_config
from nibble.engines.wire import unpack_error
from nibble.errors import ModelError, NibbleError

Progress = Callable[[int, int], None]
"""Told how many of how many bytes of the weights have been read."""


@dataclass(frozen=True)
class Converted:
    """What became of a folder."""

    format: str
    """Of ours; "bf16" and the like where nothing was packed."""
    exact: bool
    """Whether every weight kept its value bit for bit."""
    dense: tuple[str, ...]
    """Linear layers that their library had left in full precision, and that stay so."""


def convert(folder: Path, out: Path, progress: Progress = lambda done, total: None) -> Converted:
    """Convert a folder that the library saved; the work is done, and its pickles are opened, in a child process.

    Args:
        folder: holds config.json with `bigdl_transformers_low_bit`, pytorch_model*.bin, and the tokenizer.
        out: where the result is to stand; an earlier result there is replaced whole.
        progress: called now and then.

    Raises:
        ModelError: the folder cannot be converted; the hint says what to do instead.
        OSError: writing failed; what stood at `out` is untouched.
    """
    if not saved_format(read_config(folder)):
        raise ModelError(f"{folder.name} was not saved by BigDL-LLM or IPEX-LLM.", "Quantize it as any other model.")
    check(folder)
    command = [sys.executable, "-m", "nibble.bigdl.unpickling", str(folder.resolve()), str(Path(out).resolve())]
    environment = {key: value for key, value in os.environ.items() if key != "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"}
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(  # noqa: S603 - our own module, by a list of arguments
            command, cwd=Path(__file__).parents[2], env=environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=said,
        ) as child,
    ):  # fmt: skip
        assert child.stdout is not None
        for line in child.stdout:
            message = json.loads(line)
            if "done" in message:
                progress(message["done"], message["total"])
            elif "error" in message:
                raise unpack_error(message["error"])
            else:
                return Converted(message["format"], message["exact"], tuple(message["dense"]))
        child.wait()
        said.seek(max(0, said.tell() - 500))
        last = said.read().decode("utf-8", "replace").strip().splitlines()[-1:]
    why = f"the process ended with {child.returncode} {' '.join(last)}".rstrip(" .")
    raise ModelError(
        f"{folder.name} could not be converted: {why}.",
        "Where memory ran out, close other programs; else copy the folder again.",
    )


def main(arguments: list[str]) -> int:
    """`python -m nibble.bigdl.convert FOLDER OUT`: one line about what became of it, or 1 and a sentence."""
    if len(arguments) != 2:
        sys.stderr.write("python -m nibble.bigdl.convert FOLDER OUT\n")
        return 2
    try:
        result = convert(Path(arguments[0]), Path(arguments[1]))
    except NibbleError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    kept = "every weight as it was" if result.exact else "weights rounded"
    dense = f", {len(result.dense)} layers in full precision" if result.dense else ""
    sys.stdout.write(f"{arguments[1]}: {result.format}, {kept}{dense}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
