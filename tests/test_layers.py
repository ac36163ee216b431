"""The arrows of docs/DESIGN: app -> {chat, models_ui, finetune_ui} -> parts -> nibble, and those inside nibble."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TABS = ("chat", "models_ui", "finetune_ui")
MAY = {"app": {*TABS, "parts", "nibble"}, "parts": {"parts", "nibble"}, "nibble": {"nibble"}} | {
    tab: {tab, "parts", "nibble"} for tab in TABS
}
HEAVY = {"torch", "transformers", "peft", "trl", "datasets", "accelerate", "bitsandbytes"}
FILES = [ROOT / "app.py", *sorted(path for top in (*TABS, "parts", "nibble") for path in (ROOT / top).rglob("*.py"))]

READING = {"checkpoint", "screen", "library"}
"""The rooms that read a model's folder without loading it."""

INSIDE = {
    "checkpoint": {"checkpoint"},
    "screen": {"screen", "checkpoint"},
    "library": READING | {"publish", "lowbit.formats"},
    "disk": {"library"},
    "removal": {"removal", "disk", "library", "jobs", "publish", "lowbit.formats"},
    "publish": {"publish"},
    "devices": {"devices"},
    "lowbit": {"lowbit", "devices", "publish"},
    "transformers": {"lowbit", "devices", "publish", "checkpoint", "screen", "sources.safetensors"},
    "shards": {"shards"},
    "sources": READING | {"sources", "lowbit", "bigdl"},
    "packing": READING | {"packing", "shards", "sources", "lowbit", "publish", "transformers"},
    "quality": READING | {"quality", "transformers", "lowbit", "devices", "prompts", "publish", "estimate"},
    "probe": {"probe", "devices", "lowbit"},
    "estimate": READING | {"estimate", "probe", "devices", "lowbit.formats", "sources"},
    "prompts": {"prompts", "engines.base", "screen.templates"},
    "engines": READING
    | {"engines", "prompts", "transformers", "lowbit", "devices", "bigdl.folders", "estimate", "adapters", "publish"},
    "bigdl": READING
    | {"bigdl", "prompts", "transformers", "lowbit", "devices", "publish", "shards", "sources.safetensors"}
    | {"engines.base", "engines.child", "engines.text", "engines.threaded", "engines.wire"},
    "jobs": {"jobs", "tasks"},
    "tasks": READING
    | {"tasks", "jobs", "hub", "transformers", "lowbit", "devices", "publish"}
    | {"sources", "packing", "quality", "estimate", "bigdl", "adapters", "training", "merging", "comparing", "data"}
    | {"engines.base"},
    "training": READING
    | {"training", "transformers", "qlora", "lowbit", "devices", "publish", "data", "prompts", "engines.base"}
    | {"tasks", "adapters", "sources.safetensors"},
    "adapters": READING | {"adapters", "publish", "lowbit.formats"},
    "qlora": {"qlora", "transformers", "lowbit", "devices", "training.recipe"},
    "merging": READING
    | {"merging", "adapters", "shards", "publish", "packing", "lowbit", "transformers", "qlora", "devices", "prompts"}
    | {"tasks", "sources", "bigdl.folders"},
    "comparing": READING
    | {"comparing", "adapters", "training", "quality", "data", "transformers", "qlora", "lowbit", "devices", "prompts"}
    | {"publish", "tasks", "engines"},
    "border": {"border", "words"},
    "wishes": READING | {"wishes", "lowbit.formats", "training.recipe", "comparing.order"},
    "tuning": READING | {"tuning", "wishes", "jobs", "data", "tasks.download"} | {"training.recipe", "training.order"},
    "operator": READING
    | {
        "disk",
        "removal",
        "operator",
        "tuning",
        "wishes",
        "engines",
        "jobs",
        "estimate",
        "probe",
        "quality",
        "publish",
        "lowbit.formats",
    }
    | {"tasks.download"},
    "commands": READING
    | {"commands", "engines", "prompts.trial", "devices", "hosting", "jobs", "estimate", "lowbit.formats"}
    | {"comparing", "adapters", "quality.table", "quality.kept", "probe", "training.recipe", "training.order", "data"},
    "hosting": {"hosting"},
    "hub": {"hub", "library", "screen", "publish"},
    "data": READING | {"disk", "data", "prompts", "engines.base", "publish"},
    "compat": {"lowbit", "transformers"},
    "chats": {"chats", "engines.base", "publish"},
}
"""Room of nibble -> what it may import from nibble; everything may use `config` and `errors`."""

