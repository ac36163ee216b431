"""`nibble jobs`: long work on this machine; stop it, go on with it, read its log."""

from __future__ import annotations

import argparse
import json
import time

from nibble import jobs
from nibble.config import Settings
from nibble.errors import JobError
from nibble.jobs import Job

SETTINGS = ["home"]

COLUMNS = ("id", "state", "started", "progress")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this command's own flags."""
    parser.add_argument("action", nargs="?", choices=("stop", "resume", "log"), help="what to do; without one, a list")
    parser.add_argument("id", nargs="?", help="a job's id, or an end of it that no other job has")
    parser.add_argument("--json", action="store_true", help="print JSON: one list, or the one job")


def run(arguments: argparse.Namespace, settings: Settings) -> None:
    """List the jobs, or do one thing to one of them."""
    home = settings.home_folder
    if arguments.action is None:
        _list(jobs.list_jobs(home), arguments.json)
        return
    if arguments.id is None:
        raise JobError(f"`nibble jobs {arguments.action}` needs a job's id.", "`nibble jobs` lists them.")
    job_id = _full_id(arguments.id, jobs.list_jobs(home))
    if arguments.action == "log":
        print(jobs.find(job_id, home).log(), end="")
        return
    job = jobs.stop(job_id, home) if arguments.action == "stop" else jobs.resume(job_id, home)
    if arguments.json:
        print(json.dumps(job.as_dict(), indent=2, ensure_ascii=False))
    else:
        print(f"{job.id}: {job.state}. {job.cause}".rstrip())


def _full_id(given: str, known: list[Job]) -> str:
    """The id that ends like this, where it is the only one."""
    matches = [job.id for job in known if job.id.endswith(given)]
    if len(matches) > 1:
        raise JobError(f"{len(matches)} jobs end with {given!r}.", "Give more of the id.")
    return matches[0] if matches else given


def _list(found: list[Job], as_json: bool) -> None:
    if as_json:
        print(json.dumps([job.as_dict() for job in found], indent=2, ensure_ascii=False))
        return
    rows = [COLUMNS, *(_row(job) for job in found)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _row(job: Job) -> tuple[str, ...]:
    started = time.strftime("%Y-%m-%d %H:%M", time.localtime(job.status.started or job.created))
    return (job.id, job.state, started, job.cause or job.progress.text() or job.status.note)
