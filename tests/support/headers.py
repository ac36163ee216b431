"""Model folders that are all header: their weights are holes in the file, which no disk holds."""

import json
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

WIDTHS = {"F32": 4, "I32": 4, "BF16": 2, "F16": 2, "U8": 1}

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]
"""Name -> dtype and shape."""


def write_headers(folder: Path, config: Mapping[str, Any], tensors: Tensors) -> Path:
    """A folder with this config.json and a safetensors file of these tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + prod(shape) * WIDTHS[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    front = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(front)) + front)
        stream.truncate(8 + len(front) + end)
    return folder
