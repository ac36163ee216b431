"""One download, from the question to the folder under its name: look, compare with the disk, fetch, verify, put there.

Promises that the folder under the model's name is whole or as it was, and that what had arrived is kept beside it, in
`.<name>.part`, until a later try has all of it. Knows the hubs only by `nibble.hub.source.Hub`.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from nibble import library, screen
from nibble.config import HUBS
from nibble.errors import ModelError, SourceError
from nibble.hub.datasets import choose_data
from nibble.hub.faults import KEPT, Asked, DownloadError, HubUnavailable, explain
from nibble.hub.huggingface import OFFICIAL, HuggingFace
from nibble.hub.modelscope import ModelScope
from nibble.hub.part import Part, alone
from nibble.hub.source import WEIGHTS, Hub, Listing, Progress, choose
from nibble.hub.tokens import stored_token

REPO = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.-]{0,95}/)?[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}")
REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./-]{0,127}")
SPARE_BYTES = 2**26
"""Left free on the disk whatever is fetched."""

ROOTS = {"model": library.MODELS, "dataset": "data"}
"""Kind of a repository -> the folder in home."""

NOUNS = {"model": ("model", "Qwen/Qwen2-1.5B-Instruct"), "dataset": ("data set", "tatsu-lab/alpaca")}
"""Kind of a repository -> what it is called, and one of them."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Request:
    """What to fetch."""

    repo: str
    """`org/name` on the hub."""
    hubs: tuple[str, ...] = ("huggingface",)
    """Tried in this order; a later one only where an earlier cannot answer. Names of `nibble.config.HUBS`, or, from the
    console and config.yaml only, the address of a mirror of Hugging Face."""
    revision: str = ""
    """Branch, tag or commit; empty is the hub's default."""
    name: str = ""
    """Under home/models; empty is `default_name`."""
    file: str = ""
    """One GGUF file, instead of the model's Hugging Face form; of a data set the file or folder to take."""
    kind: str = field(default="model", kw_only=True)
    """`model`, or `dataset`: that goes into home/data."""
    trusted: tuple[str, ...] = field(default=(), kw_only=True)
    """Names of models whose own Python code may run, as config.yaml says: it is then fetched too. Such a name is for
    the repository that it is the default name of, and no other may take it."""

    def __post_init__(self) -> None:
        if not REPO.fullmatch(self.repo) or ".." in self.repo:
            noun, example = NOUNS[self.kind]
            raise DownloadError(
                f"{self.repo!r} is not a {noun} on a hub.", f"Write it as the hub does, such as {example}."
            )
        if self.revision and (not REVISION.fullmatch(self.revision) or ".." in self.revision):
            raise DownloadError(f"{self.revision!r} is not a revision.", "Name a branch, a tag or a commit.")
        if self.kind == "dataset":
            self._check_data_set()
            return
        if not library.NAME.fullmatch(self.target) or self.target == library.GUIDE:
            raise DownloadError(
                f"{self.target!r} cannot be the name of a model.",
                "Use letters, digits, dots, dashes and underscores, up to 128, not a dot first, and not `guide`.",
            )
        # Else whoever asks for a download could bring any repository's code under a name that is trusted.
        if self.target in self.trusted and self.target.replace("__", "/", 1) != self.repo:
            raise DownloadError(
                f"{self.target!r} stands in trust_remote_code, and {self.repo} is another model.",
                "Choose another name, or leave it out.",
            )

    def _check_data_set(self) -> None:
        """A recipe names a data set as its hub does, so that is where it must lie."""
        if "/" not in self.repo or self.name or not library.NAME.fullmatch(self.target):
            raise DownloadError(
                f"{(self.name or self.repo)!r} cannot be the name of a data set of a hub.",
                "Write it as the hub does, org/name; it is called so here too.",
            )

    @property
    def target(self) -> str:
        """The name under home/models, or home/data."""
        return self.name or default_name(self.repo, "" if self.kind == "dataset" else self.file)

    @property
    def code(self) -> bool:
        """Whether the model's own Python code may run."""
        return self.kind == "model" and self.target in self.trusted

    def root(self, home: Path) -> Path:
        """The folder that its own goes into."""
        return home / ROOTS[self.kind]


