"""What a script can call with gradio_client to teach a model: /finetune, /dry_run, /preview_data, /merge, /compare and
/compare_report.

Promises plain data, that a refusal arrives as one sentence, and that what takes long answers at once with its job. A
file is taken as an upload (`handle_file`) and never as a path. Knows nothing of the page.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder

from nibble.border import bordered
from nibble.errors import DataError
from nibble.operator import Operator
from nibble.wishes import Compare, Finetune, Merge

REFUSAL = functools.partial(gr.Error, print_exception=False)

Plain = dict[str, Any]


def build_endpoints(operator: Operator) -> None:
    """Register the endpoints, within the Blocks that are open. Not for public mode."""
    _build_training(operator)
    _build_after(operator)


def _register(*calls: Callable[..., Any]) -> None:
    """Each coroutine function under its own name."""
    for call in calls:
        gr.api(bordered(call, REFUSAL), api_name=call.__name__, concurrency_limit=None)


def uploaded(file: Any) -> Path | None:
    """The file that a script has uploaded; None where there is none.

    Raises:
        DataError: what was sent is no upload.
    """
    if not file:
        return None
    named = file.get("path") if isinstance(file, Mapping) else None
    folder = Path(get_upload_folder()).resolve()
    try:
        path = Path(named).resolve() if isinstance(named, str) else None
        good = path is not None and path.is_relative_to(folder) and path.is_file()
    except (OSError, ValueError):
        good = False
    if not good or path is None:
        raise DataError("file is not an upload.", "Send it with gradio_client.handle_file(PATH).")
    return path


def _build_training(operator: Operator) -> None:
    def wish(settings: Plain | None, file: Any, **own: Any) -> Finetune:
        """Settings, those that were named over those of the mapping; an uploaded file is kept and is the data set."""
        told = {**(settings or {}), **{key: value for key, value in own.items() if value not in (None, "")}}
        path = uploaded(file)
        return Finetune(told | ({"data": operator.keep_data(path)} if path is not None else {}))

    async def finetune(
        model: str = "",
        data: str = "",
        file: Plain | None = None,
        settings: Plain | None = None,
        low_bit: str = "",
        max_steps: int | None = None,
        batch_size: int | None = None,
        learning_rate: float | None = None,
        out: str = "",
    ) -> Plain:
        """Train an adapter on a model and a data set, by their names here or the data set's id on a hub; the job.

        `file` is an uploaded data set in place of `data`. `settings`: any field of a recipe, such as {"r": 16,
        "columns": {"text": "quote"}}; what is left out is the tutorial's.
        """

        def start() -> Plain:
            own = {"low_bit": low_bit, "max_steps": max_steps, "batch_size": batch_size, "out": out}
            return operator.finetune(
                wish(settings, file, model=model, data=data, learning_rate=learning_rate, **own)
            )  # fmt: skip

        return await asyncio.to_thread(start)

    async def dry_run(
        model: str = "",
        data: str = "",
        file: Plain | None = None,
        settings: Plain | None = None,
        low_bit: str = "",
        max_steps: int | None = None,
        batch_size: int | None = None,
        learning_rate: float | None = None,
    ) -> Plain:
        """Measure two steps of what /finetune would do, and keep nothing; the job. Its result tells seconds a step,
        memory, time to the end, and whether it fits."""

        def start() -> Plain:
            own = {"low_bit": low_bit, "max_steps": max_steps, "batch_size": batch_size}
            return operator.dry_run(wish(settings, file, model=model, data=data, learning_rate=learning_rate, **own))

        return await asyncio.to_thread(start)

    async def preview_data(
        data: str = "",
        model: str = "",
        file: Plain | None = None,
        columns: Plain | None = None,
        leave_out: bool = False,
        max_length: int | None = None,
        samples: int = 3,
    ) -> Plain:
        """What a data set was recognised as and why, what is wrong with it, and its first samples as tokens, each with
        whether it is trained on."""

        def look() -> Plain:
            own = {"columns": columns, "leave_out": leave_out, "max_length": max_length}
            return operator.preview(wish(None, file, model=model, data=data, **own), samples)

        return await asyncio.to_thread(look)

    _register(finetune, dry_run, preview_data)


def _build_after(operator: Operator) -> None:
    async def merge(adapter: str, out: str = "", low_bit: list[str] | str = "") -> Plain:
        """Make a model of an adapter and its base, proven, and in low bit too where formats are named; the job."""
        return await asyncio.to_thread(operator.merge, Merge(adapter, out, low_bit))

    async def compare(
        adapter: str = "",
        run: str = "",
        checkpoints: list[int] | str = "",
        prompts: list[str] | str = "",
        seed: int = 42,
        max_new_tokens: int | None = None,
    ) -> Plain:
        """Set an adapter, or what a run has left, beside its base on the same prompts; the job. `checkpoints`: steps of
        the run, or "all"."""
        wish = Compare(adapter, run, checkpoints, prompts, seed, max_new_tokens)
        return await asyncio.to_thread(operator.compare, wish)

    async def compare_report(job_id: str = "") -> Plain:
        """The report of a comparison that has ended: answers, held-out losses, what was forgotten; without an id the
        latest. `html` is the same as a page."""
        return await asyncio.to_thread(operator.compare_report, job_id)

    _register(merge, compare, compare_report)
