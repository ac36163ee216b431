"""The files of a merged model: the base's tensors in their order, each as it is or changed.

Promises that one tensor and one shard are in memory, that sums are float32 and rounded once to the stored dtype, and
that what the base ties together is written apart where an adapter changes one of the two. Knows nothing of proof.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from nibble.checkpoint import TOKENIZER_FILES, read_config, read_json
from nibble.errors import ModelError
from nibble.merging.changes import Change, row_blocks
from nibble.packing.planning import targets_of
from nibble.shards import Writer
from nibble.sources.base import Source
from nibble.sources.safetensors import copy_files

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""In which a weight may be stored that is changed."""


@dataclass(frozen=True)
class Output:
    """One tensor of the merged model."""

    name: str
    stored: str
    """The tensor of the base that it starts from."""
    place: str
    """In the model; empty where the model has no use for it."""
    change: Change | None = None
    new: bool = False
    """Whether the base's files hold it under another name only, tied to it."""


@dataclass(frozen=True)
class Layout:
    """Every tensor of the merged model."""

    outputs: tuple[Output, ...]
    untied: bool
    """Whether config.json has to say that input and output embeddings are no longer one."""

    @property
    def changed(self) -> tuple[Output, ...]:
        """Those that the adapter changes."""
        return tuple(output for output in self.outputs if output.change)


def layout(source: Source, model: PreTrainedModel, changes: Mapping[str, Change]) -> Layout:
    """Find the stored tensor of each change.

    Args:
        source: the base.
        model: the base without weights, and without PEFT's layers.
        changes: parameter of the model -> what becomes of it.

    Raises:
        ModelError: a weight that is to be changed is not in the files as it is in the model.
    """
    targets = targets_of(source.tensors, model)
    places = {name: to.names[0] for name, to in targets.items() if not to.converted}
    stored = {place: name for name, place in places.items()}
    tied = dict(model.all_tied_weights_keys)
    outputs = [Output(name, name, places.get(name, ""), changes.get(places.get(name, ""))) for name in source.tensors]
    found = {output.place for output in outputs}
    touched = {name for pair in tied.items() if changes.keys() & set(pair) for name in pair}
    for place in sorted(touched - found):
        origin = tied.get(place) or next(alias for alias, of in tied.items() if of == place and alias in stored)
        if origin in stored:
            outputs.append(Output(place, stored[origin], place, changes.get(place), new=True))
            found.add(place)
    lost = sorted(changes.keys() - found)
    if lost:
        raise ModelError(
            f"{lost[0]} is not in the files of {source.name} as it is in the model, so nothing can be added to it.",
            "Use the adapter in Chat without merging it.",
        )
    return Layout(tuple(outputs), bool(touched))


def merged(weight: torch.Tensor, change: Change, name: str) -> torch.Tensor:
    """A weight with its change, in its own dtype: summed in float32, rounded once.

    Raises:
        ModelError: it cannot be added to, or a sum is not finite in that dtype.
    """
    if weight.dtype not in DTYPES:
        raise ModelError(
            f"{name} is stored as {str(weight.dtype).removeprefix('torch.')}, which nothing is added to.",
            "Take the base in bf16, fp16 or fp32.",
        )
    out = torch.empty_like(weight)
    matrix, result = as_matrix(weight if change.values is None else change.values), as_matrix(out)
    for rows in row_blocks(tuple(matrix.shape)):
        total, more = matrix[rows].float(), change.add(rows)
        result[rows] = (total if more is None else total + more).to(out.dtype)
    if not torch.isfinite(out).all():
        raise ModelError(
            f"{name} would hold numbers that are not finite in {str(out.dtype).removeprefix('torch.')}.",
            "The adapter, or its factor, is far too large: take an earlier checkpoint.",
        )
    return out


def as_matrix(tensor: torch.Tensor) -> torch.Tensor:
    """A view with two sides; a vector is one column."""
    return tensor.reshape(-1, 1) if tensor.ndim < 2 else tensor.reshape(tensor.shape[0], -1)


def write_weights(source: Source, plan: Layout, folder: Path, tell: Callable[[int, int], None]) -> None:
    """Write all tensors.

    Raises:
        ModelError: as `merged`.
        OSError: writing failed.
    """
    writer = Writer(folder)
    for done, output in enumerate(plan.outputs):
        tell(done, len(plan.outputs))
        weight = source.tensors[output.stored].read()
        assert isinstance(weight, torch.Tensor)
        writer.add(output.name, merged(weight, output.change, output.name) if output.change else weight)
    writer.finish()
    tell(len(plan.outputs), len(plan.outputs))


def write_settings(base: Path, adapter: Path, folder: Path, *, untied: bool, stop: int | None) -> list[str]:
    """Write config.json, the generation config and the tokenizer.

    Args:
        base: folder of the base.
        adapter: folder of the adapter, whose tokenizer is taken where it brings one.
        folder: to write into.
        untied: whether input and output embeddings have become two.
        stop: token that ends what was learnt.

    Returns:
        What is worth telling, in sentences.
    """
    config = read_config(base)
    if untied:
        for part in (config, config.get("text_config")):
            if isinstance(part, dict) and (part is config or "tie_word_embeddings" in part):
                part["tie_word_embeddings"] = False
        _write_json(folder / "config.json", config)
    else:
        shutil.copyfile(base / "config.json", folder / "config.json")
    own = (adapter / "tokenizer_config.json").is_file() and any(
        next(adapter.glob(pattern), None) for pattern in TOKENIZER_FILES
    )
    copy_files(adapter if own else base, folder)
    settings = base / "generation_config.json"
    if settings.is_file():
        shutil.copyfile(settings, folder / settings.name)
    notes = ["Input and output embeddings were one weight, and are two now."] if untied else []
    return notes + _write_stop(folder, config, stop)


def _write_stop(folder: Path, config: Mapping[str, Any], stop: int | None) -> list[str]:
    """Have generation end where the training taught it to."""
    path = folder / "generation_config.json"
    settings = read_json(path) if path.exists() else {}
    said = settings.get("eos_token_id", config.get("eos_token_id"))
    known = said if isinstance(said, list) else [] if said is None else [said]
    if stop is None or stop in known:
        return []
    _write_json(path, {**settings, "eos_token_id": [*known, stop]})
    return [f"Answers end at token {stop} too, as the adapter was taught."]


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
