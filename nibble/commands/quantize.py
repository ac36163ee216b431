"""`nibble quantize MODEL --low-bit B`: a model in low bit into home/models, in this very process, and what it lost."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from nibble.config import Settings
from nibble.errors import ConfigError
from nibble.jobs import run_foreground
from nibble.quality.table import lines

SETTINGS = ["home", "device"]

UNITS = ("", "k", "m", "g", "t")
"""Each a thousand of the one before; with an i, as in GiB, 1024."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this command's own flags."""
    parser.add_argument(
        "model", metavar="MODEL", help="a name (see `nibble models`), a folder, a GGUF file, or org/name on a hub"
    )
    parser.add_argument(
        "--low-bit", metavar="B[,B…]", default="",
        help="formats, one folder each, such as sym_int4 (default: what the source has: GGUF, AWQ, GPTQ)",
    )  # fmt: skip
    parser.add_argument("--out", metavar="NAME", default="", help="its name here (default: MODEL-FORMAT)")
    parser.add_argument("--skip", metavar="NAME", action="append", default=[], help="a module that stays as it is")
    parser.add_argument(
        "--override", metavar="PATTERN=FORMAT", action="append", default=[], help="another format for these modules"
    )
    parser.add_argument("--pick", action="store_true", help="choose the smallest form within the two limits below")
    parser.add_argument("--max-memory", metavar="SIZE", type=size, help="such as 4GB (default: no limit)")
    parser.add_argument("--max-kl", metavar="NATS", type=float, help="mean loss a token (default: 0.05)")
    parser.add_argument("--text", metavar="FILE", type=Path, help="measure on this text instead of the one that ships")
    parser.add_argument("--no-report", action="store_true", help="do not measure what was lost")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace, settings: Settings) -> None:
    """Quantize it, and say what there is now and how to chat with it."""
    limits = {"max_kl": arguments.max_kl, "memory_bytes": arguments.max_memory}
    if not arguments.pick and any(value is not None for value in limits.values()):
        raise ConfigError("--max-kl and --max-memory are limits for --pick, which is not given.", "Add --pick.")
    spec = {
        "model": arguments.model, "low_bit": [name for name in arguments.low_bit.split(",") if name.strip()],
        "out": arguments.out, "skip": arguments.skip, "overrides": dict(map(_override, arguments.override)),
        "evaluate": not arguments.no_report, "text": str(arguments.text.resolve()) if arguments.text else "",
        "pick": limits if arguments.pick else {},
        "device": settings.device, "home": str(settings.home_folder), "config": arguments.config or "", "paths": True,
    }  # fmt: skip
    # Packing itself is done on the CPU: this and a job on the same device wait for each other.
    device = "cpu" if settings.device == "auto" else settings.device
    result = run_foreground("quantize", spec, home=settings.home_folder, exclusive=device)
    if arguments.json:
        print(json.dumps(result, ensure_ascii=False, indent=2))
        return
    for model in result["models"]:
        print(line(model))
    if result["report"]:
        print("\n".join(["", *lines(result["report"]), ""]))
    print(f'Chat with it:   python -m nibble ask --model {result["models"][0]["name"]} "Hello"')


def size(text: str) -> int:
    """Bytes, from a text such as 4GB or 500 MB.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text.lower())
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write it as 4GB")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** UNITS.index(found[2]))


def _override(text: str) -> tuple[str, str]:
    pattern, equals, name = text.rpartition("=")
    if not (pattern and equals and name):
        raise ConfigError(f"--override is {text!r}.", "Write it as PATTERN=FORMAT, such as lm_head=sym_int8.")
    return pattern, name


def line(model: dict[str, Any]) -> str:
    """A model that was written, as one line: name, format, and its size before and after."""
    before, after = model["from_bytes"], model["bytes"]
    scale, unit = (1e9, "GB") if before >= 1e9 else (1e6, "MB")
    kept = f", {model['kept']} weights taken as they were" if model["kept"] else ""
    return f"{model['name']}: {model['format']}, {before / scale:.1f} → {after / scale:.1f} {unit}{kept}"
