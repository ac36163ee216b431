"""ModelScope, through modelscope_hub, the library that modelscope itself downloads with.

`modelscope` would import torch; `modelscope_hub` does not. It goes on inside a broken file and checks SHA-256 as it
receives. Its exceptions pass: see `nibble.hub.faults`.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nibble.hub.source import Listing, RemoteFile
from nibble.hub.tokens import silence

DEFAULT_REVISION = "master"
WORKERS = 4


class ModelScope:
    """The hub at MODELSCOPE_ENDPOINT, or at modelscope.cn or else modelscope.ai, whichever has the model.

    Args:
        endpoint: its address; empty is as said above.
        token: one to use; None for what modelscope_hub finds itself (MODELSCOPE_API_TOKEN, its own login).
        kind: of its repositories, "model" or "dataset".
    """

    family = "modelscope"
    label = "ModelScope"

    def __init__(self, endpoint: str = "", token: str | None = None, kind: str = "model") -> None:
        self.kind = kind
        self.endpoint = endpoint.rstrip("/")
        self.token = token

    def look(self, repo: str, revision: str) -> Listing:
        """The files of a repository at a branch or tag."""
        with _quiet():
            api = self._api(self.endpoint)
            endpoint = api.resolve_endpoint_for_read(repo, repo_type=self.kind)
            found = self._api(endpoint).list_repo_files(repo, self.kind, revision=revision or DEFAULT_REVISION)
        files = tuple(RemoteFile(file.path, file.size, file.sha256 or "") for file in found if file.type != "tree")
        return Listing(self.family, repo, revision or DEFAULT_REVISION, endpoint, files)

    def fetch(self, listing: Listing, files: Sequence[RemoteFile], folder: Path, moved: Callable[[int], None]) -> None:
        """As `nibble.hub.source.Hub.fetch`."""
        with _quiet():
            api = self._api(listing.endpoint)
            _take_from_cache(api, listing, files, folder, self.kind)
            api.download_repo(
                listing.repo, self.kind, revision=listing.revision, local_dir=folder, max_workers=WORKERS,
                file_list=[{"Path": file.path, "Size": file.size, "Sha256": file.sha256} for file in files],
                progress_callbacks=[_callback(moved)],
            )  # fmt: skip

    def _api(self, endpoint: str) -> Any:
        from modelscope_hub import HubApi, HubConfig

        # A configuration of our own: the library keeps its default one for the life of the process.
        return HubApi(config=HubConfig(endpoint=endpoint or None, token=self.token))


def _take_from_cache(api: Any, listing: Listing, files: Sequence[RemoteFile], folder: Path, kind: str) -> None:
    """Copy what ModelScope's own cache (MODELSCOPE_CACHE) has of these files; each is verified later like any other."""
    from modelscope_hub import CacheError

    try:
        cached = api.download_repo(listing.repo, kind, revision=listing.revision, local_files_only=True)
    except CacheError:
        return
    for file in files:
        source, target = Path(cached) / file.path, folder / file.path
        if not target.exists() and source.is_file() and source.stat().st_size == file.size:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


def _quiet() -> contextlib.AbstractContextManager[None]:
    """The library without its log."""
    import modelscope_hub  # noqa: F401 - sets its log up when it is imported

    return silence("modelscope_hub", "urllib3", "requests")


def _callback(moved: Callable[[int], None]) -> Any:
    """The class that the library makes one object of for each file."""
    from modelscope_hub import ProgressCallback

    class Callback(ProgressCallback):
        def update(self, size: int) -> None:
            moved(size)

    return Callback
