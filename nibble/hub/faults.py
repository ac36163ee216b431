"""What the hubs' libraries raise, told as one sentence and what to do.

Promises that no sentence quotes what a server, a library or an address says: a token cannot come out this way. Knows
the libraries' exceptions by name, so that neither is imported for it.
"""

from __future__ import annotations

import errno
import math
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

from nibble.errors import NibbleError

KEPT = "What has arrived is kept: start it again and it goes on."


SITES = {
    ("huggingface", "model"): "https://huggingface.co",
    ("huggingface", "dataset"): "https://huggingface.co/datasets",
    ("modelscope", "model"): "https://modelscope.cn/models",
    ("modelscope", "dataset"): "https://modelscope.cn/datasets",
}
"""Family and kind -> where such repositories have their pages."""


class DownloadError(NibbleError):
    """A model or a data set that could not be fetched."""


class HubUnavailable(DownloadError):
    """The hub could not answer at all, now: another one may."""


@dataclass(frozen=True)
class Asked:
    """What was asked of whom."""

    hub: str
    """The hub's name for a person."""
    family: str
    repo: str
    revision: str = ""
    kept: str = ""
    """What becomes of what has arrived, where something may have."""
    kind: str = "model"
    """`model` or `dataset`."""

    @property
    def page(self) -> str:
        """Its page in a browser."""
        return f"{SITES[self.family, self.kind]}/{self.repo}"

    @property
    def noun(self) -> str:
        """What it is, for a person."""
        return {"model": "model", "dataset": "data set"}[self.kind]

    @property
    def variable(self) -> str:
        """The environment variable of the hub's token."""
        return {"huggingface": "HF_TOKEN", "modelscope": "MODELSCOPE_API_TOKEN"}[self.family]


@dataclass(frozen=True)
class Facts:
    """What one exception says that can be trusted and told."""

    error: BaseException
    names: frozenset[str]
    """`package.Class` of its class and all bases."""
    status: int
    """HTTP status; 0 where there is none."""
    code: str
    """Hugging Face's X-Error-Code."""
    invalid_token: bool
    errno: int


