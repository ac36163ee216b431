"""What an adapter is, and which model it belongs to: read from its files, without loading either.

Promises that an adapter is matched to a base by what the base's weights are, not by what it is called, wherever the
adapter says so; and that whatever is wrong is a sentence. Imports no torch. Knows nothing of how an adapter is trained,
put on a model or merged.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nibble import library, publish
from nibble.checkpoint import read_config, read_header, weight_files
from nibble.errors import ModelError, NibbleError
from nibble.screen import check_adapter

WEIGHTS = "adapter_model.safetensors"

PLAIN_STARTS = ("true", "false", "gaussian", "eva", "orthogonal")
"""Ways to begin an adapter that leave the base as it is; pissa, olora, corda and loftq do not."""

PIECE = 2**22
"""Bytes that are read at once."""


@dataclass(frozen=True)
class Adapter:
    """An adapter as its files tell of it."""

    name: str
    folder: Path
    config: Mapping[str, Any]
    """adapter_config.json, as PEFT wrote it."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """nibble.json; empty where it was made elsewhere."""

    @property
    def method(self) -> str:
        """PEFT's name of what it is: LORA as a rule."""
        return str(self.config.get("peft_type") or "")

    @property
    def said(self) -> Mapping[str, Any]:
        """What is recorded of the base: `name`, `fingerprint`, `format`, `family`; empty in a foreign adapter."""
        base = self.facts.get("base")
        return base if isinstance(base, Mapping) else {}

    @property
    def base(self) -> str:
        """Name of the model that it was trained on, as its maker called it: never a path."""
        path = str(self.said.get("name") or self.config.get("base_model_name_or_path") or "")
        return re.split(r"[\\/]", path.rstrip("\\/"))[-1]

    @property
    def fingerprint(self) -> str:
        """Of the base; empty where it is not recorded."""
        return str(self.said.get("fingerprint") or "")

    @property
    def format(self) -> str:
        """In which the base was held while it was trained; empty where that is not recorded."""
        return str(self.said.get("format") or "")

    @property
    def recipe(self) -> Mapping[str, Any]:
        """How it was trained; empty where that is not recorded."""
        recipe = self.facts.get("recipe")
        return recipe if isinstance(recipe, Mapping) else {}

    @property
    def start(self) -> str:
        """How it began (`init_lora_weights`), in lower case."""
        return str(self.config.get("init_lora_weights", True)).lower()

    @property
    def leaves_base(self) -> bool:
        """Whether it is a change of its base; some began by taking something away from the base's own weights."""
        return self.start in PLAIN_STARTS

    def scale(self, module: str) -> float:
        """What B·A is multiplied with in a module: alpha / r, or alpha / √r where rank-stabilised (arXiv:2312.03732).

        Args:
            module: dotted path of the layer in the base, such as model.layers.0.self_attn.q_proj.
        """
        rank = _matching(self.config.get("rank_pattern"), module, self.config.get("r", 8))
        alpha = _matching(self.config.get("alpha_pattern"), module, self.config.get("lora_alpha", 8))
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else float(rank))


def _matching(pattern: object, module: str, otherwise: Any) -> Any:
    """The value of the first pattern that a module's path ends with, as PEFT matches them.

    Raises:
        ModelError: a pattern is more than a name: as a regular expression a stranger's could run for ever.
    """
    for key, value in pattern.items() if isinstance(pattern, Mapping) else ():
        if not re.fullmatch(r"[\w.]+", key):
            raise ModelError(f"The adapter has a pattern that is no module's name: {key[:60]!r}.", "Write names out.")
        if f".{module}".endswith(f".{key}"):
            return value
    return otherwise


def read(folder: Path) -> Adapter:
    """The adapter in a folder that PEFT has written, ours or another's.

    Raises:
        ModelError: it is none, or must not be put on a model.
    """
    config = check_adapter(folder)
    facts = publish.read_manifest(folder)
    return Adapter(folder.name, folder, config, facts if facts.get("kind") == "adapter" else {})


