"""What a script can call with gradio_client to work with models: /models, /load, /download, /quantize, /jobs and so on.

Promises plain text and plain data, that a refusal arrives as one sentence, and that /download, /quantize and /evaluate
answer at once with the job that they have started. Knows nothing of the page.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Callable
from typing import Any

import gradio as gr

from models_ui.view import Say
from models_ui.words import WORDS
from nibble.border import bordered
from nibble.errors import DeviceError
from nibble.operator import Operator
from nibble.wishes import Download, Evaluate, Quantize
from nibble.words import language_of

REFUSAL = functools.partial(gr.Error, print_exception=False)

Plain = dict[str, Any]


def build_endpoints(operator: Operator, *, public: bool) -> None:
    """Register the endpoints, within the Blocks that are open; in public mode only /models."""

    async def models() -> list[Plain]:
        """The models on this machine: name, family, parameters, format, size, context, what is wrong, loaded."""
        return await asyncio.to_thread(operator.cards)

    _register(models)
    if not public:
        for build in (_build_library, _build_work, _build_jobs):
            build(operator)


def _register(*calls: Callable[..., Any]) -> None:
    """Each coroutine function under its own name."""
    for call in calls:
        gr.api(bordered(call, REFUSAL), api_name=call.__name__, concurrency_limit=None)


def _build_library(operator: Operator) -> None:
    async def load(request: gr.Request, name: str, low_bit: str = "", device: str = "") -> str:
        """Load a model by its name, in a format, on a device; empty takes the server's settings."""
        info = await operator.load(name, low_bit, device)
        say = Say(language_of(request.headers.get("accept-language")))
        return say.plain("is_loaded", model=info.model, format=info.format, device=info.device, seconds=info.load_s)

    async def unload(request: gr.Request) -> str:
        """Let the model go and give its memory back."""
        await operator.unload()
        return WORDS.say("is_unloaded", language_of(request.headers.get("accept-language")))

    async def delete_model(name: str, kind: str = "") -> Plain:
        """Delete a model that is not loaded, or an adapter; its name and the bytes that this freed.

        `kind`, as /models tells it, is needed where a model and an adapter have the same name.
        """
        return {"name": name, "bytes": await asyncio.to_thread(operator.delete, name, kind)}

    async def estimates(name: str) -> list[Plain]:
        """What a model would take in each format: disk, memory, speed, whether it fits.

        Measures the machine first; where that fails, no speed is told.
        """
        rows = await asyncio.to_thread(operator.estimates, name)
        if not await asyncio.to_thread(lambda: operator.measured):
            with contextlib.suppress(DeviceError):
                await operator.measure()
            rows = await asyncio.to_thread(operator.estimates, name)
        return rows

    async def report(name: str) -> Plain:
        """What a model has lost in low bit, as it was measured last; empty where it never was."""
        return await asyncio.to_thread(operator.report, name)

    _register(load, unload, delete_model, estimates, report)


def _build_work(operator: Operator) -> None:
    async def download(
        repo: str, hub: str = "", revision: str = "", file: str = "", name: str = "", dataset: bool = False
    ) -> Plain:
        """Get a model, `org/name` on a hub; the job. `file` is one GGUF file, `name` the model's name here.

        With `dataset` it is a data set, for /finetune.
        """
        return await asyncio.to_thread(operator.download, Download(repo, hub, revision, file, name, dataset))

    async def quantize(
        model: str,
        low_bit: list[str] | str = "",
        out: str = "",
        skip: list[str] | str = "",
        overrides: dict[str, str] | None = None,
        evaluate: bool = True,
        memory_bytes: float | None = None,
        max_kl: float | None = None,
    ) -> Plain:
        """Make low-bit models of a model that is here or on a hub, one for each format; the job.

        With `memory_bytes` or `max_kl` (nats a token) formats are tried, and the smallest model that holds is made.
        """
        wish = Quantize(model, low_bit, out, skip, overrides or {}, evaluate, memory_bytes, max_kl)
        return await asyncio.to_thread(operator.quantize, wish)

    async def evaluate(
        model: str, low_bit: list[str] | str = "", against: str = "", tokens: int | None = None
    ) -> Plain:
        """Measure what a model loses in low bit: perplexity, KL, agreement, speed; the job."""
        return await asyncio.to_thread(operator.evaluate, Evaluate(model, low_bit, against, tokens))

    _register(download, quantize, evaluate)


def _build_jobs(operator: Operator) -> None:
    async def jobs(limit: int = 20) -> list[Plain]:
        """The jobs, those that live first, then the newest: id, state, cause, progress, result."""
        return await asyncio.to_thread(operator.jobs, limit)

    async def job_log(job_id: str) -> str:
        """The end of a job's log, at most 200 kB."""
        return await asyncio.to_thread(lambda: operator.job(job_id).log())

    async def stop_job(job_id: str) -> Plain:
        """Stop a job and all its processes; answers once they are gone, which may take ten seconds."""
        return await asyncio.to_thread(operator.stop, job_id)

    async def resume_job(job_id: str) -> Plain:
        """Start a job again that failed, was stopped or was killed."""
        return await asyncio.to_thread(operator.resume, job_id)

    _register(jobs, job_log, stop_job, resume_job)
