"""A model small enough to be sent a hundred times: real in form, made of noise. Nobody can chat with it."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

SHARD_BYTES = 120_000

WANTED = (
    "chat_template.jinja", "config.json", "generation_config.json", "merges.txt", "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json", "tokenizer.model",
)  # fmt: skip
"""What a download takes of it."""


def safetensors(seed: int, size: int = SHARD_BYTES) -> bytes:
    """A safetensors file of noise with one tensor of `size` bytes."""
    header = json.dumps({f"w{seed}": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(header)) + header + random.Random(seed).randbytes(size)


def write_model(folder: Path) -> Path:
    """A model in two shards, with all that a repository holds besides and that a download must leave there."""
    folder.mkdir(parents=True)
    shards = {f"model-0000{n}-of-00002.safetensors": safetensors(n) for n in (1, 2)}
    index = {"weight_map": {f"w{n}": f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}}
    files: dict[str, bytes] = {
        **shards,
        "config.json": json.dumps({"model_type": "llama", "max_position_embeddings": 64}).encode(),
        "generation_config.json": b'{"do_sample": false}',
        "model.safetensors.index.json": json.dumps(index).encode(),
        "tokenizer.json": json.dumps({"noise": random.Random(9).randbytes(4000).hex()}).encode(),
        "tokenizer.model": random.Random(7).randbytes(3000),
        "merges.txt": b"a b\n",
        "chat_template.jinja": b"{{ messages }}",
        "consolidated.safetensors": safetensors(3, 10),
        "model.fp16.safetensors": safetensors(4, 10),
        "pytorch_model.bin": b"pickle",
        "modeling_own.py": b"raise SystemExit",
        "README.md": b"# A model",
        ".gitattributes": b"*.bin lfs",
        "onnx/model.onnx": b"onnx",
        "original/params.json": b"{}",
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder
