"""The border of the console: errors become a line and an exit code, libraries keep quiet."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable

from nibble.errors import NibbleError

QUIET = ("httpx", "transformers", "torch", "accelerate", "asyncio")


def quiet_logs() -> None:
    """Warnings of ours on standard error, one line each; of the libraries only errors."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def guarded(work: Callable[[], None]) -> int:
    """Run `work` and return the exit code: 0 done, 1 or 2 a NibbleError, told in a line and a hint; 130 Ctrl+C."""
    try:
        work()
        sys.stdout.flush()
    except NibbleError as error:
        print(f"nibble: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"        {error.hint}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe (`nibble models | head`) has gone; nothing is wrong.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
