"""What goes over the pipes between the page and the process that holds a model: one JSON object a line.

Promises that chunks, errors and requests arrive as they were sent, lone surrogates too. Knows nothing of processes.

    to the child    {"load": LoadSpec}  {"id": 1, "ask": Request}  {"id": 1, "stop": true}
    to the page     {"ready": EngineInfo}  {"memory": bytes}  {"id": 1, "chunk": {...}}  {"id": 1, "error": {...}}
                    {"error": {...}} without an id: the model cannot be loaded
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from typing import Any

from nibble.engines.base import Chunk, Sampling
from nibble.engines.threaded import Request, Stalled
from nibble.errors import ConfigError, DeviceError, EngineDied, FormatError, ModelError, NibbleError

ERRORS: dict[str, type[NibbleError]] = {
    kind.__name__: kind
    for kind in (NibbleError, ConfigError, DeviceError, EngineDied, FormatError, ModelError, Stalled)
}
"""Kinds of error that cross the pipe by name; any other one arrives as a plain NibbleError."""


def line(message: dict[str, Any]) -> bytes:
    """A message as one line of ASCII."""
    return json.dumps(message, separators=(",", ":")).encode("ascii") + b"\n"


def parse(text: bytes) -> dict[str, Any] | None:
    """The message in a line; None where it is none."""
    try:
        message = json.loads(text)
    except ValueError:
        return None
    return message if isinstance(message, dict) else None


def pack_chunk(chunk: Chunk) -> dict[str, Any]:
    """A chunk's fields that differ from the defaults."""
    return {item.name: value for item in fields(Chunk) if (value := getattr(chunk, item.name)) != item.default}


def unpack_chunk(packed: dict[str, Any]) -> Chunk:
    """The chunk that `pack_chunk` packed."""
    return Chunk(**packed)


def pack_error(error: NibbleError) -> dict[str, str]:
    """An error's kind, message and hint."""
    return {"kind": type(error).__name__, "message": error.message, "hint": error.hint}


def unpack_error(packed: dict[str, str]) -> NibbleError:
    """The error that `pack_error` packed."""
    return ERRORS.get(packed["kind"], NibbleError)(packed["message"], packed["hint"])


def pack_request(request: Request) -> dict[str, Any]:
    """A request as plain data."""
    return {**asdict(request), "messages": [dict(message) for message in request.messages]}


def unpack_request(packed: dict[str, Any]) -> Request:
    """The request that `pack_request` packed."""
    return Request(packed["messages"], Sampling(**packed["sampling"]), packed["visitor"], packed["adapter"])
