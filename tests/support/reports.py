"""A report that nobody reads, for tests that run a task's work in their own process."""

from nibble.tasks import Report


class Silent:
    """As `nibble.tasks.Report`."""

    def progress(self, done: float, total: float, unit: str = "", stage: str = "") -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""


SILENT: Report = Silent()
