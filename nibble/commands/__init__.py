"""The console: one module a command, each with `configure(parser)` and `run(arguments, settings) -> None`.

Only these modules print. Errors leave them as NibbleError; `nibble.__main__` turns those into a line and an exit code.
"""
