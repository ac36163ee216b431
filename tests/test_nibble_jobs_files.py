"""What is read from a run's files when they are torn, foreign or name another process; and progress under any clock."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nibble import jobs
from nibble.errors import JobError
from nibble.jobs import Job, processes
from nibble.jobs.processes import identify
from nibble.jobs.progress import Meter, Progress, duration, size
from tests.support import scripted_task
from tests.support.waiting import until

pytestmark = pytest.mark.full


@pytest.fixture(autouse=True)
def nothing_stays(home: Path) -> Iterator[None]:
    yield
    for job in jobs.list_jobs(home):
        jobs.stop(job.id, home, grace_s=0)


@pytest.fixture
def job(home: Path) -> Job:
    """A job that runs."""
    started = jobs.start(scripted_task, {"script": [["progress", 1, 2, "steps", "s"], ["sleep", 60]]}, home=home)
    until(lambda: jobs.find(started.id, home).progress.done)
    return jobs.find(started.id, home)


def edit(job: Job, **values: Any) -> None:
    path = job.folder / "status.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_torn_status_never_hides_a_living_job(job: Job, home: Path) -> None:
    path = job.folder / "status.json"
    whole = path.read_bytes()
    torn = [whole[:length] for length in range(0, len(whole), 7)]
    torn += [b"\0" * len(whole), b"[]", b"{}", b"null", b'{"state": "flying"}', b'{"state": [1]}', whole[:-2] + b'"']
    torn += [b'{"state": "running", "pid": "x"}', b'{"state": "running", "progress": 3}', b"[" * 100_000]
    torn += [b'{"state": "running", "progress": {"done": "much"}}', b'{"state": "running", "progress": null}']
    for content in torn:
        path.write_bytes(content)
        found = jobs.find(job.id, home)
        assert found.live, content[:80]
        json.dumps(found.as_dict())
    path.unlink()
    assert jobs.find(job.id, home).live
    assert jobs.stop(job.id, home).live is False
    path.write_bytes(whole[:50])
    assert jobs.find(job.id, home).state == "stopped"


def test_a_pid_that_another_process_has_taken_is_not_the_job(job: Job, home: Path) -> None:
    me = identify(os.getpid())
    assert me is not None
    os.kill(job.status.pid, 9)
    until(lambda: not jobs.find(job.id, home).live)
    edit(job, pid=me.pid, ticks=me.ticks - 1)
    assert jobs.find(job.id, home).state == "killed"
    # It does not signal that other process, which is this one.
    assert jobs.stop(job.id, home).state == "killed"
    edit(job, pid=me.pid, ticks=me.ticks, boot="another")
    (job.folder / "exit.json").unlink(missing_ok=True)
    assert jobs.find(job.id, home).cause == "The machine was restarted while it ran."


def test_a_job_that_ends_between_two_looks_is_done(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = jobs.start(scripted_task, {"script": []}, home=home)
    until(lambda: jobs.find(started.id, home).state == "done")
    last_word = (started.folder / "status.json").read_bytes()
    edit(started, state="running", ended=None, result=None)

    def identify(pid: int) -> None:
        (started.folder / "status.json").write_bytes(last_word)

    monkeypatch.setattr(processes, "identify", identify)
    assert jobs.find(started.id, home).state == "done"


def test_the_wall_clock_may_jump(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    years = 3e8
    script = [["tick", 20, 0.01], ["set_clock", -years], ["tick", 20, 0.01], ["set_clock", 2 * years], ["sleep", 60]]
    started = jobs.start(scripted_task, {"script": script}, home=home)
    until(lambda: len(jobs.find(started.id, home).metrics()) == 40)
    true_time = time.time
    for jump in (-years, years):
        monkeypatch.setattr(time, "time", lambda jump=jump: true_time() + jump)
        found = jobs.find(started.id, home)
        assert found.state == "running"
        assert 0 <= found.status.elapsed_s < 60
        times = [row["t"] for row in found.metrics()]
        assert times == sorted(times)


def test_foreign_and_broken_folders_are_survived(job: Job, home: Path) -> None:
    runs = home / "runs"
    (runs / "notes").mkdir()
    (runs / "notes.txt").write_text("x")
    (runs / "20260101-000000-file-0000").write_text("a file")
    (runs / "20260101-000000-loop-0000").symlink_to("20260101-000000-loop-0000")
    broken = {
        "0001": None, "0002": b"", "0003": b"\xff\xfe", "0004": b"task: [", "0005": b"- 1",
        "0006": b"task: x\nspec: 3\n", "0007": b"a: &a [*a]",
        "0008": b"task: x\nspec: {}\ncreated: 1\nexclusive: ../../x\n",
    }  # fmt: skip
    for suffix, content in broken.items():
        folder = runs / f"20260101-000000-broken-{suffix}"
        folder.mkdir()
        if content is not None:
            (folder / "run.yaml").write_bytes(content)
    found = jobs.list_jobs(home)
    assert [item.id for item in found if item.live] == [job.id]
    rest = [item for item in found if item.id != job.id]
    assert len(rest) == len(broken)
    for item in rest:
        assert item.state == "failed" and item.cause
        json.dumps(item.as_dict())
        assert jobs.stop(item.id, home).state == "failed"
        with pytest.raises(JobError, match="cannot be resumed"):
            jobs.resume(item.id, home)


def test_jobs_are_listed_newest_first_and_found_by_whole_ids_only(home: Path) -> None:
    ids = [jobs.start(scripted_task, {"script": [], "n": n}, home=home).id for n in range(5)]
    assert [job.id for job in jobs.list_jobs(home)] == ids[::-1]
    for name in ("", ".", "..", "../runs", ids[0][:-1], ids[0] + "/", ids[0] + "\0", f"../runs/{ids[0]}", ".locks"):
        with pytest.raises(JobError, match="There is no job"):
            jobs.find(name, home)
    assert len(jobs.list_jobs(home, limit=1)) == 1
    assert jobs.list_jobs(home / "empty") == []


def test_the_end_of_a_log_is_plain_text_whatever_is_in_it(job: Job) -> None:
    log = job.folder / "log.txt"
    with log.open("wb") as stream:
        stream.truncate(10**9)  # a gigabyte, without the disk for it
        stream.seek(0, os.SEEK_END)
        stream.write(b"\n10%\r55%\r100%\r\n\x1b[31mred\x1b[0m\x07\xff\n\x1b]0;title\x07" + "漢字\n".encode())
    assert job.log() == "100%\nred\ufffd\n]0;title漢字\n"
    log.write_text("x" * 300_000)
    assert job.log() == "x" * 200_000
    log.unlink()
    assert job.log() == ""


def test_a_metrics_file_may_be_torn(job: Job) -> None:
    (job.folder / "metrics.jsonl").write_bytes(b'{"a": 1}\n{"a": \n\xff\n3\n{"a": 2}\n{"a": 3')
    assert job.metrics() == [{"a": 1}, {"a": 2}]


@given(st.lists(st.tuples(st.floats(), st.floats(), st.sampled_from(["a", "b"])), max_size=40))
def test_progress_is_finite_and_never_falls_within_a_stage(reports: list[tuple[float, float, str]]) -> None:
    meter, now = Meter(lambda: 0.0), Progress()
    for done, total, stage in reports:
        meter.update(done, total, "steps", stage)
        before, now = now, meter.reading()
        assert 0 <= now.done < float("inf") and (not now.total or now.done <= now.total)
        assert now.fraction is None or 0 <= now.fraction <= 1
        if before.stage == now.stage and before.total == now.total:
            assert now.done >= before.done
        assert now.text()


def test_speed_and_time_left_follow_the_latest_half_minute() -> None:
    seconds = iter(range(10_000))
    clock = [0.0]
    meter = Meter(lambda: clock[0])
    for step in range(100):  # 10 a second, then 1 a second
        clock[0] = float(next(seconds))
        meter.update(10 * step, 2000, "B", "shards")
    assert meter.reading().speed == pytest.approx(10)
    for step in range(60):
        clock[0] = float(next(seconds))
        meter.update(990 + step, 2000, "B", "shards")
    reading = meter.reading()
    assert reading.speed == pytest.approx(1, rel=0.05)
    assert reading.seconds_left == pytest.approx(951, rel=0.05)
    assert reading.text().startswith("shards 1 kB/2 kB · 52 % · 1 B/s · 15 min")


def test_numbers_for_persons() -> None:
    assert [size(n) for n in (0, 999, 1_234_000, 5.6e9, 7e15)] == ["0 B", "999 B", "1.2 MB", "5.6 GB", "7000.0 TB"]
    assert [duration(s) for s in (0, 59.4, 200, 3900)] == ["0 s", "59 s", "3 min 20 s", "1 h 05 min"]