@dataclass(frozen=True)
class Plan:
    """What a download would do."""

    name: str
    hub: str
    """The hub that answered, for a person."""
    listing: Listing
    """The chosen files."""
    needed: int
    """Bytes that still have to arrive."""
    free: int
    """Bytes free on the disk that it goes to."""

    @property
    def fits(self) -> bool:
        """Whether the disk has room."""
        return self.needed == 0 or self.needed + SPARE_BYTES <= self.free


def default_name(repo: str, file: str = "") -> str:
    """`org__name`; for one GGUF file `org__<file>`, since a repository holds several."""
    org, _, name = repo.rpartition("/")
    stem = Path(file).stem if file else name
    return f"{org}__{stem}" if org else stem


def plan(request: Request, home: Path, report: Progress) -> Plan:
    """Ask the hub what a download would bring, and the disk whether it has room; fetches nothing.

    Raises:
        DownloadError: the hub has it not, or cannot answer.
    """
    return _first(request, home, report, lambda hub: _plan(hub, request, home))


def download(request: Request, report: Progress, home: Path) -> Path:
    """Fetch a model into home/models/<name>, or a data set into home/data/<org>__<name>.

    An existing one of that name is replaced whole, at the end.

    Args:
        request: what to fetch.
        report: told the bytes ("B") of the stages `downloading` and `checking`, and lines for a person.
        home: Nibble's home folder.

    Returns:
        Its folder.

    Raises:
        DownloadError: anything that went wrong, in one sentence; what had arrived is kept for the next try.
        ModelError: it arrived whole, but cannot or must not be loaded; or another save to that name is under way.
    """
    models = request.root(home)
    with _written(models):
        models.mkdir(parents=True, exist_ok=True)
        with alone(models, request.target) as part:
            part.refuse_foreign()
            listing = _first(request, home, report, lambda hub: _bring(hub, request, home, report, part))
            if request.kind == "dataset":
                part.put_in_place(listing, {"kind": "dataset", "parts": [file.path for file in listing.files]})
            else:
                library.drop_report(request.target, home)  # It tells of what stood there before.
                part.put_in_place(listing, {})
    return models / request.target


def open_hub(name: str, home: Path, kind: str = "model") -> Hub:
    """The hub of a name, for models or for data sets.

    Raises:
        DownloadError: no such hub, or its token file can be read by others.
    """
    environ = os.environ
    if name == "huggingface":
        return HuggingFace(environ.get("HF_ENDPOINT") or OFFICIAL, stored_token(name, home, environ), kind)
    if name == "modelscope":
        return ModelScope(environ.get("MODELSCOPE_ENDPOINT", ""), stored_token(name, home, environ), kind)
    if name in HUBS or re.match(r"https?://", name):
        # A mirror that nobody gave the token to (that is HF_ENDPOINT's meaning) must not see it.
        return HuggingFace("https://hf-mirror.com" if name in HUBS else name, False, kind)
    raise DownloadError(f"There is no hub {name!r}.", f"Hubs: {', '.join(HUBS)}.")


def _first(request: Request, home: Path, report: Progress, act: Callable[[Hub], Result]) -> Result:
    """What the first hub that can answer gives."""
    for name, following in zip(request.hubs, (*request.hubs[1:], ""), strict=True):
        try:
            return act(open_hub(name, home, request.kind))
        except HubUnavailable as fault:
            if not following:
                raise
            report.note(f"{fault.message} Trying {following}.")
    raise DownloadError("No hub is named to download from.", "Set hubs in config.yaml, or use --hub.")


def _ask(hub: Hub, request: Request, question: Callable[[], Result], kept: str = "") -> Result:
    """What a hub's library answers; whatever it raises becomes a sentence, which ends with `kept`."""
    try:
        return question()
    except Exception as error:  # noqa: BLE001 - the border of two libraries that raise what they like
        fault = explain(error, Asked(hub.label, hub.family, request.repo, request.revision, kept, request.kind))
    # Outside the handler, so that what a server said does not hang on it.
    raise fault


