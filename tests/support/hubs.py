"""A hub on this machine: speaks to the client libraries of Hugging Face and ModelScope as the real ones do.

Promises the requests that huggingface_hub 2.4 and modelscope_hub 0.5 make for a model or a data set, recorded from
the libraries themselves: on Hugging Face model info with the files' sizes and hashes, the tree, HEAD and GET of
`resolve` with X-Repo-Commit and ETag (a small file by a redirect on the hub, a large one by a redirect to another
host with X-Linked-Size and X-Linked-ETag), the error codes in X-Error-Code; on ModelScope the existence probe, the
list of files and the file itself, with ranges; for a data set the same under `datasets`, its list on ModelScope as
`repo/tree` in pages. Serves `<root>/<org>/<name>/<file>` and `<root>/datasets/<org>/<name>/<file>`; what goes wrong
is said by `Fault`s. Knows nothing of Nibble. By Xet, Hugging Face's second way of moving large files, a file is one
block of unpacked chunks.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "5f0b02c75b57c5855da9ae460ce51323ea669d8a"
BRANCHES = {"main", "master", "v1"}
LARGE = (".safetensors", ".gguf", ".bin", ".model", ".parquet")
"""Files that lie in LFS: they are sent from the other host."""


@dataclass
class Fault:
    """What happens to requests whose `METHOD path?query` matches a pattern."""

    pattern: str
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    cut_at: int | None = None
    """Offset in the file at which the connection ends, also when a range asks for more."""
    reset: bool = False
    """Whether it ends by a reset instead of a close."""
    pause: float = 0.0
    """Seconds before each 4 kB."""
    flip: int | None = None
    """Offset of a byte that arrives wrong."""
    extra: int = 0
    """Bytes by which the file is longer than the hub's list says."""
    times: int = 1_000_000
    """How often it happens."""

    def hits(self, line: str) -> bool:
        """Whether it happens now; counts down."""
        if self.times < 1 or not re.search(self.pattern, line):
            return False
        self.times -= 1
        return True


@dataclass
class Hubs:
    """A running server and what it saw."""

    root: Path
    url: str = ""
    cdn: str = ""
    token: str = ""
    """Where set, only requests that carry it see anything."""
    listed: dict[str, int] = field(default_factory=dict)
    """File -> size in the hub's lists, where it differs from the truth."""
    xet: str = ""
    """Address of Xet's server, where set: large files are then offered by way of it too."""
    hidden_hashes: bool = False
    """ModelScope's list then gives no Sha256."""
    more: list[str] = field(default_factory=list)
    """Paths in the hub's lists that no file stands behind."""
    faults: list[Fault] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    """`METHOD path?query` of every request."""
    credentials: list[tuple[str, str]] = field(default_factory=list)
    """(host, Authorization or Cookie) of every request that carried one."""
    sent: Counter[str] = field(default_factory=Counter)
    """File -> bytes of its content that were sent."""

    def files(self, repo: str) -> list[Path]:
        """The files of a repository."""
        return sorted(path for path in (self.root / repo).rglob("*") if path.is_file())

    def count(self, pattern: str) -> int:
        """How many requests match."""
        return sum(1 for line in self.lines if re.search(pattern, line))

    def heal(self) -> None:
        """Nothing goes wrong from here on, and counting starts again."""
        self.faults.clear()
        self.lines.clear()
        self.sent.clear()


@contextmanager
def serve(root: Path) -> Iterator[Hubs]:
    """Serve the models below a folder for the length of a `with`; each port is free when it ends."""
    hubs = Hubs(root)
    handler = type("Handler", (_Handler,), {"hubs": hubs})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hubs.url = f"http://127.0.0.1:{server.server_port}"
    hubs.cdn = f"http://localhost:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hubs
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def sha256(path: Path) -> str:
    """The hash by which LFS names a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def git_hash(path: Path) -> str:
    """The hash by which git names a file: SHA-1 of `blob <size>\\0<content>`."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # noqa: S324 - git's own


def typed(repo: str) -> str:
    """A repository with its kind before it, as addresses of an interface name it."""
    return repo if repo.startswith("datasets/") else f"models/{repo}"


