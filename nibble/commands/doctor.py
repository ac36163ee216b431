"""`nibble doctor`: what Nibble finds on this machine, and what to do where something is amiss."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path

from nibble import __version__, devices, hosting, probe
from nibble.config import Settings
from nibble.engines import bigdl
from nibble.errors import NibbleError

SETTINGS = [item.name for item in fields(Settings)]
LIBRARIES = ("torch", "transformers", "tokenizers", "gradio", "accelerate", "safetensors", "modelscope")
OPTIONAL = ("intel_extension_for_pytorch", "peft", "trl", "bitsandbytes")


@dataclass(frozen=True)
class Finding:
    """One line of the report; `ok` is False where something keeps Nibble from working as set."""

    topic: str
    text: str
    ok: bool = True


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this command's own flags."""
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    parser.add_argument("--measure", action="store_true", help="measure this machine first; takes some seconds")


def run(arguments: argparse.Namespace, settings: Settings) -> None:
    """Print every finding; one that fails is a finding too, so that one broken thing does not hide the others."""
    looks = (_measure, *LOOKS) if arguments.measure else LOOKS
    findings = [finding for look in looks for finding in _guarded(look, settings)]
    if arguments.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2, ensure_ascii=False))
        return
    width = max(len(finding.topic) for finding in findings)
    for finding in findings:
        print(f"{'ok ' if finding.ok else '!! '} {finding.topic.ljust(width)}  {finding.text}")


def _guarded(look: Callable[[Settings], list[Finding]], settings: Settings) -> list[Finding]:
    try:
        return look(settings)
    except NibbleError as error:
        return [Finding(look.__name__.strip("_"), str(error), ok=False)]
    except (OSError, ImportError, RuntimeError) as error:
        return [Finding(look.__name__.strip("_"), f"{type(error).__name__}: {error}", ok=False)]


def _libraries(settings: Settings) -> list[Finding]:
    found = [Finding("nibble", f"{__version__}, Python {platform.python_version()}, {platform.system()}")]
    for name in (*LIBRARIES, *OPTIONAL):
        try:
            found.append(Finding(name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            if name in LIBRARIES:
                found.append(Finding(name, "not installed: run `make run`, which installs it", ok=False))
    return found


def _device(settings: Settings) -> list[Finding]:
    device = devices.choose(settings.device)
    free = devices.free_memory(device.kind) / 2**30
    found = [
        Finding("device", device.reason),
        Finding("memory", f"{free:.1f} GiB free on {device.kind}"),
        Finding("cores", f"{devices.usable_cores()} usable"),
    ]
    if device.kind == "xpu":
        found += [Finding(name, os.environ.get(name, "")) for name in devices.XPU_VARIABLES]
    return found


def _measure(settings: Settings) -> list[Finding]:
    probe.renew(settings.home_folder)
    return []


def _speed(settings: Settings) -> list[Finding]:
    machine = probe.known(settings.home_folder)
    if machine is None:
        return [Finding("speed", "not measured on this machine yet: python -m nibble doctor --measure")]
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(machine.measured))
    rates = ", ".join(f"{name} {rate / 1e9:.1f}" for name, rate in machine.rates.items())
    again = "; much else ran then: doctor --measure when less does" if machine.busy else ""
    return [
        Finding("bandwidth", f"{machine.bandwidth / 1e9:.1f} GB/s read from memory (measured {when}{again})"),
        Finding("speed", f"thousand million weights a second, one token at a time: {rates}"),
        Finding("process", f"{machine.process_bytes / 1e6:.0f} MB beside a model"),
    ]


def _engine(settings: Settings) -> list[Finding]:
    if settings.engine == "nibble":
        return [Finding("engine", "nibble")]
    python = bigdl.interpreter(settings)
    return [Finding("engine", f"bigdl, in {python}: {bigdl.library_of(python)}")]


def _home(settings: Settings) -> list[Finding]:
    home = settings.home_folder
    base = next(folder for folder in (home, *home.parents) if folder.exists())
    free = shutil.disk_usage(base).free / 2**30
    writable = os.access(base, os.W_OK)
    text = f"{home}, {free:.1f} GiB free" + ("" if writable else "; it cannot be written: set home to another folder")
    cards = bigdl.models(settings)
    broken = [card for card in cards if card.problem]
    return [
        Finding("home", text, ok=writable),
        Finding("models", ", ".join(card.name for card in cards) or "none", ok=bool(cards)),
        *(Finding(f"model {card.name}", card.problem, ok=False) for card in broken),
    ]


def _page(settings: Settings) -> list[Finding]:
    hosting.check_binding(settings)
    address = hosting.parse_root_path(settings.root_path, settings.port)
    where = f"http://{settings.host}:{settings.port}"
    found = [
        Finding("page", f"{where}" + (f", in public {address.root_path}/" if address.root_path else "")),
        Finding("origins", ", ".join(sorted(hosting.Doorkeeper.for_settings(settings).origins)) or "this machine only"),
    ]
    notebook = hosting.find_dsw()
    advice = hosting.dsw_advice(settings, notebook)
    found.append(Finding("ModelScope DSW", f"{notebook or 'no sign of it here'}; there: {advice}"))
    opened = [name for name in ("GRADIO_SHARE", "GRADIO_ALLOWED_PATHS", "GRADIO_MCP_SERVER") if os.environ.get(name)]
    found += [Finding(name, "is set in the environment; Nibble ignores it") for name in opened]
    return found


def _settings(settings: Settings) -> list[Finding]:
    shown = asdict(settings) | {"auth": "set" if settings.auth else "none"}
    return [
        Finding("environment", sys.prefix),
        Finding("project", str(Path(__file__).parents[2])),
        Finding("settings", ", ".join(f"{name}={value}" for name, value in shown.items())),
    ]


LOOKS: tuple[Callable[[Settings], list[Finding]], ...] = (_libraries, _device, _speed, _engine, _home, _page, _settings)