def explain(error: BaseException, asked: Asked) -> DownloadError:
    """The sentence for whatever a hub's library raised; raise it `from None`."""
    chain = [_facts(link) for link in _chain(error)]
    for applies, sentence in TABLE:
        for facts in chain:
            if applies(facts):
                fault = sentence(facts, asked)
                return type(fault)(fault.message, fault.hint.strip())
    return DownloadError(
        f"{asked.hub} failed in a way that Nibble does not know ({type(error).__name__}).",
        f"Try again later. {asked.kept}".strip(),
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An exception and all that it wraps, in whichever way its library does that."""
    seen: set[int] = set()
    open_ends: list[object] = [error]
    while open_ends:
        link = open_ends.pop(0)
        if not isinstance(link, BaseException) or id(link) in seen:
            continue
        seen.add(id(link))
        yield link
        failed = getattr(link, "failed_files", None)
        open_ends += list(failed.values()) if isinstance(failed, dict) else []
        open_ends += [link.__cause__, link.__context__, getattr(link, "reason", None), *link.args]


def _facts(error: BaseException) -> Facts:
    response = getattr(error, "response", None)
    headers = getattr(response, "headers", None) or {}
    status = getattr(error, "status_code", None) or getattr(response, "status_code", None)
    message = str(headers.get("X-Error-Message", ""))
    return Facts(
        error=error,
        names=frozenset(f"{kind.__module__.split('.')[0]}.{kind.__name__}" for kind in type(error).__mro__),
        status=status if isinstance(status, int) else 0,
        code=str(headers.get("X-Error-Code", "")),
        invalid_token=message.startswith("Invalid"),
        errno=getattr(error, "errno", None) or 0 if isinstance(error, OSError) else 0,
    )


def _wait(facts: Facts) -> str:
    """When to ask again, from Retry-After (RFC 9110, 10.2.3) or Hugging Face's RateLimit header; empty if not told."""
    headers = getattr(getattr(facts.error, "response", None), "headers", None) or {}
    given = str(headers.get("Retry-After", "") or getattr(facts.error, "retry_after", None) or "").strip()
    reset = re.search(r"\bt=(\d+)", str(headers.get("RateLimit", "")))
    try:
        seconds = float(given or (reset[1] if reset else "nan"))
    except ValueError:
        try:
            seconds = parsedate_to_datetime(given).timestamp() - time.time()
        except (TypeError, ValueError):
            return ""
    if not 0 < seconds < 10**7:
        return ""
    return f"in {math.ceil(seconds)} s" if seconds < 120 else f"in {math.ceil(seconds / 60)} minutes"


def _disk_full(_: Facts, asked: Asked) -> DownloadError:
    return DownloadError(
        f"The disk is full: {asked.repo} could not be stored.",
        f"Free some space, or set home to a larger disk (NIBBLE_HOME). {asked.kept}",
    )


def _not_writable(facts: Facts, _: Asked) -> DownloadError:
    name = getattr(facts.error, "filename", None)
    return DownloadError(
        f"{name or 'Its folder'} cannot be written.", "Check its permissions, or set home to another folder."
    )


def _offline(_: Facts, __: Asked) -> DownloadError:
    return DownloadError(
        "Downloads are switched off by HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE.", "Unset it and start again."
    )


def _gated(_: Facts, asked: Asked) -> DownloadError:
    return DownloadError(
        f"{asked.repo} is gated: its makers ask you to accept their terms first.",
        f"Accept them at {asked.page}, then set {asked.variable} to a token of that account.",
    )


def _bad_token(_: Facts, asked: Asked) -> DownloadError:
    return DownloadError(
        f"{asked.hub} does not accept the token.",
        f"Make a new one in your account there and set {asked.variable} to it, or unset it for a public {asked.noun}.",
    )


def _no_revision(_: Facts, asked: Asked) -> DownloadError:
    return DownloadError(
        f"{asked.repo} on {asked.hub} has no revision {asked.revision!r}.", f"See its versions at {asked.page}."
    )


def _no_file(_: Facts, asked: Asked) -> DownloadError:
    return DownloadError(
        f"A file that {asked.hub} lists for {asked.repo} is not there.",
        "Its makers may be changing it: try again soon.",
    )


def _no_repo(_: Facts, asked: Asked) -> DownloadError:
    version = f", or it has no revision {asked.revision!r}" if asked.revision else ""
    return DownloadError(
        f"There is no {asked.noun} {asked.repo} on {asked.hub}, or it is private{version}.",
        f"Check the spelling; for a private one set {asked.variable} to a token of an account that may read it.",
    )


def _forbidden(_: Facts, asked: Asked) -> DownloadError:
    return DownloadError(
        f"{asked.hub} refuses {asked.repo}: it is gated or private, or the token may not read it.",
        f"Look at {asked.page}: accept its terms if it asks, then set {asked.variable} to a token of that account.",
    )


def _too_many(facts: Facts, asked: Asked) -> DownloadError:
    wait = _wait(facts)
    return HubUnavailable(
        f"{asked.hub} takes no more requests from here for now{f'; it asks to come back {wait}' if wait else ''}.",
        f"Try again {wait or 'in some minutes'}; with a token ({asked.variable}) the limit is higher. {asked.kept}",
    )


def _server_fault(facts: Facts, asked: Asked) -> DownloadError:
    return HubUnavailable(
        f"{asked.hub} has a fault of its own (HTTP {facts.status}).", f"Try again later. {asked.kept}"
    )


def _refused(facts: Facts, asked: Asked) -> DownloadError:
    return DownloadError(
        f"{asked.hub} refused the request for {asked.repo} (HTTP {facts.status}).", f"Look at {asked.page}."
    )


def _wrong_size(_: Facts, asked: Asked) -> DownloadError:
    return DownloadError(
        f"A file of {asked.repo} arrived in another size than {asked.hub} lists.",
        f"A proxy between may have changed it, or the hub serves an old copy: try again later. {asked.kept}",
    )


def _corrupted(_: Facts, asked: Asked) -> DownloadError:
    return DownloadError(
        f"A file of {asked.repo} arrived corrupted: its SHA-256 is not the one that {asked.hub} lists.",
        f"Start it again: only that file is fetched. {asked.kept}",
    )


def _no_name(_: Facts, asked: Asked) -> DownloadError:
    return HubUnavailable(
        f"The name of {asked.hub} cannot be looked up (DNS).",
        f"Check the network connection and, where one is set, the proxy or mirror address. {asked.kept}",
    )


def _no_trust(_: Facts, asked: Asked) -> DownloadError:
    return HubUnavailable(
        f"The certificate of {asked.hub} was not accepted.",
        "Check the clock; behind a company's proxy set SSL_CERT_FILE and REQUESTS_CA_BUNDLE to its certificate.",
    )


def _too_slow(_: Facts, asked: Asked) -> DownloadError:
    return HubUnavailable(f"{asked.hub} did not answer in time.", f"Check the network, or try later. {asked.kept}")


def _no_network(_: Facts, asked: Asked) -> DownloadError:
    mirror = "; where Hugging Face is blocked, a mirror (HF_ENDPOINT) or --hub modelscope may work"
    return HubUnavailable(
        f"The connection to {asked.hub} failed or was cut.",
        f"Check the network{mirror if asked.family == 'huggingface' else ''}. {asked.kept}",
    )


def _not_a_hub(_: Facts, asked: Asked) -> DownloadError:
    return HubUnavailable(
        f"What answers as {asked.hub} does not speak its language.",
        "A login page or proxy may stand between; check HF_ENDPOINT or MODELSCOPE_ENDPOINT where one is set.",
    )


def _named(*names: str) -> Callable[[Facts], bool]:
    return lambda facts: not facts.names.isdisjoint(names)


def _text(*pieces: str) -> Callable[[Facts], bool]:
    """Where a library tells only in words what happened; the words are compared, never shown."""
    return lambda facts: any(piece in str(facts.error) for piece in pieces)


TABLE: tuple[tuple[Callable[[Facts], bool], Callable[[Facts, Asked], DownloadError]], ...] = (
    (lambda facts: facts.errno in (errno.ENOSPC, errno.EDQUOT), _disk_full),
    (lambda facts: facts.errno in (errno.EACCES, errno.EPERM, errno.EROFS), _not_writable),
    (_named("huggingface_hub.OfflineModeIsEnabled"), _offline),
    (lambda facts: facts.code == "GatedRepo", _gated),
    (lambda facts: facts.status == 401 and facts.invalid_token, _bad_token),
    (_named("modelscope_hub.AuthenticationError"), _bad_token),
    (lambda facts: facts.code == "RevisionNotFound", _no_revision),
    (lambda facts: facts.code == "EntryNotFound", _no_file),
    (lambda facts: facts.status in (401, 404), _no_repo),
    (lambda facts: facts.status == 403, _forbidden),
    (lambda facts: facts.status == 429, _too_many),
    (lambda facts: facts.status >= 500, _server_fault),
    (lambda facts: facts.status >= 400, _refused),
    (_named("modelscope_hub.NotExistError"), _no_repo),
    (_named("modelscope_hub.FileSizeMismatchError"), _wrong_size),
    (_text("Consistency check failed"), _wrong_size),
    (_named("modelscope_hub.FileIntegrityError"), _corrupted),
    (lambda facts: isinstance(facts.error, socket.gaierror), _no_name),
    (_named("urllib3.NameResolutionError"), _no_name),
    (_text("Name or service not known", "Temporary failure in name resolution"), _no_name),
    (lambda facts: isinstance(facts.error, ssl.SSLCertVerificationError), _no_trust),
    (_text("CERTIFICATE_VERIFY_FAILED"), _no_trust),
    (_named("httpx2.TimeoutException", "httpx.TimeoutException", "requests.Timeout"), _too_slow),
    (_named("modelscope_hub.RequestTimeoutError", "modelscope_hub._DownloadTooSlowError"), _too_slow),
    (_named("builtins.TimeoutError"), _too_slow),
    (_named("httpx2.TransportError", "httpx.TransportError"), _no_network),
    (_named("requests.ConnectionError", "requests.ChunkedEncodingError"), _no_network),
    (_named("modelscope_hub.NetworkError", "builtins.ConnectionError", "urllib3.HTTPError"), _no_network),
    (_named("huggingface_hub.FileMetadataError", "json.JSONDecodeError", "requests.JSONDecodeError"), _not_a_hub),
    (_named("huggingface_hub.XetDownloadError", "hf_xet.XetError"), _no_network),
)
"""What is looked for in the chain of exceptions, the surest first -> what is said."""
