"""No answer of the guide names a command, a flag, an endpoint, a format or a file of Nibble that there is not."""

import argparse
import importlib
import re
from pathlib import Path

import pytest

from app import FLAGS, build_app
from guide.corpus import load_corpus
from nibble.__main__ import COMMANDS
from nibble.config import Settings, add_flags
from nibble.lowbit.formats import ALIASES, FORMATS

ROOT = Path(__file__).parents[1]
FOREIGN = {"--standalone", "--nproc-per-node", "--num_processes", "--nnodes", "--node-rank", "--index-url", "--version"}
"""Flags of torchrun, accelerate, pip and python."""

TOLD_ABSENT = {"nf3", "fp6"}
"""Formats that an answer says are none of Nibble's."""

CODE = re.compile(r"`([^`]+)`")
ANSWERS = sorted(set(load_corpus().answers()))


def flags_of(command: str) -> set[str]:
    """What the parser of one console command takes."""
    module = importlib.import_module(f"nibble.commands.{command}")
    parser = argparse.ArgumentParser()
    module.configure(parser)
    add_flags(parser, list(module.SETTINGS))
    return {flag for action in parser._actions for flag in action.option_strings}


@pytest.fixture(scope="module")
def flags() -> dict[str, set[str]]:
    found = {command: flags_of(command) for command in COMMANDS}
    page = argparse.ArgumentParser()
    add_flags(page, FLAGS)
    return found | {"app.py": {flag for action in page._actions for flag in action.option_strings}}


def lines() -> list[str]:
    """Everything that stands between backquotes in an answer."""
    return sorted({code for answer in ANSWERS for code in CODE.findall(answer)})


def test_every_command_is_there_and_takes_its_flags(flags: dict[str, set[str]]) -> None:
    for line in lines():
        for command, rest in re.findall(r"(?:python -m nibble|\bnibble) (?!import)([a-z]+)\b([^`]*)", line):
            assert command in flags, line
            assert set(re.findall(r"--[a-z][a-z-]*", rest)) <= flags[command], line


def test_every_flag_is_of_some_command(flags: dict[str, set[str]]) -> None:
    known = set().union(*flags.values()) | FOREIGN
    for line in lines():
        assert set(re.findall(r"--[a-z][a-z_-]*", line)) <= known, line


def test_every_endpoint_is_there(tmp_path: Path) -> None:
    page = build_app(Settings(home=str(tmp_path)))
    there = set(page.get_api_info()["named_endpoints"])
    named = {line for line in lines() if re.fullmatch(r"/[a-z_]+", line)} - {"/health"}
    assert named <= there, named - there
    assert len(named) > 15


def test_every_format_that_is_named_is_one() -> None:
    for line in lines():
        if re.fullmatch(r"(?:a?sym_int\d|nf\d|fp\d(?:_e\dm\d)?|bf16|fp16)", line):
            assert line in {*FORMATS, *ALIASES, *TOLD_ABSENT}, line
