"""What a hub is to us: a list of files with sizes and hashes, and a way to fetch some of them; which files we want.

Promises that only files which a model needs are chosen, and that no chosen path leaves the folder it is fetched into.
Knows nothing of the network.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol

from nibble.hub.faults import DownloadError

PATTERNS = ("*.safetensors", "*.json", "tokenizer.model", "spiece.model", "*.txt", "*.jinja", "*.tiktoken")
"""What a model is made of. Never *.bin and other pickles; *.py only for a model whose code config.yaml trusts."""

WEIGHTS = (".safetensors", ".gguf")

PATH = re.compile(r"(additional_chat_templates/)?[A-Za-z0-9_][A-Za-z0-9_.+=-]*")
"""Files beside config.json, and transformers' folder of further chat templates. What lies deeper is another form of
the model (onnx/, original/, checkpoint-500/)."""

NAMED_PATH = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.+=-]*/){0,4}[A-Za-z0-9_][A-Za-z0-9_.+=-]*")
"""A file that a person names may lie deeper; no part of its path begins with a dot."""

STANDARD_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
SPLIT_GGUF = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf")


class Progress(Protocol):
    """The part of a task's Report (nibble.tasks) that a download needs."""

    def progress(self, done: float, total: float, unit: str = "", stage: str = "") -> None:
        """Tell that `done` of `total` units are done; the unit "B" is bytes."""

    def note(self, text: str) -> None:
        """Tell one line for a person."""


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository."""

    path: str
    size: int
    """In bytes."""
    sha256: str = ""
    """Of the content, in hex; empty where the hub does not tell it."""
    git: str = ""
    """git's hash of the content (SHA-1 of `blob <size>\\0` and the content), in hex; empty where it is not known."""


@dataclass(frozen=True)
class Listing:
    """What a hub says a repository holds."""

    family: str
    """`huggingface` or `modelscope`: whose names and versions these are; a mirror is of its original's family."""
    repo: str
    revision: str
    """The commit on Hugging Face; on ModelScope, which tells none, the branch or tag that was asked for."""
    endpoint: str
    files: tuple[RemoteFile, ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


class Hub(Protocol):
    """One hub, reached through its own library, whose exceptions leave it as they are: see `nibble.hub.faults`."""

    label: str
    """Its name for a person."""
    family: str

    def look(self, repo: str, revision: str) -> Listing:
        """List a repository; an empty revision is the hub's default branch."""

    def fetch(self, listing: Listing, files: Sequence[RemoteFile], folder: Path, moved: Callable[[int], None]) -> None:
        """Bring files into a folder. Whole files that lie there are kept, and a partial one where the library can.

        Args:
            listing: what `look` returned.
            files: those of its files to bring.
            folder: where to; each file keeps its path.
            moved: called from several threads with the bytes that have arrived, negative where some are taken back.
        """


def choose(listing: Listing, file: str = "", *, code: bool = False) -> Listing:
    """The listing with only the files that are wanted.

    Args:
        listing: everything that the repository holds.
        file: one GGUF file to take instead of the model's Hugging Face form; of a split one, all parts are taken.
        code: whether the model's own *.py files are taken too.

    Raises:
        DownloadError: there is no such file, no weights, or only pickles.
    """
    if file:
        return replace(listing, files=_named(listing, file))
    patterns = (*PATTERNS, "*.py") if code else PATTERNS
    files = [
        found
        for found in listing.files
        if PATH.fullmatch(found.path) and any(fnmatchcase(found.path, pattern) for pattern in patterns)
    ]
    # Beside its shards a repository may hold the same weights again in its maker's own form (consolidated.safetensors)
    # or in another dtype (model.fp16.safetensors).
    if any(STANDARD_WEIGHTS.fullmatch(found.path) for found in files):
        files = [f for f in files if not f.path.endswith(".safetensors") or STANDARD_WEIGHTS.fullmatch(f.path)]
    if not any(found.path.endswith(".safetensors") for found in files):
        raise _no_weights(listing)
    return replace(listing, files=tuple(files))


def _named(listing: Listing, file: str) -> tuple[RemoteFile, ...]:
    split = SPLIT_GGUF.fullmatch(file)
    alike = re.compile(rf"{re.escape(split[1])}-\d{{5}}-of-{split[2]}\.gguf") if split else re.compile(re.escape(file))
    files = tuple(found for found in listing.files if alike.fullmatch(found.path))
    if not file.endswith(".gguf") or not NAMED_PATH.fullmatch(file):
        raise DownloadError(f"{file!r} is not the name of a GGUF file.", "Name a file that ends in .gguf.")
    if not files:
        there = some([found.path for found in listing.files if found.path.endswith(".gguf")])
        raise DownloadError(f"{listing.repo} has no file {file}.", f"GGUF files there: {there}.")
    return files


def _no_weights(listing: Listing) -> DownloadError:
    paths = [found.path for found in listing.files]
    ggufs = [path for path in paths if path.endswith(".gguf")]
    if ggufs:
        return DownloadError(f"{listing.repo} holds GGUF files only.", f"Name the one to take (--file): {some(ggufs)}.")
    if any(path.endswith((".bin", ".pt", ".pth", ".ckpt")) for path in paths):
        return DownloadError(
            f"{listing.repo} holds its weights only as pickles, which can run code when they are opened.",
            "Look for a version of the model with *.safetensors; many makers keep one under another revision.",
        )
    return DownloadError(
        f"{listing.repo} holds no weights (*.safetensors).", "Check the name: is it a model, and is this its main page?"
    )


def some(names: Sequence[str], most: int = 8) -> str:
    """The first few names, and how many more."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "") or "none"
