"""Hugging Face and its mirrors, through huggingface_hub.

Promises that the token goes to the hub that it belongs to alone, and that one file's failure ends the others soon.
huggingface_hub 2.4 keeps whole files and begins a broken one anew. Its exceptions pass: see `nibble.hub.faults`.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from nibble.hub.source import Listing, RemoteFile
from nibble.hub.tokens import silence

OFFICIAL = "https://huggingface.co"
WORKERS = 4
CHUNK_BYTES = 2**17
"""The library's 10 MB make the progress of a slow line stand still; they are what a cut costs and a stop waits for."""

LOGGERS = ("huggingface_hub", "httpx2", "httpcore2", "httpx", "httpcore")
"""The library and what it speaks HTTP with: httpx before its version 2.4."""


class HuggingFace:
    """The hub behind an endpoint that speaks Hugging Face's protocol.

    Args:
        endpoint: its address.
        token: one to use, False for none, None for what huggingface_hub finds itself (HF_TOKEN, its own login).
        kind: of its repositories, "model" or "dataset".
    """

    family = "huggingface"

    def __init__(self, endpoint: str = OFFICIAL, token: str | bool | None = None, kind: str = "model") -> None:
        self.kind = kind
        self.endpoint = endpoint.rstrip("/")
        self.token = token
        self.label = "Hugging Face" if self.endpoint == OFFICIAL else urlsplit(self.endpoint).netloc or self.endpoint

    def look(self, repo: str, revision: str) -> Listing:
        """The files of a repository at a revision, which is resolved to its commit."""
        from huggingface_hub import HfApi

        with self._settings():
            api = HfApi(endpoint=self.endpoint, token=self.token)
            ask = api.dataset_info if self.kind == "dataset" else api.model_info
            info = ask(repo, revision=revision or None, files_metadata=True, timeout=30)
        files = tuple(
            RemoteFile(
                path=found.rfilename,
                size=found.size if found.size is not None else -1,
                sha256=found.lfs.sha256 if found.lfs else "",
                # git names a file in LFS by its pointer, not by its content.
                git="" if found.lfs else found.blob_id or "",
            )
            for found in info.siblings or []
        )
        return Listing(self.family, repo, str(info.sha), self.endpoint, files)

    def fetch(self, listing: Listing, files: Sequence[RemoteFile], folder: Path, moved: Callable[[int], None]) -> None:
        """As `nibble.hub.source.Hub.fetch`."""
        from huggingface_hub import constants, hf_hub_download

        for leftover in (folder / ".cache" / "huggingface" / "download").rglob("*.incomplete"):
            # The library never comes back to these: each try writes a file of its own.
            leftover.unlink()
        stop = threading.Event()

        def bring(file: RemoteFile, again: bool = False) -> None:
            tally = _Tally(moved, stop)
            try:
                hf_hub_download(
                    listing.repo, file.path, repo_type=self.kind, revision=listing.revision, local_dir=folder,
                    endpoint=listing.endpoint, token=self.token, tqdm_class=tally.bar(),
                )  # fmt: skip
            except Exception as error:
                if again or stop.is_set() or not _of_xet(error):
                    raise
                # Xet's servers may be out of reach where the hub is not, and the hub has every file in the plain way.
                tally.take_back()
                constants.HF_HUB_DISABLE_XET = True
                bring(file, again=True)

        with self._settings(), ThreadPoolExecutor(WORKERS, thread_name_prefix="download") as pool:
            futures = [pool.submit(bring, file) for file in files]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                _abort_xet()
                raise

    @contextlib.contextmanager
    def _settings(self) -> Iterator[None]:
        """huggingface_hub as we need it for a while: it takes these from the environment, at import, for all hubs."""
        from huggingface_hub import constants

        # Who needs a mirror seldom reaches Xet's servers, which stand beside the hub (huggingface_hub#4475).
        without_xet = constants.HF_HUB_DISABLE_XET or self.endpoint != OFFICIAL
        values = {"DOWNLOAD_CHUNK_SIZE": CHUNK_BYTES, "HF_HUB_DISABLE_XET": without_xet}
        before = {name: getattr(constants, name) for name in values}
        for name, value in values.items():
            setattr(constants, name, value)
        try:
            with silence(*LOGGERS):
                yield
        finally:
            for name, value in before.items():
                setattr(constants, name, value)


class _Stopped(Exception):
    """Another file has failed, or the person has stopped."""


def _of_xet(error: Exception) -> bool:
    """Whether hf_xet raised it: it has few exceptions of its own and tells most failures by a RuntimeError."""
    return isinstance(error, RuntimeError) or type(error).__module__ == "hf_xet"


def _abort_xet() -> None:
    """End what hf_xet transfers: it listens to nobody else, and a file can be 5 GB long."""
    if "hf_xet" in sys.modules:
        with contextlib.suppress(ImportError):
            from huggingface_hub.utils._xet import abort_xet_session

            abort_xet_session()


class _Tally:
    """The bytes of one file, told on as they come."""

    def __init__(self, moved: Callable[[int], None], stop: threading.Event) -> None:
        self._moved, self._stop = moved, stop
        self._count = 0

    def add(self, count: int) -> None:
        """Called by the library's thread, which it also ends."""
        if self._stop.is_set():
            raise _Stopped
        self._count += count
        self._moved(count)

    def take_back(self) -> None:
        """The file begins anew."""
        self._moved(-self._count)
        self._count = 0

    def bar(self) -> Any:
        """A class with what the library asks of a tqdm class."""
        tally = self

        class Bar:
            def __init__(self, *_: object, **options: Any) -> None:
                self.total = options.get("total")
                self.n = 0

            def __enter__(self) -> Bar:
                return self

            def __exit__(self, *_: object) -> None:
                pass

            def update(self, count: float | None = 1) -> None:
                self.n += int(count or 0)
                tally.add(int(count or 0))

            def update_transfer(self, count: float | None = 1) -> None:
                """Bytes from the network: the same again, or fewer where Xet has some already."""

            def nothing(self, *_: object, **__: object) -> None:
                """The rest of tqdm's face is of no use here."""

            close = refresh = set_description = set_description_str = nothing
            set_postfix_str = set_transfer_postfix_str = nothing

        return Bar
