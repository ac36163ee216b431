"""What several test files share. Nothing here needs the network, and nothing is written outside a temporary folder."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.support.downloads import hubs

__all__ = ["hubs"]

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
# Threads that spin while they wait make a busy machine ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Nor is a busy machine a reason to fail: what it takes to draw an example is not what is tested.
settings.register_profile("patient", suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real models, tokenizers and text made by others; absent in a user's checkout."""
    if not SHARED.is_dir():
        pytest.skip("the folder of shared test data is not beside this checkout")
    return SHARED


@pytest.fixture(scope="session")
def stories(shared_data: Path) -> Path:
    """A really trained Llama-2-class model of 260K parameters."""
    return shared_data / "models" / "stories260K-hf"


@pytest.fixture(scope="session")
def guide_model() -> Path:
    """The embedded model."""
    folder = ROOT / "guide" / "model"
    if not (folder / "config.json").exists():
        pytest.skip("the guide has not been trained yet: guide/model is empty")
    return folder


@pytest.fixture(scope="session")
def bigdl_python() -> Path:
    """The interpreter of the environment with the real IPEX-LLM."""
    python = ROOT / ".venv-bigdl" / "bin" / "python"
    if not python.exists():
        pytest.skip("IPEX-LLM IS NOT TRIED: there is no .venv-bigdl; `make bigdl` builds it")
    return python


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For models so small that a second thread is only waited for."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home of Nibble, named by NIBBLE_HOME."""
    folder = tmp_path / "home"
    monkeypatch.setenv("NIBBLE_HOME", str(folder))
    return folder