TORCH_FREE = (
    "nibble", "nibble.config", "nibble.errors", "nibble.library", "nibble.checkpoint", "nibble.screen",
    "nibble.hosting", "nibble.chats", "nibble.publish", "nibble.prompts.trial",
    "nibble.engines.base", "nibble.engines.worker", "nibble.engines.host", "nibble.lowbit", "nibble.lowbit.formats",
    "nibble.jobs", "nibble.tasks", "nibble.tasks.download", "nibble.hub", "nibble.commands.download",
    "nibble.comparing.order", "nibble.comparing.page", "nibble.tasks.compare", "nibble.commands.compare",
    "nibble.data", "nibble.data.preview", "nibble.data.store", "nibble.data.glimpse",
    "nibble.training.recipe", "nibble.adapters", "nibble.training.checkpoints",
    "nibble.training.order", "nibble.tasks.finetune", "nibble.commands.finetune",
    "nibble.merging", "nibble.merging.base", "nibble.tasks.merge", "nibble.commands.merge",
    "nibble.engines.bigdl", "nibble.bigdl.folders", "nibble.bigdl.older_folder", "nibble.bigdl.convert",
    "nibble.compat", "nibble.operator",
    "nibble.quality", "nibble.quality.table", "nibble.tasks.evaluate", "nibble.commands.evaluate",
    "nibble.tasks.quantize", "nibble.commands.quantize", "nibble.sources",
    "nibble.estimate", "nibble.probe", "nibble.commands.models",
    "nibble.sources.gguf_header", "nibble.sources.gguf_families", "nibble.sources.gguf_tokenizer",
)  # fmt: skip


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, at any depth, by its full dotted name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: use absolute imports"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_layer(path: Path) -> None:
    layer = path.relative_to(ROOT).parts[0].removesuffix(".py")
    tops = {name.split(".")[0] for name in imported(path)}
    assert tops & MAY.keys() <= MAY[layer]
    assert layer not in ("nibble", "parts") or "gradio" not in tops
    assert layer == "nibble" or not tops & HEAVY


@pytest.mark.parametrize("room", INSIDE)
def test_room(room: str) -> None:
    base = ROOT / "nibble" / room
    files = sorted(base.rglob("*.py")) if base.is_dir() else [base.with_suffix(".py")]
    allowed = {f"nibble.{name}" for name in (*INSIDE[room], "config", "errors", "__version__")}
    for path in files:
        if not path.exists():
            continue
        for name in imported(path):
            ours = name == "nibble" or name.startswith("nibble.")
            assert not ours or any(name == a or name.startswith(a + ".") for a in allowed), f"{path} imports {name}"


@pytest.mark.parametrize("module", ["app", *TORCH_FREE])
def test_light_modules_leave_torch_alone(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({HEAVY} & sys.modules.keys()))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""


def test_no_dangerous_calls() -> None:
    """Nothing of ours evaluates text, unpickles, or goes through a shell."""
    banned = {"eval", "exec", "yaml.unsafe_load", "pickle.load", "pickle.loads", "torch.load", "os.system"}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                tensors_alone = any(ast.unparse(word) == "weights_only=True" for word in node.keywords)
                assert name not in banned or (name == "torch.load" and tensors_alone), f"{path}:{node.lineno}"
                shell = [word for word in node.keywords if word.arg == "shell"]
                assert not shell, f"{path}:{node.lineno}"
