"""Chat templates, judged by their text: which files hold them, and what a template that only writes a chat never does.

Promises that a template is parsed and never compiled or rendered: jinja computes constants while it compiles. What
takes long or fills the memory in ways that its text does not show is found by `nibble.prompts.trial`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nibble.checkpoint import check_size, read_json
from nibble.errors import ModelError

MAX_CHARACTERS = 65_536
MAX_NUMBER = 1_000_000
"""Largest number in a template, and most rounds of its loops over constant ranges."""

MAX_DEPTH = 200
"""Of a template's syntax tree; the deepest of ours, of the guide's and of Qwen2.5's has 12."""

HOLDERS = ("tokenizer_config.json", "processor_config.json", "chat_template.json")
"""JSON files that may hold templates under `chat_template`."""

INSIDES = re.compile(
    r"__(class|bases?|mro|subclasses|globals|builtins|import|init|dict|code|closure|self|func|getattribute|reduce)\w*__"
)
"""How templates reach from a text to Python itself."""

OTHER_FILES = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)


class Generation(Extension):
    """The tag `generation`, with which transformers marks what a model answered; its words are kept as they are."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The statements between the tag and its end."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def environment() -> ImmutableSandboxedEnvironment:
    """jinja as transformers sets it up for chat templates, without its functions."""
    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation])


def templates(folder: Path, contents: Mapping[str, dict[str, Any]] | None = None) -> dict[str, str]:
    """Every chat template in a folder, by the place where it stands.

    Args:
        folder: a model's.
        contents: its JSON files, where they are read already.

    Raises:
        ModelError: a file is broken or too large.
    """
    found = {}
    for name in HOLDERS:
        known = contents.get(name) if contents else None
        content = known if known is not None else read_json(folder / name) if (folder / name).exists() else {}
        found.update(_named(name, content.get("chat_template")))
    for path in (*folder.glob("*.jinja"), *folder.glob("additional_chat_templates/*.jinja")):
        check_size(path, 4 * MAX_CHARACTERS)
        try:
            found[path.relative_to(folder).as_posix()] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ModelError(f"{path.name} in {folder.name} is not text.", "Download that file again.") from None
    return found


def _named(file: str, value: Any) -> dict[str, str]:
    """One template, several as a list of {name, template}, or several by name."""
    if isinstance(value, str):
        return {file: value}
    if isinstance(value, dict):
        return {f"{file} ({name})": text for name, text in value.items() if isinstance(text, str)}
    if isinstance(value, list):
        pairs = [(item.get("name"), item.get("template")) for item in value if isinstance(item, dict)]
        return {f"{file} ({name})": text for name, text in pairs if isinstance(text, str)}
    return {}


@lru_cache(maxsize=256)
def check_template(text: str) -> str:
    """What a template does that must not be, to go on a sentence about it; empty where it does nothing of the kind.

    One that cannot be parsed is no danger: another form takes its place when the model is loaded.
    """
    if len(text) > MAX_CHARACTERS:
        return f"is longer than {MAX_CHARACTERS:,} characters"
    try:
        waiting: list[tuple[nodes.Node, int, int]] = [(environment().parse(text), 0, 1)]
    except jinja2.TemplateSyntaxError:
        return ""
    except RecursionError:
        return "is nested too deeply"
    while waiting:
        node, depth, rounds = waiting.pop()
        rounds *= _rounds(node)
        if depth > MAX_DEPTH:
            return "is nested too deeply"
        if rounds > MAX_NUMBER:
            return f"goes round more than {MAX_NUMBER:,} times"
        if why := _misdeed(node):
            return why
        waiting += [(child, depth + 1, rounds) for child in node.iter_child_nodes()]
    return ""


def _misdeed(node: nodes.Node) -> str:
    name = node.attr if isinstance(node, nodes.Getattr) else node.name if isinstance(node, nodes.Name) else ""
    if name.startswith("__"):
        return f"reaches for {name[:40]}"
    if isinstance(node, OTHER_FILES):
        return "reaches for another file"
    if isinstance(node, nodes.Pow):
        return "computes a power"
    value = node.value if isinstance(node, nodes.Const) else None
    if isinstance(value, str) and (inside := INSIDES.search(value)):
        return f"reaches for {inside[0][:40]}"
    if isinstance(value, int | float) and abs(value) > MAX_NUMBER:
        return f"counts beyond {MAX_NUMBER:,}"
    return ""


def _rounds(node: nodes.Node) -> int:
    """How often a loop over a constant range goes round, about; 1 for everything else."""
    call = node.iter if isinstance(node, nodes.For) else None
    if not (isinstance(call, nodes.Call) and isinstance(call.node, nodes.Name) and call.node.name == "range"):
        return 1
    values = [item.value for item in call.args if isinstance(item, nodes.Const)]
    return max([abs(value) for value in values if isinstance(value, int)], default=1)
