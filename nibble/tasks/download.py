"""The task `download`: a model from a hub into home/models, or a data set into home/data.

Promises that nothing of its spec or its result is secret: a token comes from the environment or from home/tokens.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nibble.config import HUBS, Settings, check_keys, load_settings
from nibble.errors import ModelError
from nibble.hub import DownloadError, Progress, Request, download

KEYS = ["repo", "hub", "hubs", "revision", "name", "file", "dataset", "home", "config", "resume"]
"""What a spec may say; only `repo` must be there: `org/name`, or the address of its page. `dataset`: whether
it is a data set, as the address of such a page says too. Without a `hub`, `hubs` or
else those of the settings are tried. `hubs`, `home` and `config`, a settings file, are never a visitor's to choose."""

PAGES = {
    r"(?:huggingface\.co|hf\.co)/datasets": ("huggingface", "dataset"),
    r"hf-mirror\.com/datasets": ("hf-mirror", "dataset"),
    r"(?:www\.)?modelscope\.(?:cn|ai)/datasets": ("modelscope", "dataset"),
    r"huggingface\.co|hf\.co": ("huggingface", "model"),
    r"hf-mirror\.com": ("hf-mirror", "model"),
    r"(?:www\.)?modelscope\.(?:cn|ai)/models": ("modelscope", "model"),
}
"""Where models and data sets have their pages, and whose pages these are."""

LIBRARIES = {
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # hf_xet would try for six minutes to reach servers that are blocked; plain HTTP takes over after it.
    "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "4",
    "HF_XET_CLIENT_RETRY_BASE_DELAY": "1s",
    "HF_XET_CLIENT_CONNECT_TIMEOUT": "15s",
    # An hour for a file, the library's own limit, is too short for 5 GB on a slow line.
    "MODELSCOPE_DOWNLOAD_TOTAL_TIMEOUT": "604800",
}
"""Environment of the hubs' libraries, read when they are imported; what the person has set stays."""


def run(spec: Mapping[str, Any], report: Progress) -> dict[str, Any]:
    """Download a model or a data set.

    Args:
        spec: see KEYS.
        report: told bytes, and a line where another hub is tried.

    Returns:
        `name`, `folder` and `bytes` of what is now there; a data set is called as on its hub.

    Raises:
        NibbleError: an unknown key, or as `nibble.hub.download`.
    """
    check_keys(spec, KEYS, "download")
    for variable, value in LIBRARIES.items():
        os.environ.setdefault(variable, value)
    config = Path(spec["config"]) if spec.get("config") else None
    settings = load_settings({"home": spec.get("home") or None, "hubs": spec.get("hubs") or None}, config)
    request = request_from(spec, settings)
    folder = download(request, report, settings.home_folder)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    name = request.repo if request.kind == "dataset" else request.target
    return {"name": name, "folder": str(folder), "bytes": size}


def refuse_trust(names: Iterable[str], source: str, trusted: Iterable[str]) -> None:
    """Refuse to make a model of a name whose own code may run, unless that may be said of its source too.

    Args:
        names: of what is to be made.
        source: name of the model that it is made from.
        trusted: as config.yaml says.

    Raises:
        ModelError: one of the names is trusted.
    """
    taken = [] if source in trusted else [name for name in names if name in trusted]
    if taken:
        raise ModelError(
            f"{taken[0]!r} stands in trust_remote_code, and {source} does not.",
            "Choose another name for the new model.",
        )


def request_from(spec: Mapping[str, Any], settings: Settings) -> Request:
    """The request that a spec describes.

    Raises:
        NibbleError: something in it is not what it must be.
    """
    text = {key: str(spec.get(key) or "").strip() for key in ("repo", "hub", "revision", "name", "file")}
    kind = "dataset" if spec.get("dataset") else "model"
    for site, (hub, shown) in PAGES.items():
        page = re.fullmatch(rf"https://(?:{site})/([^/?#]+/[^/?#]+)(?:/tree/([^?#]+))?/?(?:[?#].*)?", text["repo"])
        if page and not (shown == "model" and page[1].startswith("datasets/")):
            kind = shown
            text |= {"repo": page[1], "hub": text["hub"] or hub, "revision": text["revision"] or page[2] or ""}
    hub = text.pop("hub")
    if hub and hub not in HUBS:
        raise DownloadError(
            f"There is no hub {hub!r}.", f"Hubs: {', '.join(HUBS)}; a mirror's address goes into config.yaml."
        )
    # Which model may bring code of its own is said by config.yaml alone, never by whoever asks for a download.
    return Request(**text, hubs=(hub,) if hub else settings.hubs, kind=kind, trusted=settings.trust_remote_code)
