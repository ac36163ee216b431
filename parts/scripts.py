"""What the tabs' own HTML does in the browser, as `js_on_load` of gr.HTML takes it. Knows neither models nor jobs."""

from __future__ import annotations

CHOOSE = """
element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-name]");
  if (button) props.value = button.dataset.name;
});
"""
"""Value: the `data-name` of the button that was pressed last."""

ACT = """
element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-act]");
  if (!button) return;
  const { act, subject } = button.dataset;
  if (act === "log") props.value = props.value === subject ? "" : subject;
  else trigger('act', { act, subject });
});
"""
"""Value: the id of the job whose log is unfolded. The event `act` tells which button of which job was pressed."""

TICK = """
const boxes = () => [...element.querySelectorAll("input[type=checkbox]")];
const show = () => boxes().forEach((box) => { box.checked = (props.value || []).includes(box.value); });
element.addEventListener("change", () => {
  props.value = boxes().filter((box) => box.checked).map((box) => box.value);
});
watch(["value", "rows"], show);
show();
"""
"""Value: the values of the boxes that are ticked."""

FILL_IN = """
const boxes = () => [...element.querySelectorAll("[data-field]")];
let waiting;
const tell = () => {
  clearTimeout(waiting);
  props.value = Object.fromEntries(boxes().map((box) =>
    [box.dataset.field, box.type === "checkbox" ? box.checked : box.value]));
};
const show = () => boxes().forEach((box) => {
  const value = (props.value || {})[box.dataset.field];
  if (value === undefined) return;
  if (box.type === "checkbox") box.checked = value === true;
  else if (box.value !== String(value)) box.value = value;
});
const mark = () => element.querySelectorAll("[data-problem]").forEach((line) => {
  const problem = (props.problems || {})[line.dataset.problem] || "";
  line.textContent = problem;
  line.parentElement.classList.toggle("bad", problem !== "");
});
element.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(tell, 400); });
element.addEventListener("change", tell);
watch(["value", "rows"], () => { show(); mark(); });
watch(["problems"], mark);
show();
"""
"""Value: `data-field` -> what stands in the field. What the prop `problems` says of one stands beside it."""

KEEP_OPEN = """
const open = new Set();
element.addEventListener("toggle", (event) => {
  const key = event.target.dataset.fold;
  if (key) event.target.open ? open.add(key) : open.delete(key);
}, true);
watch(["rows"], () => element.querySelectorAll("details[data-fold]").forEach((fold) => {
  fold.open = open.has(fold.dataset.fold);
}));
"""
"""What a person has unfolded stays so when the rows are drawn anew."""

SAVE_FILE = """(file) => {
  if (!file) return;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([file.text], {type: file.type}));
  link.download = file.name;
  link.click();
  URL.revokeObjectURL(link.href);
}"""
"""Gives the browser a file to save: its name, type and text."""

MAP = """
let opened = false;
const form = () => element.querySelector("[data-form]");
const show = () => element.querySelectorAll("[data-of]").forEach((row) => {
  row.hidden = row.dataset.of !== form().value;
});
const fill = () => {
  const now = element.querySelector("[data-now]");
  if (!now) return;
  const { form: kind, columns, given } = JSON.parse(now.dataset.now);
  const chosen = Object.keys(props.value || {}).length > 0;
  if (kind || !chosen) form().value = given ? kind : "";
  element.querySelectorAll(`[data-of="${kind}"] select`).forEach((box) => {
    box.value = columns[box.dataset.column] || "";
  });
  element.querySelector("details").open = opened;
  show();
};
element.addEventListener("toggle", (event) => { opened = event.target.open; }, true);
element.addEventListener("change", () => {
  show();
  const boxes = form().value ? [...element.querySelectorAll(`[data-of="${form().value}"] select`)] : [];
  props.value = Object.fromEntries(boxes.filter((box) => box.value).map((box) => [box.dataset.column, box.value]));
});
watch(["rows"], fill);
fill();
"""
"""Value: field of a form -> the column that was chosen for it; empty where the form is left to be recognised. What a
person has chosen stays to be seen where it cannot be."""
