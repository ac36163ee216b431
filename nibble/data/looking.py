"""The process that looks at a data set: `python -m nibble.data.looking`, asked by `nibble.data.glimpse`.

It reads one JSON object from its standard input and writes one to its output. Whatever a library prints goes to
standard error. It ends when its parent does. Needs transformers.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nibble.checkpoint import CONTEXT_KEYS, read_config
from nibble.data.check import check
from nibble.data.preview import show
from nibble.data.render import Encoder, padding_id
from nibble.data.rows import ColumnMap, Row, Sample
from nibble.data.telling import columns_of, first_rows, told
from nibble.errors import ModelError, NibbleError

PR_SET_PDEATHSIG = 1
"""prctl(2): the signal that this process gets when the thread that started it ends."""

MEMORY_BYTES = 2 * 2**30
"""For the tokenizer and the data, on top of what the libraries have taken."""

CPU_S = 60

MOST_ROWS = 20_000
MOST_S = 2.0
"""Whatever comes first ends the reading of a long file."""

MOST_PIECES = 2_000
"""Of a sample; a longer one is told up to there."""


def look(spec: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of a data set and how a model would be trained on it.

    Returns:
        `ok`: whether it can be trained on; `kind`, `unit`: json, jsonl, csv or parquet, and what row numbers count;
        `detection`: `form`, `columns`, `why`, `found`, `given`, or None; `columns`: all of the first rows;
        `rows`, `usable`, `characters`, `tokens`, `trained_tokens`, `truncated`, `truncated_share`, and `complete`,
        whether they are of the whole file; `problems`: each `kind`, `sentence`, `fatal`, `rows`, `count`; `sentences`:
        all of this in plain words; `first`: raw rows, column -> text; `samples`: each `row`, `pieces` of `text`, `ids`
        and `trained`, `tokens`, `trained`, `truncated`, `ends`, `begins`, `cut`; `template`, `padding`, `max_length`;
        `notes`: what to know of the model's template; `model_problem`: why its tokenizer cannot be used, else empty.
    """
    path, n = Path(spec["data"]), int(spec["n"])
    mapping = ColumnMap(spec.get("form"), dict(spec.get("columns") or {}), bool(spec.get("leave_out")))
    encoder, problem = None, ""
    try:
        encoder = open_encoder(Path(spec["model"]), int(spec["max_length"]), trusted=bool(spec.get("trusted")))
    except NibbleError as error:
        problem = str(error)
    kept: list[Sample] = []

    def encode(row: Row) -> Sample:
        assert encoder is not None
        sample = encoder.encode(row)
        if len(kept) < n and any(sample.trained):
            kept.append(sample)
        return sample

    report = check(path, mapping, MOST_ROWS, encode=encode if encoder else None, seconds=MOST_S)
    first = first_rows(path)
    return {
        **told(report),
        "columns": list(report.detection.found) if report.detection else columns_of(first),
        "first": first,
        "samples": [_sample(sample, encoder) for sample in kept] if encoder else [],
        "template": encoder.template.name if encoder else "",
        "padding": encoder.tokenizer.convert_ids_to_tokens(padding_id(encoder.tokenizer)) if encoder else "",
        "max_length": encoder.max_length if encoder else int(spec["max_length"]),
        "notes": list(encoder.notes) if encoder else [],
        "model_problem": problem,
        "ok": report.ok and not problem,
    }  # fmt: skip


def open_encoder(folder: Path, max_length: int, *, trusted: bool) -> Encoder:
    """What makes samples for a model, as training does: with its own template, and no longer than its context.

    Raises:
        NibbleError: the folder must not be loaded, or has no tokenizer that can be.
    """
    from nibble.prompts import choose_template
    from nibble.prompts.trial import refuse_bombs
    from nibble.screen import check as screened
    from nibble.screen import templates

    screened(folder, trust_remote_code=trusted)
    refuse_bombs(templates(folder))
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted, local_files_only=True)
    except Exception as error:  # noqa: BLE001 - a foreign folder can make transformers raise anything
        words = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"The tokenizer of {folder.name} could not be loaded: {words[0][:300]}", "Check that the folder is whole."
        ) from None
    config = read_config(folder)
    text = config.get("text_config")
    text = text if isinstance(text, dict) else config
    context = next((text[key] for key in CONTEXT_KEYS if type(text.get(key)) is int), max_length)
    names = [folder.name, str(config.get("_name_or_path", ""))]
    template = choose_template(tokenizer, str(config.get("model_type", "")), names)
    padding_id(tokenizer)
    return Encoder(tokenizer, template, min(context, max_length))


def _limit() -> None:
    """Little time and memory from here on."""
    in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()  # noqa: SIM115, PTH123
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY_BYTES, in_use + MEMORY_BYTES))
    used = int(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))
    resource.setrlimit(resource.RLIMIT_CPU, (used + CPU_S, used + CPU_S))


def _sample(sample: Sample, encoder: Encoder) -> dict[str, Any]:
    shown = asdict(show(sample, encoder, MOST_PIECES))
    return shown | {"cut": sum(len(piece["ids"]) for piece in shown["pieces"]) < shown["tokens"]}


def main() -> int:
    """Take the pipes for the protocol, leave the standard streams to whoever prints, and look."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    sink = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    spec = json.loads(sys.stdin.buffer.read())
    # What it takes is not the data's, nor the model's.
    from transformers import AutoTokenizer  # noqa: F401

    _limit()
    try:
        answer = look(spec)
    except NibbleError as error:
        answer = {"error": [error.message, error.hint]}
    except MemoryError:
        answer = {"error": ["Looking at the data took too much memory.", "Split very long rows."]}
    sink.write(json.dumps(answer))
    sink.flush()
    return 0


if __name__ == "__main__":
    code = main()
    # Threads of a library would hold up an ordinary exit.
    sys.stderr.flush()
    os._exit(code)
