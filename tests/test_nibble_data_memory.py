"""Memory stays flat however long a data set is: while it is checked, and while it is made into samples."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nibble.data.shipped import SHIPPED, find

ROOT = Path(__file__).parents[1]

MEASURE = """
import sys, threading
from pathlib import Path
def anonymous():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) // 1024
from nibble.data import ColumnMap, check
{more}
highest, over = anonymous(), threading.Event()
before = highest
def watch():
    global highest
    while not over.wait(0.02):
        highest = max(highest, anonymous())
thread = threading.Thread(target=watch); thread.start()
{work}
over.set(); thread.join()
print(report.ok, report.usable, highest - before)
"""

CHECK = MEASURE.format(more="", work="report = check(Path(sys.argv[1]))")

FEED = MEASURE.format(
    more="from nibble.data.looking import open_encoder\nfrom nibble.training import feed\n"
    "encoder = open_encoder(Path(sys.argv[2]), 512, trusted=False)\nlist(map(encoder.tokenizer, ['warm up'] * 100))",
    work="corpus, report = feed.read(Path(sys.argv[1]), encoder, ColumnMap(), Path(sys.argv[1]).parent)\n"
    "places, held = feed.split(len(corpus), 0.05, 1)\n"
    "deck = feed.Deck(corpus, feed.Each(places, lambda place: (place,)), len(places), 1)\n"
    "assert sum(len(ids) for index in range(0, len(deck), 7) for ids, _ in deck[index]) > 0\n"
    "rows = feed.Each(held, lambda place: [corpus[place]])\nassert sum(len(row) for row in rows) == len(held)",
)

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")


def write(path: Path, size: int) -> int:
    """A file of conversations of so many bytes or a little more; its rows."""
    words = " ".join(find(name).read_text(encoding="utf-8") for name in SHIPPED).split()
    rng, count = random.Random(0), 0
    with path.open("w", encoding="utf-8") as stream:
        while stream.tell() < size:
            for number in range(count, count + 1000):
                answer = " ".join(rng.choices(words, k=60))
                row = {"instruction": f"count to {number}", "output": answer}
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1000
    return count


def grown(code: str, *arguments: Path) -> tuple[int, int]:
    """Usable rows, and MiB by which a process grew over its work."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=3600)
    ok, usable, mib = run.stdout.split()
    assert ok == "True"
    return int(usable), int(mib)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("size", "most"), [(20 * 2**20, 60), pytest.param(2**30, 150, marks=pytest.mark.full)], ids=["20 MB", "1 GB"]
)
def test_a_check_grows_by_little(size: int, most: int, tmp_path: Path) -> None:
    if shutil.disk_usage(tmp_path).free < 2 * size:
        pytest.skip("there is not enough free disk for the file")
    path = tmp_path / "set.jsonl"
    rows = write(path, size)
    usable, mib = grown(CHECK, path)
    path.unlink()
    print(f"check: {size / 2**20:.0f} MiB, {rows:,} rows, grew by {mib} MiB")
    assert usable == rows and mib < most


@pytest.mark.timeout(3600)
@pytest.mark.full
@pytest.mark.parametrize("size", [10 * 2**20, 60 * 2**20], ids=["10 MB", "60 MB"])
def test_samples_lie_on_disk(size: int, tmp_path: Path, guide_model: Path) -> None:
    path = tmp_path / "set.jsonl"
    rows = write(path, size)
    usable, mib = grown(FEED, path, guide_model)
    path.unlink()
    print(f"feed: {size / 2**20:.0f} MiB, {rows:,} rows, grew by {mib} MiB")
    assert usable == rows and mib < 150
    assert not list(tmp_path.iterdir())
