"""Long work as detached processes joined by files: home/runs/<id>, which outlives the page, the tab and the server.

    job = jobs.start("quantize", {"model": "guide", ...}, home=home, exclusive="cpu")
    jobs.list_jobs(home), jobs.find(job.id, home), jobs.stop(job.id, home), jobs.resume(job.id, home)

`run_foreground` does the same work in this very process. Imports no torch; knows no task by name.
"""

from nibble.jobs.control import find, list_jobs, live_jobs, resume, start, stop
from nibble.jobs.folder import FINAL, LIVE, State
from nibble.jobs.foreground import run_foreground
from nibble.jobs.job import Job
from nibble.jobs.progress import Progress

__all__ = [
    "FINAL", "LIVE", "Job", "Progress", "State", "find", "list_jobs", "live_jobs", "resume", "run_foreground", "start",
    "stop",
]  # fmt: skip
