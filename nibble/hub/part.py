"""The partial folder: what has arrived of a model, beside the place where it will stand.

Promises that only one process works on it, that a later try finds what an earlier one brought, and that it goes under
the model's name only when every file has the size and the hash that the hub lists. Knows nothing of hubs.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from nibble import publish
from nibble.hub.faults import KEPT, DownloadError
from nibble.hub.source import Listing, Progress, RemoteFile

SOURCE_FILE = ".source.json"
"""In the partial folder: where it comes from, and what every file must be."""

BLOCK_BYTES = 2**23


class Part:
    """What has arrived of one model or data set.

    Args:
        models: home/models, or home/data.
        name: its name there; the partial folder is `.<name>.part` beside it.
    """

    def __init__(self, models: Path, name: str) -> None:
        self.folder = models / f".{name}.part"
        self.final = models / name

    def holds(self, file: RemoteFile) -> bool:
        """Whether a file is there in its size. Both libraries write elsewhere and rename, so that it is then whole."""
        path = self.folder / file.path
        return path.is_file() and not path.is_symlink() and path.stat().st_size == file.size

    def present(self, file: RemoteFile) -> int:
        """Bytes of a file that need not arrive again: all, or what ModelScope's library goes on from."""
        if self.holds(file):
            return file.size
        rest = self.folder / f"{file.path}.incomplete"
        return min(rest.stat().st_size, file.size) if rest.is_file() else 0

    def begin(self, listing: Listing) -> None:
        """Keep what belongs to this listing, take over what the finished folder already has, note what is begun."""
        wanted = _source(listing)
        if _read(self.folder / SOURCE_FILE) == wanted:
            return
        expected = {file.path: file for file in listing.files}
        self._clear(lambda name, path: name in expected and _proven(path, expected[name]))
        for file in listing.files:
            stands, target = self.final / file.path, self.folder / file.path
            if not target.exists() and stands.is_file() and _proven(stands, file):
                target.parent.mkdir(parents=True, exist_ok=True)
                # Without links it is fetched again: what stands must stay as it is.
                with contextlib.suppress(OSError):
                    os.link(stands, target)
        (self.folder / SOURCE_FILE).write_text(json.dumps(wanted, indent=1), encoding="utf-8")

    def verify(self, repo: str, files: Sequence[RemoteFile], report: Progress | None) -> None:
        """Compare every size and hash.

        Raises:
            DownloadError: a file is not what the hub lists; each such is removed, and the next try brings it anew.
        """
        faults: list[DownloadError] = []
        done, total = 0, sum(file.size for file in files)
        for file in files:
            wrong = self._wrong(file)
            if wrong:
                (self.folder / file.path).unlink(missing_ok=True)
                faults.append(DownloadError(f"{file.path} of {repo} {wrong}.", f"Start it again. {KEPT}"))
            done += file.size
            if report:
                report.progress(done, total, "B", "checking")
        if faults:
            raise faults[0]

    def finish(self, listing: Listing) -> None:
        """Leave only the model's files, a GGUF file directly in the folder."""
        wanted = {file.path for file in listing.files} | {SOURCE_FILE}
        self._clear(lambda name, _: name in wanted)
        for path in list(self.folder.rglob("*/*.gguf")):
            path.rename(self.folder / path.name)
        self._clear(lambda *_: True)

    def drop(self, files: Sequence[RemoteFile]) -> None:
        """Forget files that had arrived."""
        for file in files:
            (self.folder / file.path).unlink(missing_ok=True)

    def refuse_foreign(self) -> None:
        """Refuse, before anything is fetched, a name under which something stands that is not ours to replace.

        Raises:
            DownloadError: it was put there by hand.
        """
        if self.final.exists() and any(self.final.iterdir()) and not (self.final / publish.MANIFEST).exists():
            raise DownloadError(
                f"{self.final} was not put there by Nibble, so it is not replaced.",
                "Give the new model another name (--name), or move that folder away.",
            )

    def put_in_place(self, listing: Listing, more: Mapping[str, object]) -> None:
        """The finished folder under its name, with its manifest; what stood there before goes.

        Args:
            listing: where it came from.
            more: what its manifest says besides.

        Raises:
            ModelError: another save to that name is under way.
        """
        facts = {"source": listing.repo, "hub": listing.family, "revision": listing.revision, **more}
        with publish.publication(self.final, facts) as fresh:
            for path in [path for path in self.folder.rglob("*") if path.is_file() and path.name != SOURCE_FILE]:
                target = fresh / path.relative_to(self.folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                _link(path, target)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _wrong(self, file: RemoteFile) -> str:
        path = self.folder / file.path
        if not self.holds(file):
            there = path.is_file() and not path.is_symlink()
            return f"{f'has {path.stat().st_size:,}' if there else 'is missing'} instead of {file.size:,} bytes"
        return "" if _matches(path, file) else "arrived corrupted: its hash is not the one that the hub lists"

    def _clear(self, keep: Callable[[str, Path], bool]) -> None:
        """Remove every file that is not to be kept, and every folder that is then empty."""
        for path in sorted(self.folder.rglob("*"), reverse=True):
            if path.is_dir() and not path.is_symlink():
                with contextlib.suppress(OSError):
                    path.rmdir()
            elif path.is_symlink() or not keep(path.relative_to(self.folder).as_posix(), path):
                path.unlink()


@contextlib.contextmanager
def alone(models: Path, name: str) -> Iterator[Part]:
    """The partial folder of a model, for this process alone; made where there is none.

    Raises:
        DownloadError: another process downloads under this name.
    """
    part = Part(models, name)
    descriptor = _locked(part.folder)
    while descriptor is None:
        descriptor = _locked(part.folder)
    try:
        yield part
    finally:
        # Nothing has arrived, or all of it: nothing to keep.
        with contextlib.suppress(OSError):
            part.folder.rmdir()
        os.close(descriptor)


def _locked(folder: Path) -> int | None:
    """A descriptor that holds the lock on a folder; None where the folder has been put in place meanwhile."""
    folder.mkdir(exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise DownloadError(
            f"{folder.name[1:-5]} is being downloaded already.", "Wait for that one, or stop it first."
        ) from None
    if folder.exists() and folder.stat().st_ino == os.fstat(descriptor).st_ino:
        return descriptor
    os.close(descriptor)
    return None


def _source(listing: Listing) -> dict[str, object]:
    files = [asdict(file) for file in listing.files]
    return {"family": listing.family, "repo": listing.repo, "revision": listing.revision, "files": files}


def _read(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _proven(path: Path, file: RemoteFile) -> bool:
    """Whether a file from another source is the same one: its hash is known and is that of its content."""
    return path.stat().st_size == file.size and bool(file.sha256 or file.git) and _matches(path, file)


def _matches(path: Path, file: RemoteFile) -> bool:
    """Whether a file's content has the hash that the hub lists; True where it lists none."""
    if not (file.sha256 or file.git):
        return True
    digest = hashlib.sha256() if file.sha256 else hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest() == (file.sha256 or file.git)


def _link(source: Path, target: Path) -> None:
    """The same file under a second name; where the file system has no links, under that one alone."""
    try:
        os.link(source, target)
    except OSError:
        shutil.move(source, target)