def _plan(hub: Hub, request: Request, home: Path) -> Plan:
    found = _ask(hub, request, lambda: hub.look(request.repo, request.revision))
    data_set = request.kind == "dataset"
    listing = choose_data(found, request.file) if data_set else choose(found, request.file, code=request.code)
    unsized = next((file.path for file in listing.files if file.size < 0), "")
    if unsized:
        raise HubUnavailable(f"{hub.label} does not tell the size of {unsized}.", "Try again later, or another hub.")
    models = request.root(home)
    here = sum(Part(models, request.target).present(file) for file in listing.files)
    existing = next(folder for folder in (models, *models.parents) if folder.exists())
    return Plan(request.target, hub.label, listing, listing.size - here, shutil.disk_usage(existing).free)


def _bring(hub: Hub, request: Request, home: Path, report: Progress, part: Part) -> Listing:
    """Everything into the partial folder, verified: the small files first, since they may tell that it is in vain."""
    listing = _plan(hub, request, home).listing
    part.begin(listing)
    needed = listing.size - sum(part.present(file) for file in listing.files)
    free = shutil.disk_usage(part.folder).free
    if needed and needed + SPARE_BYTES > free:
        raise DownloadError(
            f"{request.repo} needs {_size(needed)} more, and the disk of {home} has {_size(free)} free.",
            "Free some space, or set home to a larger disk (--home, NIBBLE_HOME).",
        )
    report.note(f"{request.repo} from {hub.label}: {len(listing.files)} files, {_size(listing.size)}.")
    counter = _Counter(report, listing.size)
    for weights in (False, True):
        wanted = [file for file in listing.files if file.path.endswith(WEIGHTS) == weights]
        missing = [file for file in wanted if not part.holds(file)]
        counter.begin(sum(file.size for file in wanted if part.holds(file)))
        if missing:
            _ask(hub, request, lambda: hub.fetch(listing, missing, part.folder, counter.moved), KEPT)  # noqa: B023
        counter.end(sum(file.size for file in wanted))
        part.verify(listing.repo, wanted, report if weights or request.kind == "dataset" else None)
        _check(part, request, weights=False)
    part.finish(listing)
    try:
        _check(part, request)
    except ModelError:
        # Whatever no hash vouches for must arrive anew, or each later try would end here again.
        part.drop([file for file in listing.files if not (file.sha256 or file.git)])
        raise
    return listing


def _check(part: Part, request: Request, *, weights: bool = True) -> None:
    """Refuse what cannot or must not be used, by the name that the model will have."""
    if request.kind == "dataset" or (request.file and not weights):
        return  # a GGUF file comes alone; data is read row by row, and whatever is wrong with it is said then
    try:
        screen.check(part.folder, trust_remote_code=request.code, weights=weights)
    except SourceError:
        return  # it can be converted
    except ModelError as error:
        message, hint = (text.replace(part.folder.name, request.target) for text in (error.message, error.hint))
        raise ModelError(message, hint) from None


class _Counter:
    """Bytes that have arrived, told by several threads."""

    def __init__(self, report: Progress, total: int) -> None:
        self._report, self._total = report, total
        self._mutex = threading.Lock()
        self._whole = self._done = 0

    def begin(self, here: int) -> None:
        """A group of files begins, `here` bytes of which lie there already."""
        self._done = self._whole + here
        self._tell()

    def moved(self, count: int) -> None:
        with self._mutex:
            self._done += count
            self._tell()

    def end(self, size: int) -> None:
        """The group is there, `size` bytes of it, however they came."""
        self._whole += size
        self._done = self._whole
        self._tell()

    def _tell(self) -> None:
        self._report.progress(min(self._done, self._total), self._total, "B", "downloading")


@contextlib.contextmanager
def _written(models: Path) -> Iterator[None]:
    """The file system's own refusals as sentences."""
    try:
        yield
    except OSError as error:
        raise explain(error, Asked(str(models), "huggingface", "what arrived", kept=KEPT)) from None


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