def xorb(content: bytes) -> tuple[bytes, int]:
    """Xet's form of a block: chunks, each behind a header of version, packed length, scheme (0: none) and length."""
    chunks = [content[start : start + 65_536] for start in range(0, len(content), 65_536)]
    sizes = [len(chunk).to_bytes(3, "little") for chunk in chunks]
    return b"".join(b"\0" + size + b"\0" + size + chunk for size, chunk in zip(sizes, chunks, strict=True)), len(chunks)


REPO = r"(?:models/)?(?P<repo>(?:datasets/)?[^/]+/[^/]+)"
"""As it stands in an address of an interface; a data set lies in `<root>/datasets/`."""

ROUTES = {
    rf"/api/{REPO}(/revision/(?P<revision>[^/]+))?": "hf_info",
    rf"/api/{REPO}/tree/(?P<revision>[^/]+)": "hf_tree",
    rf"/api/{REPO}/xet-read-token/(?P<revision>[^/]+)": "hf_xet",
    r"/v1/reconstructions/(?P<hash_>[0-9a-f]{64})": "xet_plan",
    r"/xorb/(?P<hash_>[0-9a-f]{64})": "xet_block",
    rf"/api/resolve-cache/{REPO}/(?P<revision>[^/]+)/(?P<path>.+)": "hf_small",
    r"/(?P<repo>(?!api/|lfs/)(?:datasets/)?[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)": "hf_resolve",
    r"/lfs/(?P<repo>(?:datasets/)?[^/]+/[^/]+)/(?P<path>.+)": "lfs",
    rf"/openapi/v1/{REPO}": "ms_exists",
    r"/api/v1/repos/internalAccelerationInfo": "ms_region",
    rf"/api/v1/{REPO}/repo/(?:files|tree)": "ms_files",
    rf"/api/v1/{REPO}/repo": "ms_file",
}
"""Path -> the method that answers."""


