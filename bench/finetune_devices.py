"""Whether a run on one device and the same run shared by several give the same losses, and how fast each is.

    python bench/finetune_devices.py [cuda|xpu|cpu] [processes] [steps]

The guide learns the shipped quotes with the tutorial's settings, without dropout (whose dice differ by process), once
in float32 and once in the device's own dtype: by one process, then by several under torchrun. Exit code 1 if a row of
the log differs by more than rounding.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
BOUNDS = {"float32": 1e-3, "": 0.02}
"""Share by which a loss may differ, by dtype."""


def run(home: Path, device: str, processes: int, steps: int, dtype: str) -> tuple[list[tuple[int, float]], float]:
    """Steps with their losses, held-out ones too, and seconds a step."""
    name = f"by-{processes}-{dtype or 'own'}"
    told = {"device": device, "home": str(home), "dtype": dtype, "dropout": 0.0, "max_steps": steps, "out": name}
    path = home / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**told, "logging_steps": max(1, steps // 10)}), encoding="utf-8")
    shared = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *shared, "-m", "nibble.tasks.finetune", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    folder = next(path for path in (home / "runs").glob("2*") if name in (path / "run.yaml").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((folder / "status.json").read_text())["result"]
    return [(row["step"], row.get("loss", row.get("eval_loss"))) for row in rows], result["seconds_per_step"]


def main() -> int:
    """Run all four and compare."""
    given = dict(enumerate(sys.argv[1:]))
    device, processes, steps = given.get(0, "cuda"), int(given.get(1, 2)), int(given.get(2, 200))
    home, wrong = Path(tempfile.mkdtemp()), 0
    home.joinpath("runs").mkdir()
    for dtype, bound in BOUNDS.items():
        one, alone = run(home, device, 1, steps, dtype)
        several, shared = run(home, device, processes, steps, dtype)
        worst = max(abs(a[1] - b[1]) / a[1] for a, b in zip(one, several, strict=True))
        wrong += worst > bound
        held = f"held out {one[0][1]:.4f} -> {one[-1][1]:.4f}"
        print(f"{dtype or 'own dtype'}: loss {one[1][1]:.4f} -> {one[-2][1]:.4f}, {held}")
        print(f"  {processes} processes: {several[1][1]:.4f} -> {several[-2][1]:.4f}; worst difference {worst:.2%}")
        print(f"  {1000 * alone:.0f} ms a step by one, {1000 * shared:.0f} ms by {processes}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
