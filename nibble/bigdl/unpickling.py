"""The process that opens the pickles of BigDL-LLM and IPEX-LLM: `python -m nibble.bigdl.unpickling FOLDER OUT`.

Promises that they are read as tensors alone (`weights_only=True`), one file at a time, and that OUT appears whole or
not at all. Tells its progress, and its result or error, as one JSON object a line. Knows nothing of who asked.
"""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from nibble import __version__, publish
from nibble.bigdl.blocks import ROUNDED, layout_of
from nibble.bigdl.convert import Converted
from nibble.bigdl.families import Plan, Weight, plan_of
from nibble.bigdl.folders import LOW_BIT_KEY, saved_format, saved_weights
from nibble.checkpoint import read_config
from nibble.engines.wire import pack_error
from nibble.errors import ModelError, NibbleError
from nibble.lowbit.blocks import QuantizedTensor
from nibble.lowbit.quantizer import LowBitConfig
from nibble.shards import Writer
from nibble.sources.safetensors import copy_files

DENSE = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""The library's names of formats in which nothing is packed."""


def convert_here(folder: Path, out: Path) -> Converted:
    """As `nibble.bigdl.convert.convert`, in this process; progress goes to standard output.

    Raises:
        ModelError: the folder cannot be converted.
        OSError: writing failed.
    """
    config = read_config(folder)
    saved = saved_format(config)
    if saved not in DENSE:
        layout_of(saved)  # refuses what cannot be converted before anything is read
    plan = plan_of(_transformers_config(config, folder.name), saved)
    facts: dict[str, Any] = {
        "format": saved, "source": folder.name, "converted_from": f"BigDL-LLM {saved}",
        "parameters": sum(shape.numel() for shape in plan.shapes.values()),
        "versions": {"nibble": __version__, **{name: version(name) for name in ("torch", "transformers")}},
    }  # fmt: skip
    with publish.publication(out, facts) as fresh:
        writer, packed, found = Writer(fresh), {}, set()
        for name, weight in _weights(folder, plan):
            found.add(name)
            if isinstance(weight, QuantizedTensor):
                packed[name.removesuffix(".weight")] = weight.format.name
                writer.add(name, weight.codes)
                writer.add(f"{name}_scale", weight.scales)
            else:
                writer.add(name, weight)
        plan.complete(found)
        writer.finish()
        result = Converted(
            format=next(iter(packed.values()), saved),
            exact=not ROUNDED & set(packed.values()),
            dense=tuple(sorted(plan.linear - packed.keys())) if packed else (),
        )
        facts["format"] = result.format
        _write_config(fresh, config, result, plan)
        copy_files(folder, fresh)
    return result


def _transformers_config(config: dict[str, Any], name: str) -> Any:
    family = str(config.get("model_type"))
    known = {key: value for key, value in config.items() if not key.startswith("bigdl_") and key != "auto_map"}
    try:
        return AutoConfig.for_model(**known)
    except (KeyError, ValueError):
        raise ModelError(
            f"{name} is a {family} model, which transformers 5 does not know.",
            "Run it in BigDL-LLM itself: `make bigdl`, then engine: bigdl in config.yaml.",
        ) from None


def _weights(folder: Path, plan: Plan) -> Iterator[tuple[str, Weight]]:
    """Every weight of the folder, by its name in transformers 5."""
    files = saved_weights(folder)
    total, done = sum(file.stat().st_size for file in files), 0
    for file in files:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError) as error:
            raise ModelError(
                f"{file.name} in {folder.name} holds something else than tensors, or is damaged.",
                "Do not use it if you do not trust its maker; else copy the folder again.",
            ) from error
        if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise ModelError(f"{file.name} in {folder.name} is not a table of tensors.", "Copy the folder again.")
        for name in list(state):
            # A copy: tied tensors share memory, which a safetensors file cannot say, and the file is mapped.
            value = state.pop(name).clone()
            yield from plan.restore(name, value)
            done += value.nbytes
            _tell({"done": min(done, total), "total": total})


def _write_config(fresh: Path, config: dict[str, Any], result: Converted, plan: Plan) -> None:
    ours = {key: value for key, value in config.items() if not key.startswith("bigdl_") and key != "auto_map"}
    if result.format not in DENSE:
        ours["quantization_config"] = LowBitConfig(result.format, _short(result.dense, plan.linear)).to_dict()
    assert LOW_BIT_KEY not in ours
    (fresh / "config.json").write_text(json.dumps(ours, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _short(dense: tuple[str, ...], linear: frozenset[str]) -> list[str]:
    """Names for `modules_to_not_convert`: one for a kind of layer that was left dense everywhere."""
    kinds = {name.rpartition(".")[2] for name in dense}
    whole = {kind for kind in kinds if all(name in dense for name in linear if name.rpartition(".")[2] == kind)}
    return sorted(whole) + [name for name in dense if name.rpartition(".")[2] not in whole]


def _tell(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def main(arguments: list[str]) -> int:
    """Convert and tell; 0 where it went well."""
    try:
        result = convert_here(Path(arguments[0]), Path(arguments[1]))
    except NibbleError as error:
        _tell({"error": pack_error(error)})
        return 1
    except OSError as error:
        where = ModelError(f"Writing {arguments[1]} failed: {error.strerror}.", "Check the free space and permissions.")
        _tell({"error": pack_error(where)})
        return 1
    _tell(asdict(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
