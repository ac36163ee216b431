"""The command line: `python -m nibble COMMAND`; one module a command, in nibble/commands.

Promises the exit codes 0 done, 1 a NibbleError (one line and a hint on standard error), 2 wrong usage or config, and
that no traceback reaches a person. Knows nothing of what the commands do.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from nibble import __version__
from nibble.commands.border import guarded, quiet_logs
from nibble.config import add_flags, settings_from

COMMANDS = {
    "ask": "one question, one streamed answer, and how long it took",
    "chat": "a conversation; the line `stop` ends it",
    "models": "the models on this machine",
    "jobs": "long work: list it, stop it, go on with it, read its log",
    "download": "a model or a data set from Hugging Face or ModelScope",
    "evaluate": "what a model loses in each low-bit format: perplexity, KL, agreement, size, memory, speed",
    "quantize": "a model in low bit: smaller, and what it lost by that",
    "finetune": "an adapter trained on a model and a data set: LoRA on a base in low bit, or in bf16",
    "merge": "a model out of an adapter and its base, which proves itself",
    "compare": "a base, its tuned form and checkpoints, side by side on the same prompts",
    "doctor": "what Nibble finds on this machine: libraries, device, memory, settings, proxy",
}
"""Name -> what it does. Each is a module of nibble.commands, imported only when it is asked for."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    quiet_logs()
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
    return guarded(lambda: module.run(arguments, settings_from(arguments)))


if __name__ == "__main__":
    sys.exit(main())
