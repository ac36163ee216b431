"""Which device, which dtype, and why; how much memory is free; how fast memory is read.

Promises a reason that can be shown to a person. Imports torch only inside functions. Knows nothing of models.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from nibble.errors import DeviceError

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

KINDS = ("xpu", "cuda", "cpu")
"""In the order in which `auto` prefers them."""

XPU_VARIABLES = {
    "USE_XETLA": "OFF",
    "SYCL_PI_LEVEL_ZERO_USE_IMMEDIATE_COMMANDLISTS": "1",
    "SYCL_CACHE_PERSISTENT": "1",
}
"""What Intel's guides set for its GPUs; set by `choose` for xpu unless already set."""

CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
"""Limit and use of the control group, version 2 then version 1."""


@dataclass(frozen=True)
class Device:
    """A device to compute on, the dtype of activations there, and why both were chosen."""

    kind: str
    dtype: str
    """Name of a torch dtype, such as "bfloat16"."""
    reason: str

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch's own object."""
        import torch

        return getattr(torch, self.dtype)


def choose(wanted: str = "auto") -> Device:
    """The device to use: the one wanted, or for "auto" the first of xpu, cuda, cpu that is there.

    Raises:
        DeviceError: the one wanted is unknown or not there; the hint lists what is.
    """
    if wanted != "auto" and wanted not in KINDS:
        raise DeviceError(f"There is no device {wanted!r}.", "Choose auto, cpu, xpu or cuda.")
    extension = import_extension() if wanted in ("auto", "xpu") else ""
    import torch

    found = torch.accelerator.current_accelerator(check_available=True) if torch.accelerator.is_available() else None
    present = found.type if found is not None else "cpu"
    kind = wanted if wanted != "auto" else present if present in KINDS else "cpu"
    if kind not in ("cpu", present):
        there = "the CPU only" if present == "cpu" else f"{present} and the CPU"
        raise DeviceError(
            f"{kind} was asked for, but torch {torch.__version__} finds {there}.",
            f"Use --device auto, or install the driver and torch's {kind} build.",
        )
    if kind == "xpu":
        for name, value in XPU_VARIABLES.items():
            os.environ.setdefault(name, value)
    why = "asked for" if wanted != "auto" else "found by torch" if kind != "cpu" else "torch finds no accelerator"
    dtype, dtype_reason = _dtype(kind)
    reason = f"{kind}: {why}; {dtype}: {dtype_reason}" + (f"; {extension}" if extension else "")
    return Device(kind, dtype, reason)


def _dtype(kind: str) -> tuple[str, str]:
    import torch

    if kind == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "float16", "this GPU has no bfloat16"
    if kind == "cpu":
        return "bfloat16", "half the memory of float32, and what the int4 kernel takes"
    return "bfloat16", "the GPU computes in it"


def import_extension() -> str:
    """Import Intel's extension for PyTorch where it is installed, as xpu once needed; return one line about it.

    The extension must match the installed torch to the minor version. One that does not is reported, never a crash.
    """
    if importlib.util.find_spec("intel_extension_for_pytorch") is None:
        return ""
    printed = io.StringIO()
    try:
        # It prints why it does not fit, where a command's own output may be read by a program.
        with contextlib.redirect_stdout(printed):
            import intel_extension_for_pytorch as extension
    except (ImportError, OSError, RuntimeError, AttributeError, SystemExit) as error:
        why = (printed.getvalue().strip() or str(error)).splitlines()[0].removeprefix("ERROR! ")
        line = f"intel_extension_for_pytorch is installed but does not fit this torch: {why}"
        log.warning(line)
        return line
    return f"intel_extension_for_pytorch {extension.__version__} imported"


def free_memory(kind: str = "cpu") -> int:
    """Bytes that a new model can take on a device; on the CPU, within the limit of the control group."""
    if kind != "cpu":
        import torch

        free, _ = torch.get_device_module(kind).mem_get_info()
        return int(free)
    free = psutil.virtual_memory().available
    for limit_file, used_file in CGROUP_FILES:
        limit, used = _number(limit_file), _number(used_file)
        if limit is not None and used is not None:
            free = min(free, max(0, limit - used))
    return free


def _number(path: str) -> int | None:
    try:
        text = Path(path).read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def usable_cores() -> int:
    """Cores that this process may use: physical ones, within affinity and the control group's quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    physical = psutil.cpu_count(logical=False) or allowed
    cores = min(allowed, physical)
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return max(1, cores)
    if quota.isdigit():
        cores = min(cores, max(1, int(quota) // int(period)))
    return max(1, cores)


def read_bandwidth(seconds: float = 1.0, megabytes: int = 512) -> float:
    """Bytes per second that all threads together read from memory, measured by summing a buffer beyond any cache."""
    import torch

    buffer = torch.ones(megabytes * 2**20 // 8, dtype=torch.int64)
    buffer.sum()
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        buffer.sum()
        best = max(best, buffer.nbytes / (time.perf_counter() - start))
    return best
