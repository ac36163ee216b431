"""What an operator of the page may do to teach a model: look at data, try a run, start it, compare, merge.

Promises that a data set is named or uploaded and never given as a path, that it is read through before any job starts,
and that whatever is wrong is said with the row or the column. Knows nothing of Gradio, torch and languages.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nibble import jobs, library
from nibble.config import Settings
from nibble.data import ColumnMap, check, store
from nibble.data.glimpse import glimpse
from nibble.data.telling import first_rows, told
from nibble.errors import DataError, JobError
from nibble.tasks.download import refuse_trust
from nibble.training.order import order_from, refuse_taken
from nibble.training.recipe import Recipe
from nibble.wishes import Compare, Finetune, Merge, text

TASKS = ("finetune", "merge", "compare", "download")
"""The tasks of this work; of the last only those that fetch data sets."""

LOOKED_AT, LOOKED_S = 20_000, 2.0
"""Rows, and seconds, by which a data set is judged while settings are still being made; whichever comes first. All of
it is read before a job starts."""

MOST_SAMPLES = 20
"""Shown as tokens at once."""


class Tuning:
    """The part of `nibble.operator.Operator` that teaches."""

    if TYPE_CHECKING:
        _settings: Settings

        @property
        def home(self) -> Path: ...

        @property
        def surroundings(self) -> dict[str, str]: ...

        def _folder(self, name: object) -> Path: ...
        def _local(self, model: object, key: str = "model") -> dict[str, Any]: ...
        def _start(self, task: str, spec: Mapping[str, Any], *, alone: bool = True) -> dict[str, Any]: ...

    # Data sets.

    def data_sets(self) -> list[str]:
        """Names of the data sets that are here: those that ship, then those that were kept."""
        return store.names(self.home)

    def keep_data(self, upload: Path, name: str = "") -> str:
        """Keep an uploaded file as a data set; its name. The upload itself is gone then.

        Raises:
            DataError: it is no data file, or there is no room.
        """
        try:
            return store.keep(upload, self.home, text(name))
        finally:
            upload.unlink(missing_ok=True)

    def look(self, wish: Finetune) -> dict[str, Any]:
        """What a data set was recognised as, and what is wrong with its first `LOOKED_AT` rows.

        Raises:
            NibbleError: a setting that cannot be, or no data set of that name.
        """
        recipe = wish.recipe()
        path = self._data(recipe)
        report = check(path, columns_of(recipe), LOOKED_AT, seconds=LOOKED_S)
        return {**told(report), "ok": report.ok, "first": first_rows(path)}

    def preview(self, wish: Finetune, samples: int = 3) -> dict[str, Any]:
        """The same, with the first samples as tokens, each with whether it is trained on: as `glimpse` returns it.

        Takes some seconds.

        Raises:
            NibbleError: as `look`, or a model that is not here.
        """
        recipe = wish.recipe()
        if isinstance(samples, bool) or not isinstance(samples, int) or not 1 <= samples <= MOST_SAMPLES:
            raise DataError(f"samples is {str(samples)[:40]!r}.", f"It must be a number from 1 to {MOST_SAMPLES}.")
        return self._glimpse(recipe, samples)

    def _glimpse(self, recipe: Recipe, samples: int = 1) -> dict[str, Any]:
        return glimpse(
            self._folder(recipe.model), self._data(recipe), mapping=columns_of(recipe), max_length=recipe.max_length,
            n=samples, trusted=recipe.model in self._settings.trust_remote_code,
        )  # fmt: skip

    def _data(self, recipe: Recipe) -> Path:
        return store.find(text(recipe.data), self.home)

    # Work that takes long: each starts a job, and the job is returned at once.

    def finetune(self, wish: Finetune) -> dict[str, Any]:
        """Train an adapter.

        Raises:
            NibbleError: a setting, model or data set that cannot be; or the same is under way already.
        """
        recipe = self._judged(wish)
        spec = recipe.as_spec() | self._local(recipe.model)
        out = recipe.out or self._free_name(recipe, spec)
        refuse_taken(out, self.home)
        refuse_trust([out], recipe.model, self._settings.trust_remote_code)
        return self._start("finetune", spec | {"out": out})

    def dry_run(self, wish: Finetune) -> dict[str, Any]:
        """Measure two steps of what `finetune` would do, and keep nothing.

        Raises:
            NibbleError: as `finetune`.
        """
        recipe = self._judged(wish)
        return self._start("finetune", recipe.as_spec() | self._local(recipe.model) | {"dry_run": True})

    def _judged(self, wish: Finetune) -> Recipe:
        """The recipe, once its model and every row of its data are known to be usable."""
        recipe = wish.recipe()
        # As a dry run: the name that a nameless adapter would get is no reason to refuse; a free one is found for it.
        order_from(recipe.as_spec() | self._local(recipe.model) | self.surroundings | {"dry_run": True})
        check(self._data(recipe), columns_of(recipe)).require()
        # What only the model's tokenizer can tell: that no sample is short enough, or that nothing in one is trained.
        seen = self._glimpse(recipe)
        if seen["complete"] and not seen["ok"] and not seen["model_problem"]:
            raise DataError(next(problem["sentence"] for problem in seen["problems"] if problem["fatal"]))
        return recipe

    def _free_name(self, recipe: Recipe, spec: Mapping[str, Any]) -> str:
        """A name for the adapter that replaces no other; of work that is under way already its own, to be refused."""
        live = [job.spec for job in jobs.live_jobs(self.home) if job.task == "finetune"]
        for other in live:
            if {**spec, "out": ""} == {**{key: other.get(key) for key in spec}, "out": ""}:
                return str(other["out"])
        names = f"{Path(recipe.model).name}-{Path(recipe.data).stem}"
        base = re.sub(r"[^A-Za-z0-9._-]+", "-", names).strip("-.")[:100] or "adapter"
        cards = [*library.adapters(self.home), *library.models(self.home)]
        taken = {card.name for card in cards} | {str(other.get("out")) for other in live}
        return next(name for name in chain([base], (f"{base}-{n}" for n in count(2))) if name not in taken)

    def merge(self, wish: Merge) -> dict[str, Any]:
        """Make a model of an adapter and its base.

        Raises:
            NibbleError: no such adapter, or a name or format that cannot be.
        """
        spec = wish.spec()
        library.find_adapter(spec["adapter"], self.home)
        return self._start("merge", {key: value for key, value in spec.items() if value})

    def compare(self, wish: Compare) -> dict[str, Any]:
        """Set an adapter, or checkpoints of a run, beside the base.

        Raises:
            NibbleError: no such adapter or run, or a number that cannot be.
        """
        spec = wish.spec()
        if "adapter" in spec:
            library.find_adapter(spec["adapter"], self.home)
        else:
            jobs.find(spec["run"], self.home)
        return self._start("compare", spec)

    def compare_report(self, job_id: str = "") -> dict[str, Any]:
        """The report of a comparison that has ended, and the same as a page under `html`; the latest without an id.

        Raises:
            JobError: there is none of that id, or none at all, or it has not come to its end.
        """
        name = text(job_id)
        found = [jobs.find(name, self.home)] if name else jobs.list_jobs(self.home, tasks=["compare"])
        job = next((job for job in found if job.task == "compare" and job.state == "done"), None)
        if job is None:
            what = f"{name} is no comparison that has ended." if name else "Nothing has been compared yet."
            raise JobError(what, "Start one, and wait for its end.")
        page = job.folder / "compare.html"
        return {**(job.status.result or {}), "id": job.id, "html": page.read_text(encoding="utf-8")}

    def runs(self, limit: int = 30) -> list[dict[str, Any]]:
        """The newest jobs of this work: trainings, dry runs, comparisons, merges, data sets that are fetched."""
        found = jobs.list_jobs(self.home, limit=limit, tasks=TASKS)
        return [job.as_dict() for job in found if job.task != "download" or job.spec.get("dataset")]


def columns_of(recipe: Recipe) -> ColumnMap:
    """What the recipe says of the data set's columns."""
    return ColumnMap(columns=recipe.columns, leave_out=recipe.leave_out)
