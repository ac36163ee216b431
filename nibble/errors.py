"""The few kinds of failure that Nibble tells a person about.

Promises that every message says what was wrong and where, and every hint what to do. Knows nothing of how they are
shown: the console prints them on standard error, the page renders them in the chat, an endpoint returns one sentence.
"""

from __future__ import annotations

import logging
import secrets

log = logging.getLogger(__name__)


class NibbleError(Exception):
    """Something a person can mend.

    Args:
        message: one sentence, what was wrong and where.
        hint: one sentence, what to do next; may be empty.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class ConfigError(NibbleError):
    """A setting, from a flag, the environment or config.yaml, that cannot be used."""

    exit_code = 2


class FormatError(NibbleError):
    """A low-bit format name that is not one of ours."""


class ModelError(NibbleError):
    """A model folder that cannot be loaded as it is."""


class SourceError(ModelError):
    """A sound model in a form that cannot be loaded as it is: a low-bit model can be made of it."""


class DeviceError(NibbleError):
    """A device that was asked for and is not there, or has not enough memory."""


class EngineDied(NibbleError):
    """The worker process that held the model is gone."""


class JobError(NibbleError):
    """A job that cannot be found, started, stopped or resumed."""


class DataError(NibbleError):
    """A data set file that cannot be trained on as it is."""


def log_unforeseen(error: BaseException, what: str) -> str:
    """Log an error that no sentence was written for, and return the id under which a person finds it in the log.

    Args:
        error: what was caught at a border: of the page, an endpoint, a thread or a job.
        what: what failed, in a few words such as "answer".
    """
    number = secrets.token_hex(3)
    log.error("%s failed, id %s", what, number, exc_info=error)
    return number
