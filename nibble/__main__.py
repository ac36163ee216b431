"""The command line: `python -m nibble COMMAND`; one module a command, in nibble/commands.

Promises the exit codes 0 done, 1 a NibbleError (one line and a hint on standard error), 2 wrong usage or config, and
that no traceback reaches a person. Knows nothing of what the commands do.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence

from nibble import __version__
from nibble.config import add_flags, settings_from
from nibble.errors import NibbleError

COMMANDS = {
    "ask": "one question, one streamed answer, and how long it took",
    "chat": "a conversation; the line `stop` ends it",
    "models": "the models on this machine",
    "doctor": "what Nibble finds on this machine: libraries, device, memory, settings, proxy",
}
"""Name -> what it does. Each is a module of nibble.commands, imported only when it is asked for."""

QUIET = ("httpx", "transformers", "torch", "accelerate", "asyncio")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # A command's module is loaded only when it is the one: `nibble models` must not wait for torch.
    parser = argparse.ArgumentParser(prog="python -m nibble", description="Chat with a model in low bit, shrink it.")
    parser.add_argument("--version", action="version", version=f"nibble {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, prose in COMMANDS.items():
        sub = commands.add_parser(name, help=prose, description=f"{name}: {prose}.")
        if name in argv[:1]:
            module = importlib.import_module(f"nibble.commands.{name}")
            add_flags(sub, module.SETTINGS)
            module.configure(sub)
    arguments = parser.parse_args(argv)
    try:
        module.run(arguments, settings_from(arguments))
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


if __name__ == "__main__":
    sys.exit(main())
