"""What is known of this machine's speed, kept in home/machine.json until the machine or torch is another.

Promises that figures measured elsewhere, or by another torch, are not taken for this machine's. Imports no torch.
Knows nothing of models.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from nibble import devices
from nibble.errors import DeviceError

FILE = "machine.json"

LAYOUT = 1
"""Version of the file; raised when a figure comes to mean something else."""

PROCESS_BYTES = 300_000_000
"""Private memory of a process that has loaded torch and transformers, where it was not measured: torch 2.13 for CPUs
and transformers 5.23 took 290 MB after a first answer."""

BUSY = 0.5
"""Share of the cores that other work may take before figures are doubted."""

TIMEOUT_S = 300
"""A machine so busy that the measuring takes longer gives no figures worth keeping."""


@dataclass(frozen=True)
class Machine:
    """A machine, and how fast the engine is on it; figures that were not measured are 0 or missing."""

    identity: dict[str, str]
    """What the figures hold for: processor, cores, torch."""
    cores: int
    """That this process may use."""
    bandwidth: float = 0.0
    """Bytes a second that all cores together read from memory."""
    rates: dict[str, float] = field(default_factory=dict)
    """Format -> weights a second that pass through a matrix product with one row, from memory, on the CPU."""
    kernels: tuple[str, ...] | None = None
    """Formats that torch's int4 kernel serves on this CPU; None where that was not tried."""
    layer_s: dict[str, float] = field(default_factory=dict)
    """What serves a layer (`nibble.estimate.Way`) -> seconds that it takes for a token beside its weights."""
    token_s: float = 0.0
    """Seconds that a token takes beside its layers."""
    process_bytes: int = PROCESS_BYTES
    """Private memory of the engine's process beside a model."""
    device: str = "cpu"
    """The device that `auto` chooses."""
    device_bytes: int = 0
    """Memory that was free on it, where it is not the CPU."""
    load: float = 0.0
    """Processes that wanted a core in the minute before: figures of a busy machine are too low."""
    measured: float = 0.0
    """Unix time; 0 where nothing was measured."""

    @property
    def busy(self) -> bool:
        """Whether so much else ran that measuring again, when less does, would give better figures."""
        return self.load > BUSY * self.cores

    @property
    def free_bytes(self) -> int:
        """Memory that a model can take now; of a GPU, what it had when the machine was measured."""
        return devices.free_memory("cpu") if self.device == "cpu" else self.device_bytes

    def on(self, device: str) -> Machine:
        """The same machine for a setting of the device: auto keeps the one found, cpu leaves a GPU aside."""
        return replace(self, device="cpu") if device == "cpu" else self


def identity() -> dict[str, str]:
    """What the figures depend on: the processor, the cores that may be used, and torch's version."""
    try:
        torch = metadata.version("torch")
    except metadata.PackageNotFoundError:
        torch = ""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    return {"processor": _processor(), "cores": str(devices.usable_cores()), "threads": threads, "torch": torch}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict.fromkeys(("vendor_id", "cpu family", "model", "model name", "stepping"), "")
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in facts:
            facts[name.strip()] = facts[name.strip()] or value.strip()
    # The name alone can be as vague as "Intel(R) Xeon(R) Processor".
    return " ".join(value for value in facts.values() if value) or platform.machine()


def unmeasured() -> Machine:
    """This machine as it is known without measuring: memory can be estimated, speed cannot."""
    return Machine(identity(), devices.usable_cores())


def known(home: Path) -> Machine | None:
    """What was measured in this home on this machine with this torch; None where that has not been done."""
    try:
        content = json.loads((home / FILE).read_text(encoding="utf-8"))
        machine = _read(content)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None
    return machine if content.get("layout") == LAYOUT and machine.identity == identity() else None


def _read(content: dict[str, Any]) -> Machine:
    machine = Machine(**{item.name: content[item.name] for item in fields(Machine) if item.name in content})
    numbers = [machine.bandwidth, machine.token_s, machine.measured, machine.process_bytes, machine.device_bytes]
    numbers += [machine.cores, machine.load, *machine.rates.values(), *machine.layer_s.values()]
    if not all(isinstance(number, (int, float)) and 0 <= number < float("inf") for number in numbers):
        raise ValueError("not a figure")
    return replace(machine, kernels=None if machine.kernels is None else tuple(map(str, machine.kernels)))


def keep(machine: Machine, home: Path) -> None:
    """Write what was measured, whole or not at all."""
    home.mkdir(parents=True, exist_ok=True)
    fresh = home / f".{FILE}.{os.getpid()}"
    try:
        fresh.write_text(json.dumps({"layout": LAYOUT, **asdict(machine)}, indent=2) + "\n", encoding="utf-8")
        fresh.replace(home / FILE)
    finally:
        fresh.unlink(missing_ok=True)


def ensure(home: Path) -> Machine:
    """What is known of this machine, measured first where it is not; that takes some seconds.

    Raises:
        DeviceError: it could not be measured.
    """
    return known(home) or renew(home)


def renew(home: Path) -> Machine:
    """Measure this machine, whatever is known of it, in a process of its own; that takes some seconds.

    Raises:
        DeviceError: it could not be measured.
    """
    command = [sys.executable, "-m", "nibble.probe", "--home", str(home)]
    root = Path(__file__).parents[2]
    try:
        run = subprocess.run(
            command, cwd=root, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        raise DeviceError("Measuring this machine took too long.", "Try again when less runs on it.") from None
    if run.returncode:
        cause = next((line.strip() for line in reversed(run.stderr.splitlines()) if line.strip()), "its process died")
        raise DeviceError(f"This machine could not be measured: {cause}", "`nibble doctor` may tell more.")
    machine = known(home)
    if machine is None:
        raise DeviceError(f"What was measured could not be kept in {home}.", "Check that the folder can be written.")
    return machine
