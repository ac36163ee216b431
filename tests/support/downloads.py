"""Fixtures and helpers of the tests of downloads: hubs on this machine, and their libraries in a hurry."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

from nibble.hub import Request, download
from tests.support.hubs import Hubs, serve
from tests.support.tiny import write_model

BOTH = ("huggingface", "modelscope")
REPO = "org/tiny"


@dataclass
class Told:
    """What a download told its report."""

    steps: list[tuple[float, float, str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def progress(self, done: float, total: float, unit: str = "", stage: str = "") -> None:
        self.steps.append((done, total, unit, stage))

    def note(self, text: str) -> None:
        self.notes.append(text)

    def metric(self, **numbers: float) -> None:
        pass

    folder = None


@pytest.fixture
def hubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hubs]:
    """Both hubs with `org/tiny`, at the addresses that the environment names; no token, no cache, no login."""
    write_model(tmp_path / "root" / REPO)
    with serve(tmp_path / "root") as running:
        for name, value in surroundings(tmp_path, running).items():
            monkeypatch.setenv(name, value)
        for name in ("HF_TOKEN", "MODELSCOPE_API_TOKEN", "HF_HUB_OFFLINE", "NIBBLE_HUBS", "NIBBLE_TRUST_REMOTE_CODE"):
            monkeypatch.delenv(name, raising=False)
        hasten(monkeypatch, tmp_path)
        yield running


def surroundings(folder: Path, running: Hubs) -> dict[str, str]:
    """The environment in which the hubs' libraries find the test's hubs, and nothing of this machine's user."""
    return {
        "HF_ENDPOINT": running.url, "MODELSCOPE_ENDPOINT": running.url, "HF_HOME": str(folder / "hf"),
        "MODELSCOPE_CACHE": str(folder / "ms-cache"), "MODELSCOPE_HOME": str(folder / "ms-home"),
        "HOME": str(folder / "user"), "NO_PROXY": "127.0.0.1,localhost",
    }  # fmt: skip


def hasten(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Both libraries without their pauses, with one try each, and with what they had read of the environment undone."""
    import huggingface_hub.file_download
    import huggingface_hub.utils._http
    import modelscope_hub._download
    import modelscope_hub._legacy_api
    from huggingface_hub import constants

    clock = SimpleNamespace(**vars(huggingface_hub.file_download.time) | {"sleep": lambda _: None})
    monkeypatch.setattr(huggingface_hub.file_download, "time", clock)
    monkeypatch.setattr(huggingface_hub.utils._http, "time", clock)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hf" / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "hf" / "token"))
    monkeypatch.setattr(modelscope_hub._download, "DOWNLOAD_RETRY_TIMES", 0)
    monkeypatch.setattr(modelscope_hub._download, "DOWNLOAD_HASH_RETRY_TIMES", 1)
    monkeypatch.setattr(modelscope_hub._download, "DOWNLOAD_SIZE_RETRY_TIMES", 1)
    monkeypatch.setattr(modelscope_hub._legacy_api, "REPO_TREE_PAGE_MAX_ATTEMPTS", 1)


def fetch(home: Path, hub: str, told: Told | None = None, **wishes: str) -> Path:
    """Download `org/tiny` from one hub."""
    return download(Request(**{"repo": REPO, **wishes}, hubs=(hub,)), told or Told(), home)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
