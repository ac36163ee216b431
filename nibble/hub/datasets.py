"""Which files of a data set's repository are the data to train on.

Promises that only json, jsonl, csv and parquet are chosen, of one split, one subset and one form, in the order in which
they belong together; and that where a person would have to choose, they are asked to. Knows nothing of the network.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import PurePosixPath

from nibble.hub.faults import DownloadError
from nibble.hub.source import Listing, RemoteFile, some

ENDINGS = (".parquet", ".jsonl", ".ndjson", ".json", ".csv", ".tsv")
"""Where a repository holds its data in several forms, the first of these is taken."""

ABOUT = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "configuration.json")
"""Files that tell of the data and hold none."""

PATH = re.compile(r"([^\W.][\w .,+=()@-]{0,127}/){0,5}[^\W.][\w .,+=()@-]{0,199}")
"""Letters of any script; no part of the path begins with a dot."""

TRAIN = ("train", "training")
OTHERS = ("test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation")
"""Words by which a path says of which split it is."""

USUAL = ("", "data", "default", "main", "plain_text", "all")
"""Folders that are taken where there are several, in this order."""

COMPRESSED = (".gz", ".zst", ".zip", ".xz", ".bz2", ".tar", ".7z", ".rar")


def choose_data(listing: Listing, named: str = "") -> Listing:
    """The listing with only the files to train on, in order.

    Args:
        listing: everything that the repository holds.
        named: a file or a folder to take instead of what would be chosen.

    Raises:
        DownloadError: there is none, or a person must say which.
    """
    data = [file for file in listing.files if _is_data(file.path)]
    if named:
        return replace(listing, files=tuple(_ordered(_named(listing, data, named.strip("/")))))
    if not data:
        raise _none(listing)
    training = [file for file in data if _says(file.path, TRAIN)]
    rest = training or [file for file in data if not _says(file.path, OTHERS)]
    if not rest:
        raise DownloadError(
            f"{listing.repo} holds no split to train on, only such as {data[0].path}.",
            f"Name the file or folder to take (--file): {some([file.path for file in data])}.",
        )
    rest = _one_form(rest)
    folders = sorted({_folder(file.path) for file in rest})
    if len(folders) > 1:
        usual = next((folder for folder in USUAL if folder in folders), None)
        if usual is None:
            raise _choose(listing, f"{len(folders)} subsets", folders)
        rest = [file for file in rest if _folder(file.path) == usual]
    series = sorted({_series(file.path) for file in rest})
    plain = [file for file in rest if PurePosixPath(file.path).stem.lower() in TRAIN]
    if len(series) > 1 and len(plain) != 1:
        raise _choose(listing, f"{len(series)} files that may each be meant", [file.path for file in rest])
    return replace(listing, files=tuple(_ordered(plain if len(series) > 1 else rest)))


def _is_data(path: str) -> bool:
    return bool(PATH.fullmatch(path)) and path.lower().endswith(ENDINGS) and PurePosixPath(path).name not in ABOUT


def _named(listing: Listing, data: Sequence[RemoteFile], named: str) -> list[RemoteFile]:
    one = [file for file in data if file.path == named]
    within = [file for file in data if file.path.startswith(f"{named}/")]
    if not one and not within:
        raise DownloadError(
            f"{listing.repo} has no data file or folder {named[:200]!r}.",
            f"Data files there: {some([file.path for file in data])}.",
        )
    if one:
        return one
    return _one_form([file for file in within if _says(file.path, TRAIN)] or within)


def _one_form(files: list[RemoteFile]) -> list[RemoteFile]:
    """The files of the best form that there is."""
    ending = next(ending for ending in ENDINGS if any(file.path.lower().endswith(ending) for file in files))
    return [file for file in files if file.path.lower().endswith(ending)]


def _says(path: str, words: Sequence[str]) -> bool:
    return not set(words).isdisjoint(re.findall("[a-z]+", path.lower()))


def _folder(path: str) -> str:
    """Where a file lies, without what tells of its split."""
    parents = [part for part in PurePosixPath(path).parent.parts if part.lower() not in TRAIN]
    return "/".join(parents)


def _series(path: str) -> str:
    """What the numbered pieces of one file have in common."""
    return re.sub(r"\d+", "0", PurePosixPath(path).stem.lower())


def _ordered(files: Sequence[RemoteFile]) -> list[RemoteFile]:
    """By name, numbers by what they count."""
    return sorted(files, key=lambda file: [(int(part or -1), text) for text, part in _PIECES.findall(file.path)])


_PIECES = re.compile(r"(\D*)(\d*)")


def _choose(listing: Listing, what: str, names: Sequence[str]) -> DownloadError:
    return DownloadError(f"{listing.repo} holds {what}.", f"Name the one to take (--file): {some(names)}.")


def _none(listing: Listing) -> DownloadError:
    paths = [file.path for file in listing.files]
    if any(path.endswith(COMPRESSED) for path in paths):
        return DownloadError(
            f"{listing.repo} holds its data only in archives.", "Fetch and unpack one yourself, then upload the file."
        )
    if any(path.endswith(".py") for path in paths):
        return DownloadError(
            f"{listing.repo} is made by a script, which is never run.",
            "On Hugging Face its data may stand under another revision: --revision refs/convert/parquet",
        )
    return DownloadError(
        f"{listing.repo} holds no data file ({', '.join(ENDINGS)}).", "Check the name: is it a data set?"
    )