def fingerprint(folder: Path) -> str:
    """What tells a model from every other, whatever it is called and however its file is cut.

    sha256 over name, dtype, shape and bytes of each stored tensor, in the order of the names. Reads every weight once:
    a second or two for three gigabytes that lie in memory.

    Raises:
        ModelError: as `nibble.checkpoint.weight_files`.
    """
    places = {name: (file, tensor) for file in weight_files(folder) for name, tensor in read_header(file).items()}
    digest = hashlib.sha256()
    try:
        for name in sorted(places):
            file, tensor = places[name]
            digest.update(f"{name}\0{tensor['dtype']}\0{tensor['shape']}\0".encode())
            for piece in _pieces(file, *tensor["data_offsets"]):
                digest.update(piece)
    except OSError as error:
        raise ModelError(f"{folder.name} cannot be read: {error.strerror}.", "Check its files.") from None
    return digest.hexdigest()


def _pieces(file: Path, begin: int, end: int) -> Iterator[bytes]:
    with file.open("rb") as stream:
        start = 8 + int.from_bytes(stream.read(8), "little")
        stream.seek(start + begin)
        left = end - begin
        while left:
            piece = stream.read(min(PIECE, left))
            if not piece:
                raise ModelError(f"{file.name} was cut while it was read.", "Try again.")
            left -= len(piece)
            yield piece


def belongs(adapter: Adapter, folder: Path) -> bool:
    """Whether a model is the one that an adapter was trained on: by its weights, or by its name in a foreign one.

    A low-bit form of that model, or its full-precision form where it was trained on a low-bit one, is not the same; the
    former is let pass where the model that it was made from lies beside it.

    Args:
        adapter: as `read` gives it.
        folder: of a model.

    Raises:
        ModelError: as `fingerprint`.
    """
    if adapter.fingerprint:
        return any(fingerprint(place) == adapter.fingerprint for place in (folder, *_source(folder)))
    names = {folder.name, str(read_config(folder).get("_name_or_path") or "").rpartition("/")[2]}
    names |= {library.GUIDE} if folder.resolve() == library.GUIDE_FOLDER else set()
    # `org__name` is what a download is called here.
    return adapter.base in names | {name.rpartition("__")[2] for name in names}


def _is_base(adapter: Adapter, folder: Path) -> bool:
    return bool(adapter.fingerprint) and fingerprint(folder) == adapter.fingerprint


def _source(folder: Path) -> list[Path]:
    """The model that a low-bit one was made from, where it lies beside it."""
    name = str(publish.read_manifest(folder).get("source") or "")
    place = library.GUIDE_FOLDER if name == library.GUIDE else folder.parent / name
    return [place] if library.NAME.fullmatch(name) and place.is_dir() and place != folder else []


def base_folder(adapter: Adapter, home: Path, *, paths: bool = False) -> Path:
    """The model here that an adapter belongs to.

    The one of the recorded name where its weights are those that it was trained on, else any model that is.

    Args:
        adapter: as `read` gives it.
        home: Nibble's home folder.
        paths: whether the path that PEFT wrote down may lead to it.

    Raises:
        ModelError: none is here.
    """
    written = str(adapter.config.get("base_model_name_or_path") or "")
    first = [written] if paths and written else []
    names = list(dict.fromkeys([adapter.base, *(card.name for card in library.models(home))]))
    # What it was trained on before what was made of that.
    for fits in (_is_base, belongs):
        for name in (*first, *names):
            try:
                folder = library.find(name, home, paths=name in first)
                if fits(adapter, folder):
                    return folder
            except NibbleError:
                continue
    same_name = any(adapter.base == card.name for card in library.models(home))
    why = f"{adapter.base} here has other weights" if same_name else "it is not here"
    raise ModelError(
        f"{adapter.name} was trained on {adapter.base or 'a model that it does not name'}, and {why}.",
        "Get that model first: `nibble models` lists what there is.",
    )


def find_model(name: str, home: Path, *, paths: bool = False) -> tuple[Path, Path | None]:
    """The model that a name leads to; where only an adapter has that name, the model that it belongs to, and itself.

    Args:
        name: as `nibble.library.find`.
        home: Nibble's home folder.
        paths: whether a model may be named by its path.

    Raises:
        ModelError: nothing of that name, or the adapter belongs to no model that is here.
    """
    try:
        return library.find(name, home, paths=paths), None
    except ModelError:
        if not library.has_adapter(name, home):
            raise
    worn = library.find_adapter(name, home)
    return base_folder(read(worn), home), worn
