"""The task `compare`: a base, its tuned form and checkpoints side by side, told in compare.json and compare.html.

Promises that the report is written whole or not at all, and that a path is taken from a console alone. Imports no torch
before what is asked for was looked up.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nibble import jobs, library, publish
from nibble.comparing import order as ordering
from nibble.comparing import page
from nibble.comparing.order import Order
from nibble.config import Settings, check_keys, load_settings
from nibble.engines.base import LIMITS, Sampling
from nibble.errors import ConfigError, ModelError, NibbleError
from nibble.quality.measuring import folder_name
from nibble.screen import check
from nibble.tasks import Report

KEYS = [
    "adapter", "run", "model", "checkpoints", "prompts", *LIMITS, "low_bit", "text", "tokens", "device", "home",
    "config", "paths", "resume",
]  # fmt: skip
"""What a spec may say; one of `adapter`, `run` and `model` must be there, the last for a base alone, in `low_bit`.
`checkpoints`: steps, or "all"; none is the tuned form only. `prompts`: none is the tutorial's. `text`: a file of
neutral text; `tokens`: of it to predict. `text`, `home`, `config` and `paths` are never a visitor's to choose."""

SUBJECTS = ("adapter", "run", "model")

SEED, NEW_TOKENS = 42, 64

ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "OMP_WAIT_POLICY": "PASSIVE"}
"""Of the libraries, unless set already: threads that spin while they wait for each other make it ten times slower as
soon as anything else wants a core."""

JSON_FILE, HTML_FILE = "compare.json", "compare.html"


def run(spec: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Compare.

    Args:
        spec: see KEYS.
        report: told the stages `prepare` and `compare`, and a row of figures for each that is compared.

    Returns:
        `base`, `format`, `device`, `dtype`, `adapter`, `run`; `chat` and `chat_why`: how prompts were put; `prompts`,
        `sampling`; `heldout` {data, samples, why}; `neutral` {name, sha256, tokens}; `subjects`, the base first, each
        with `name`, `step`, `loss` (held-out, null where none is), `recorded_loss` (the same, as training measured it),
        `perplexity`, `kl_mean`, `kl_p95`, `top1` (on the neutral text, against the base) and `answers` [{text, tokens,
        finish_reason}], in the order of `prompts`; `versions`, `measured`, a Unix time; `html`, where one was written.

    Raises:
        NibbleError: an adapter, run, base, data set, text or prompt that cannot be used.
    """
    check_keys(spec, KEYS, "compare")
    report.progress(0, 0, "", "prepare")
    settings = load_settings({"home": spec.get("home") or None}, Path(spec["config"]) if spec.get("config") else None)
    paths = bool(spec.get("paths"))
    prompts = ordering.prompts(spec.get("prompts"))
    sampling = _sampling(spec)
    order = _order(spec, settings, paths)
    name = folder_name(order.base)
    trusted = name in settings.trust_remote_code
    check(order.base, trust_remote_code=trusted)
    text = Path(spec["text"]).expanduser() if spec.get("text") and paths else None
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    # These import torch; a refusal above needs none.
    from nibble.comparing import bench
    from nibble.data import store
    from nibble.devices import choose

    wish = bench.Wish(
        prompts, sampling, text, int(spec.get("tokens") or bench.TOKENS),
        lambda data: store.find(data, settings.home_folder, paths=paths), trusted,
    )  # fmt: skip
    tell = lambda done, total: report.progress(round(done, 2), total, "parts", "compare")  # noqa: E731
    found = bench.Bench(order, wish, choose(str(spec.get("device") or settings.device)), tell).run(report.metric)
    found["measured"] = time.time()
    if report.folder is not None:
        found["html"] = HTML_FILE
        _write(report.folder / HTML_FILE, page.render(found))
        _write(report.folder / JSON_FILE, json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    return found


def _order(spec: Mapping[str, Any], settings: Settings, paths: bool) -> Order:
    """What a spec asks to compare.

    Raises:
        NibbleError: it is not there, or none or several are named.
    """
    home = settings.home_folder
    named = {key: str(spec[key]) for key in SUBJECTS if spec.get(key)}
    if len(named) != 1:
        raise ConfigError(f"compare is told {' and '.join(named) or 'nothing'} to compare.", "Name one adapter or run.")
    (kind, name), wanted = next(iter(named.items())), ordering.steps(spec.get("checkpoints"))
    if kind == "model":
        if wanted:
            raise ModelError(f"{name} is a base, which has no checkpoints.", "Name an adapter or a run.")
        return ordering.of_model(library.find(name, home, paths=paths), str(spec.get("low_bit") or settings.low_bit))
    if kind == "adapter":
        order = ordering.of_adapter(library.find_adapter(name, home, paths=paths), home, paths=paths)
        return ordering.with_checkpoints(order, _run_folder(order.run, home), wanted)
    return ordering.with_checkpoints(_of_run(name, home, paths), jobs.find(name, home).folder, wanted)


def _of_run(name: str, home: Path, paths: bool) -> Order:
    """A run's own adapter, unless another run has replaced it; else its newest checkpoint."""
    job = jobs.find(name, home)
    if job.task != "finetune":
        raise ModelError(f"{name} is a run of {job.task}, not of finetune.", "`nibble jobs` lists the runs.")
    made = str((job.status.result or {}).get("adapter") or "")
    try:
        folder = library.find_adapter(made, home)
        if publish.read_manifest(folder).get("run") == name:
            return ordering.of_adapter(folder, home, paths=paths)
    except ModelError:
        # Deleted since, or never made.
        pass
    return ordering.of_run(job.folder, job.spec, home, paths=paths)


def _run_folder(name: str, home: Path) -> Path | None:
    try:
        return jobs.find(name, home).folder if name else None
    except NibbleError:
        return None


def _sampling(spec: Mapping[str, Any]) -> Sampling:
    """The same for all that are compared.

    Raises:
        NibbleError: a value that cannot be.
    """
    values: dict[str, Any] = {"seed": SEED, "max_new_tokens": NEW_TOKENS}
    for key in LIMITS:
        value = spec.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"{key} is {str(value)[:40]!r}.", "It must be a number.")
        values[key] = value if key in ("temperature", "top_p", "repetition_penalty") else int(value)
    return Sampling(**values)


def _write(path: Path, content: str) -> None:
    """A file whole or not at all."""
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(content, encoding="utf-8", errors="replace")
    beside.replace(path)
