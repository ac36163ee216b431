"""Where a hub's token comes from: the environment, else a file that only its owner can read, else the hub's own login.

Promises that the token itself is in no message, and offers silence to libraries that would write one into their log.
Knows nothing of what it opens.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from nibble.hub.faults import DownloadError

VARIABLES = {"huggingface": "HF_TOKEN", "modelscope": "MODELSCOPE_API_TOKEN"}
"""Hub -> the environment variable that its own library reads."""


def stored_token(hub: str, home: Path, environ: Mapping[str, str]) -> str | None:
    """The token in home/tokens/<hub>; None where the environment has one or there is no such file.

    None leaves the choice to the hub's library, which reads its environment variable and its own login.

    Raises:
        DownloadError: others can read the file, or it does not hold a token.
    """
    file = home / "tokens" / hub
    if environ.get(VARIABLES[hub], "").strip() or not file.exists():
        return None
    facts = file.stat()
    if facts.st_mode & (stat.S_IRWXG | stat.S_IRWXO) or facts.st_uid not in (os.geteuid(), 0):
        raise DownloadError(
            f"The token in {file} is not used, because others can read that file or own it.",
            f"Run: chmod 600 {file}; if others use this machine, make a new token too.",
        )
    try:
        token = file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        token = ""
    if not token or len(token.split()) != 1:
        raise DownloadError(f"{file} does not hold a token.", "Write the token, and nothing else, into it.")
    return token


@contextlib.contextmanager
def silence(*names: str) -> Iterator[None]:
    """These loggers say nothing for a while: they quote signed addresses and whatever a server says, a token even."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
