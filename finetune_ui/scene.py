"""What the Fine-tune tab shows: the data set, what is trained, the run that is looked at, comparisons, the runs.

Promises that what blocks is done in a thread, and that everything is read from the jobs' files: a page that was closed
shows the same. Knows nothing of what is pressed.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr
import pandas

from finetune_ui import after, view
from finetune_ui.curves import by_step, curve
from finetune_ui.view import Say
from finetune_ui.widgets import Widgets
from nibble.errors import NibbleError
from nibble.jobs import LIVE
from nibble.operator import Operator
from nibble.wishes import Finetune
from parts.joblist import joblist

Changes = dict[Any, Any]
"""Widget -> what becomes of it."""

SHOWN_RUNS = 100
LOG_LINES = 40
SHOWN_AFTER = 4
"""Comparisons and merges that are listed."""

COLORS = ("#1f9488", "#d99a1c")
"""Of the first curve and the second."""

LOSSES = {"loss": "line_loss", "eval_loss": "line_eval"}
"""Key of a row -> the word for its curve."""


class Scene:
    """What one page shows."""

    def __init__(self, widgets: Widgets, operator: Operator) -> None:
        self.w = widgets
        self.operator = operator
        w = widgets
        self.choices = [w.data.model, w.data.data]
        """What `choose_from` changes."""
        self.working = [
            w.runs, w.live, w.timer, w.dry.job, w.dry.result, w.train.job, w.train.result, w.train.curves,
            w.train.plots, w.data.job,
            w.train.loss, w.train.rate, w.train.steps, w.train.drawn, w.after.jobs, w.after.adapter,
            w.after.checkpoints, w.after.report, w.after.save, w.after.proof, w.after.chat,
        ]  # fmt: skip
        """What `work` changes."""

    async def choose_from(self, model: str, data: str) -> Changes:
        """The models and data sets that there are; the first of each where none is chosen."""

        def look() -> Changes:
            cards = self.operator.cards()
            models = [card["name"] for card in cards if card["kind"] == "model" and not card["problem"]]
            sets = self.operator.data_sets()
            return {
                self.w.data.model: gr.update(choices=models, value=model or next(iter(models), None)),
                self.w.data.data: gr.update(choices=sets, value=data or next(iter(sets), None)),
            }

        return await asyncio.to_thread(look)

    async def data(self, say: Say, told: Mapping[str, Any]) -> tuple[Changes, bool]:
        """What the data set was recognised as, and whether it can be used.

        Raises:
            NibbleError: as `Operator.look`.
        """
        report = await asyncio.to_thread(self.operator.look, Finetune(told))
        shown = {
            self.w.data.found: gr.update(rows=view.found(report, say)),
            self.w.data.columns: gr.update(rows=view.mapper(report, say)),
            self.w.data.leave_out: gr.update(visible=bool(told.get("leave_out")) or not report["ok"]),
        }
        return shown, report["ok"]

    async def trained(self, say: Say, told: Mapping[str, Any]) -> Changes:
        """The samples as tokens.

        Raises:
            NibbleError: as `Operator.preview`.
        """
        seen = await asyncio.to_thread(self.operator.preview, Finetune(told))
        return {self.w.data.trained: gr.update(rows=view.trained(seen, say))}

    async def work(
        self, say: Say, chosen: str, unfolded: Sequence[str], drawn: str, settings: Any, *, settle: bool = False
    ) -> Changes:
        """The jobs of this tab as they stand.

        Args:
            say: the words.
            chosen: id of the run that is looked at; empty or gone takes the newest.
            unfolded: ids of the jobs whose log is shown.
            drawn: what the plots show already; empty draws them.
            settings: what the form holds, against which a dry run is held; None is unknown.
            settle: whether the last step is set to the run that is looked at; else what is chosen there stays.
        """
        return await asyncio.to_thread(self._work, say, chosen, unfolded, drawn, settings, settle)

    def _work(self, say: Say, chosen: str, unfolded: Sequence[str], drawn: str, settings: Any, settle: bool) -> Changes:
        jobs = self.operator.runs(SHOWN_RUNS)
        trainings = [job for job in jobs if job["task"] == "finetune" and not job["spec"].get("dry_run")]
        run = next((job for job in trainings if job["id"] == chosen), next(iter(trainings), None))
        live = [job["id"] for job in jobs if job["state"] in LIVE]
        moved = {} if run is None or run["id"] == chosen else {"value": run["id"]}
        list_ = view.runs(trainings, run["id"] if run else "", say)
        return {
            self.w.runs: gr.update(rows=list_) | moved,
            self.w.live: live,
            self.w.timer: gr.Timer(active=bool(live)),
            self.w.data.job: self._jobs([job for job in jobs if job["task"] == "download"][:1], unfolded, say),
            **self._dry(jobs, unfolded, settings, say),
            **self._run(run, unfolded, drawn, say),
            **self._after(jobs, run, unfolded, say, settle=settle or bool(moved)),
        }

    async def dry(self, say: Say, settings: Any) -> Changes:
        """What the latest dry run has measured, and whether the form has changed since."""
        found = await asyncio.to_thread(lambda: self._dry(self.operator.runs(SHOWN_RUNS), (), settings, say))
        return {self.w.dry.result: found[self.w.dry.result]}

    def _jobs(self, jobs: Sequence[Mapping[str, Any]], unfolded: Sequence[str], say: Say) -> Any:
        """A few jobs, one of them with its log."""
        open_ = next((job["id"] for job in jobs if job["id"] in unfolded), "")
        log = ""
        if open_:
            with contextlib.suppress(NibbleError):  # its folder may be gone since
                log = "\n".join(self.operator.job(open_).log().splitlines()[-LOG_LINES:])
        return gr.update(rows=joblist(jobs, open_, log, say) if jobs else "")

    def _dry(self, jobs: Sequence[Any], unfolded: Sequence[str], settings: Any, say: Say) -> Changes:
        dry = next((job for job in jobs if job["task"] == "finetune" and job["spec"].get("dry_run")), None)
        shown = ""
        if dry is not None:
            changed = settings is not None and any(dry["spec"].get(key) != value for key, value in settings.items())
            shown = view.dry(dry, changed=changed, say=say)
        return {
            self.w.dry.job: self._jobs([dry] if dry else [], unfolded, say),
            self.w.dry.result: gr.update(rows=shown),
        }

    def _run(self, run: Any, unfolded: Sequence[str], drawn: str, say: Say) -> Changes:
        train = self.w.train
        if run is None:
            empty = gr.update(rows="")
            return {
                train.job: gr.update(rows=view.small(say("choose_run"))), train.result: empty, train.steps: empty,
                train.plots: gr.Row(visible=False), train.curves: empty, train.drawn: "",
            }  # fmt: skip
        rows = by_step(self._metrics(run["id"]))
        changes: Changes = {
            train.job: self._jobs([run], unfolded, say),
            train.result: gr.update(rows=view.result(run, say)),
            train.steps: gr.update(rows=view.steps(rows, say)),
        }
        now = f"{run['id']} {len(rows)} {rows[-1]['step'] if rows else 0} {sum(map(len, rows))}"
        if now == drawn:
            return changes
        losses = {key: say.plain(word) for key, word in LOSSES.items()}
        seen = {key for row in rows for key in row}
        end = max([rows[-1]["step"] if rows else 0.0, _steps(run)])
        return changes | {
            train.plots: gr.Row(visible=len(rows) > 1),
            train.curves: gr.update(rows=view.legend([name for key, name in losses.items() if key in seen], say)),
            train.loss: _plot(curve(rows, losses), end),
            train.rate: _plot(curve(rows, {"learning_rate": say.plain("plot_rate")}), end),
            train.drawn: now,
        }

    def _metrics(self, job_id: str) -> list[dict[str, Any]]:
        try:
            return self.operator.job(job_id).metrics()
        except NibbleError:  # its folder is gone
            return []

    def _after(self, jobs: Sequence[Any], run: Any, unfolded: Sequence[str], say: Say, *, settle: bool) -> Changes:
        w = self.w.after
        adapters = [card["name"] for card in self.operator.cards() if card["kind"] == "adapter"]
        later = [job for job in jobs if job["task"] in ("merge", "compare")]
        # A run that was stopped has left an adapter, and no result.
        own = str(((run or {}).get("result") or {}).get("adapter") or (run or {}).get("spec", {}).get("out") or "")
        steps = after.checkpoints(run)
        compared = next((job for job in later if job["task"] == "compare" and job["state"] == "done"), None)
        merged = next((job for job in later if job["task"] == "merge" and job["state"] == "done"), None)
        return {
            w.adapter: gr.update(choices=adapters) | ({"value": own if own in adapters else None} if settle else {}),
            w.checkpoints: gr.update(choices=steps, visible=bool(steps)) | ({"value": []} if settle else {}),
            w.report: gr.update(rows=after.report(compared["result"], say) if compared else ""),
            w.save: gr.update(visible=compared is not None),
            w.proof: gr.update(rows=after.proof(merged, say) if merged else ""),
            w.chat: gr.update(interactive=bool(adapters)),
            w.jobs: self._jobs(later[:SHOWN_AFTER], unfolded, say),
        }


def _steps(run: Any) -> float:
    """The steps that a run takes in all: what the settings say, or with `epochs` what it has told."""
    told, spec = run["progress"], run["spec"]
    return float(told["total"] if spec.get("epochs") and told["unit"] == "step" else spec.get("max_steps") or 0)


def _plot(points: Sequence[tuple[float, float, str]], end: float) -> Any:
    """A plot of these points, up to the last step that there will be."""
    if not points:
        return gr.update(value=None)
    frame = pandas.DataFrame(points, columns=["step", "value", "curve"])
    # Another set of colours has the browser draw it anew: to new numbers alone it does not give another curve.
    names = dict.fromkeys(name for _, _, name in points)
    colors = dict(zip(names, COLORS, strict=False))
    return gr.update(value=frame, color_map=colors, x_lim=[0, end])