class _Handler(BaseHTTPRequestHandler):
    hubs: Hubs
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        line = f"{self.command} {self.path}"
        self.hubs.lines.append(line)
        for name in ("Authorization", "Cookie"):
            if self.headers.get(name):
                self.hubs.credentials.append((self.headers["Host"], self.headers[name]))
        self.faults = [fault for fault in self.hubs.faults if fault.hits(line)]
        refusal = next((fault for fault in self.faults if fault.status), None)
        if refusal:
            self.answer(refusal.status, refusal.body, refusal.headers)
            return
        url = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(url.query).items()}
        for pattern, name in ROUTES.items():
            match = re.fullmatch(pattern, unquote(url.path))
            if match:
                getattr(self, name)(**match.groupdict())
                return
        self.answer(404)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Silence: a test reads `Hubs.lines`."""

    def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.answer(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    # Hugging Face

    def hf_refused(self, repo: str, revision: str | None) -> bool:
        given = self.headers.get("Authorization", "")
        if given and self.hubs.token and given != f"Bearer {self.hubs.token}":
            self.hf_error(401, "", "Invalid credentials in Authorization header")
        elif not (self.hubs.root / repo).is_dir() or (self.hubs.token and not given):
            # The hub does not tell a stranger whether a model is private or does not exist.
            self.hf_error(401 if not given else 404, "RepoNotFound", "Repository not found")
        elif revision not in (None, COMMIT) and revision not in BRANCHES:
            self.hf_error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return False
        return True

    def hf_error(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.json({"error": message}, status, headers)

    def listed_size(self, path: Path) -> int:
        return self.hubs.listed.get(path.name, path.stat().st_size)

    def hf_info(self, repo: str, revision: str | None = None) -> None:
        if self.hf_refused(repo, revision):
            return
        siblings: list[dict[str, object]] = []
        for path in self.hubs.files(repo):
            entry: dict[str, object] = {"rfilename": str(path.relative_to(self.hubs.root / repo))}
            if "blobs" in self.query:
                size = self.listed_size(path)
                entry |= {"blobId": git_hash(path), "size": size}
                if path.suffix in LARGE:
                    entry["lfs"] = {"sha256": sha256(path), "size": size, "pointerSize": 134}
            siblings.append(entry)
        siblings += [{"rfilename": name, "blobId": "0" * 40, "size": 1} for name in self.hubs.more]
        self.json({"_id": "1", "id": repo.removeprefix("datasets/"), "sha": COMMIT, "private": False, "gated": False,
                   "disabled": False, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings})  # fmt: skip

    def hf_tree(self, repo: str, revision: str) -> None:
        if self.hf_refused(repo, revision):
            return
        entries: list[dict[str, object]] = []
        for path in self.hubs.files(repo):
            entry: dict[str, object] = {
                "type": "file", "oid": git_hash(path), "size": self.listed_size(path),
                "path": str(path.relative_to(self.hubs.root / repo)),
            }  # fmt: skip
            if path.suffix in LARGE:
                entry["lfs"] = {"oid": sha256(path), "size": self.listed_size(path), "pointerSize": 134}
            entries.append(entry)
        self.json(entries)

    def hf_resolve(self, repo: str, revision: str, path: str) -> None:
        if self.hf_refused(repo, revision):
            return
        file = self.hubs.root / repo / path
        if not file.is_file():
            self.hf_error(404, "EntryNotFound", "Entry not found")
            return
        headers = {"X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if file.suffix in LARGE:
            headers |= {"X-Linked-Size": str(self.listed_size(file)), "X-Linked-ETag": f'"{sha256(file)}"'}
            if self.hubs.xet:
                route = f"{self.hubs.url}/api/{typed(repo)}/xet-read-token/{COMMIT}"
                headers |= {"X-Xet-Hash": sha256(file), "X-Xet-Refresh-Route": route}
            self.answer(302, b"", {**headers, "Location": f"{self.hubs.cdn}/lfs/{repo}/{path}?Signature=abc"})
        else:
            self.answer(307, b"", {**headers, "Location": f"/api/resolve-cache/{typed(repo)}/{COMMIT}/{path}"})

    def hf_small(self, repo: str, revision: str, path: str) -> None:
        file = self.hubs.root / repo / path
        self.content(file, {"X-Repo-Commit": COMMIT, "ETag": f'"{git_hash(file)}"'})

    def hf_xet(self, repo: str, revision: str) -> None:
        headers = {"X-Xet-Cas-Url": self.hubs.xet, "X-Xet-Access-Token": "t", "X-Xet-Token-Expiration": "4000000000"}
        self.json({"casUrl": self.hubs.xet, "accessToken": "t", "exp": 4_000_000_000}, 200, headers)

    def xet_plan(self, hash_: str) -> None:
        file = self.xet_file(hash_)
        packed, count = xorb(file.read_bytes())
        url = {"range": {"start": 0, "end": count}, "url": f"{self.hubs.cdn}/xorb/{hash_}",
               "url_range": {"start": 0, "end": len(packed) - 1}}  # fmt: skip
        term = {"hash": hash_, "unpacked_length": file.stat().st_size, "range": {"start": 0, "end": count}}
        self.json({"offset_into_first_range": 0, "terms": [term], "fetch_info": {hash_: [url]}})

    def xet_block(self, hash_: str) -> None:
        file = self.xet_file(hash_)
        self.bytes(file.name, xorb(file.read_bytes())[0], {})

    def xet_file(self, hash_: str) -> Path:
        return next(path for path in self.hubs.root.rglob("*") if path.is_file() and sha256(path) == hash_)

    def lfs(self, repo: str, path: str) -> None:
        file = self.hubs.root / repo / path
        self.content(file, {"ETag": '"cdn-multipart-7"'})

    # ModelScope

    def ms_refused(self, repo: str, revision: str = "master") -> bool:
        given = self.headers.get("Authorization", "")
        if given and self.hubs.token and given != f"Bearer {self.hubs.token}":
            self.ms_error(401, 10010103009, "AccessToken is invalid or expired")
        elif not (self.hubs.root / repo).is_dir() or (self.hubs.token and not given):
            self.ms_error(404, 10010205001, "模型不存在")
        elif revision not in BRANCHES:
            self.ms_error(404, 10010205004, f"revision {revision} not found")
        else:
            return False
        return True

    def ms_error(self, status: int, code: int, message: str) -> None:
        self.json({"Code": code, "Message": message, "RequestId": "r", "Success": False}, status)

    def ms_exists(self, repo: str) -> None:
        if (self.hubs.root / repo).is_dir():
            self.json({"success": True, "request_id": "r", "data": {"id": repo}})
        else:
            self.json({"success": False, "code": "ResourceNotFound", "message": "no such model"}, 404)

    def ms_region(self) -> None:
        self.json({"Code": 200, "Data": {"InternalRegionQueryAddress": ""}, "Success": True})

    def ms_files(self, repo: str) -> None:
        if self.ms_refused(repo, self.query.get("Revision", "master")):
            return
        files: list[dict[str, object]] = []
        for path in self.hubs.files(repo):
            entry = {
                "Name": path.name, "Path": str(path.relative_to(self.hubs.root / repo)), "Type": "blob",
                "Size": self.listed_size(path), "Revision": COMMIT, "Sha256": sha256(path), "Mode": "33188",
                "IsLFS": path.suffix in LARGE, "CommittedDate": 1_700_000_000,
            }  # fmt: skip
            if self.hubs.hidden_hashes:
                del entry["Sha256"]
            files.append(entry)
        files += [
            {"Name": name, "Path": name, "Type": "blob", "Size": 1, "Sha256": "0" * 64} for name in self.hubs.more
        ]
        if "PageSize" in self.query:
            # A data set's list comes in pages.
            start, size = (int(self.query["PageNumber"]) - 1) * int(self.query["PageSize"]), int(self.query["PageSize"])
            files = files[start : start + size]
        self.json({"Code": 200, "Data": {"Files": files}, "Message": "success", "RequestId": "r", "Success": True})

    def ms_file(self, repo: str) -> None:
        if self.ms_refused(repo, self.query.get("Revision", "master")):
            return
        file = self.hubs.root / repo / self.query["FilePath"]
        if not file.is_file():
            self.ms_error(404, 10990101, "file not found")
        elif file.suffix in LARGE:
            self.answer(302, b"", {"Location": f"{self.hubs.cdn}/lfs/{repo}/{self.query['FilePath']}?Signature=abc"})
        else:
            self.content(file, {})

    # The bytes

    def content(self, file: Path, headers: dict[str, str]) -> None:
        """A file or the range of it that was asked for, as the faults of this request let it through."""
        self.bytes(file.name, file.read_bytes(), headers)

    def bytes(self, name: str, whole: bytes, headers: dict[str, str]) -> None:
        content = bytearray(whole)
        for fault in self.faults:
            content += b"x" * fault.extra
            if fault.flip is not None:
                content[fault.flip] ^= 1
        start, end = 0, len(content)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked:
            start = int(asked[1])
            end = min(int(asked[2]) + 1, end) if asked[2] else end
            if start >= len(content):
                self.answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
                return
            headers = {**headers, "Content-Range": f"bytes {start}-{end - 1}/{len(content)}"}
        self.send_response(206 if asked else 200)
        for key, value in {"Content-Length": str(end - start), "Accept-Ranges": "bytes", **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.body(name, content[start:end], start)

    def body(self, name: str, body: bytes, start: int) -> None:
        cuts = [fault for fault in self.faults if fault.cut_at is not None]
        pause = max((fault.pause for fault in self.faults), default=0.0)
        if cuts:
            body = body[: max(cuts[0].cut_at - start, 0)]
        step = 4096 if pause else len(body) or 1
        for offset in range(0, len(body), step):
            if pause:
                threading.Event().wait(pause)
            piece = body[offset : offset + step]
            try:
                self.wfile.write(piece)
            except OSError:
                self.close_connection = True
                return
            self.hubs.sent[name] += len(piece)
        if cuts:
            self.close_connection = True
            if cuts[0].reset:
                # Lingering for zero seconds makes close() send a reset instead of an end.
                self.wfile.flush()
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.shutdown(socket.SHUT_RDWR) if not cuts[0].reset else self.connection.close()
