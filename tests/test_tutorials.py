"""The tutorials' own code, on Nibble: every block that needs no Intel GPU, with the changes listed here and in docs.

A change that no longer applies to the text fails, so the list cannot rot.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[1]
QWEN, DSW, LLAMA = "002_81da94b65d1a74d5.txt", "001_d245c2772de7a4b0.txt", "000_a7649d58a68bc66e.txt"
QLORA = "004_001b690f632714e5.txt"


@dataclass(frozen=True)
class Change:
    """What stands in a tutorial, what to write now, and why."""

    was: str
    now: str
    why: str


DOWNLOAD = Change(
    "os.system('huggingface-cli download --resume-download qwen/Qwen-1_8B-Chat --local-dir qwen18chat_src')",
    "import shutil; shutil.copytree(MODEL, 'qwen18chat_src')",
    "`huggingface-cli` is gone: `hf download`. Qwen-1 has code of its own for transformers 4: another model",
)
CHATML = Change(
    '"<human>{prompt} <bot>"',
    r'"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"',
    "a mistake: this is Baichuan-13B's form, Qwen's is ChatML",
)
CHAT = Change(
    "    _, history = model.chat(tokenizer, text, history=history)\n",
    "    history = history + [{'role': 'user', 'content': text}]\n"
    "    ids = tokenizer.encode(QWEN_PROMPT_FORMAT.format(prompt=text), return_tensors='pt')\n"
    "    output = model.generate(ids, max_new_tokens=32)[0, ids.shape[1]:]\n"
    "    answer = tokenizer.decode(output, skip_special_tokens=True)\n"
    "    history = history + [{'role': 'assistant', 'content': answer}]\n",
    "`model.chat` is a method of Qwen-1's own code: template and `generate` instead",
)
PAIRS = [
    Change(was, now, "Gradio's chat holds messages, no longer pairs of texts")
    for was, now in (
        ("history[-1][1] = ", "history[-1]['content'] = "),
        ("history[-1][1] += ", "history[-1]['content'] += "),
        ("response =  history[-1][1]", "response = history[-1]['content'][0]['text']"),
    )
]
BUBBLE = Change("        bubble_full_width=False,\n", "", "`bubble_full_width` was removed from Gradio")
PRETENCE = Change(
    "        time.sleep(0.05)\n", "", "the answer is whole already: waiting 50 ms a character only pretends to stream"
)
LAUNCH = Change(
    "demo.launch()",
    "app, url, _ = demo.launch(prevent_thread_lock=True, quiet=True)\n"
    "from gradio_client import Client\n"
    "client = Client(url, verbose=False)\n"
    "history = client.predict([], '给我讲一个故事', api_name='/add_text')[0]\n"
    "steps = list(client.submit(history, api_name='/bot_response'))\n"
    "print('steps', len(steps)); assert len(steps) > 3; client.close(); demo.close()",
    "only here: a test drives the page, and ends it",
)
IMPORTS = Change(
    "model = ipex_llm.",
    "import ipex_llm.transformers\nfrom transformers import AutoTokenizer\nmodel_path = MODEL\nmodel = ipex_llm.",
    "imports and `model_path` are not in the text",
)
HUB = Change('"meta-llama/Llama-2-7b-chat-hf"', "MODEL", "a folder instead of a gated id")
XPU = [
    Change(".to('xpu')", "", "a CPU instead of an Intel GPU"),
    Change("LlamaTokenizer", "AutoTokenizer", "`AutoTokenizer` takes the tokenizer's class from the folder"),
]
LORA_IMPORTS = Change(
    "import intel_extension_for_pytorch as ipex\n",
    "import intel_extension_for_pytorch as ipex\nimport torch\n"
    "from bigdl.llm.transformers import AutoModelForCausalLM\n",
    "these two imports are not in the text",
)
BASE = Change('"meta-llama/Llama-2-7b-hf"', "MODEL", HUB.why)
HALF = Change("torch.float16", "torch.float32", "float16 is for GPUs: a CPU takes bfloat16 or float32")
QUOTES = Change(
    'from datasets import load_dataset\ndata = load_dataset("Abirate/english_quotes")\n'
    'data = data.map(lambda samples: tokenizer(samples["quote"]), batched=True)',
    "import json\nrows = [json.loads(line) for line in open(QUOTES, encoding='utf-8')]\n"
    'data = {"train": [tokenizer(row["quote"]) for row in rows]}',
    "the quotes that ship with Nibble, read without the library `datasets`",
)
TRAINING = [
    Change("        fp16=True,\n", "", "transformers refuses fp16 where there is no GPU"),
    Change('optim="adamw_hf"', 'optim="adamw_torch"', "`adamw_hf` was removed from transformers: torch's own AdamW"),
    *(
        Change(was, now, "only here: a test takes fewer steps")
        for was, now in (("max_steps=200", "max_steps=20"), ("save_steps=100", "save_steps=20"), ("t-200", "t-20"))
    ),
]
MERGING = [
    Change(
        "base_model = AutoModelForCausalLM.from_pretrained(\n        base_model,\n",
        "base_model = transformers.AutoModelForCausalLM.from_pretrained(\n        MODEL,\n",
        "`base_model` is used before it is defined; the base in full precision is transformers' own affair",
    ),
    Change(
        "output_path = ./outputs/checkpoint-20-merged", 'output_path = "./outputs/checkpoint-20-merged"',
        "a mistake: the path lacks its quotes",
    ),
]  # fmt: skip


@dataclass(frozen=True)
class Section:
    """Blocks of one tutorial that run one after the other in one process."""

    file: str
    blocks: tuple[int, ...]
    changes: tuple[Change, ...]
    typed: str = ""
    """What the person types."""
    says: tuple[str, ...] = ()
    """What must be printed, in this order."""
    leaves: tuple[str, ...] = ()
    """Files that must be there afterwards."""


SAVED = ("qwen18chat_int4/config.json", "qwen18chat_int4/model.safetensors", "qwen18chat_int4/tokenizer.json")
SECTIONS = {
    "QWEN: download, quantize, save, load, generate": Section(
        QWEN, (1, 2, 3), (DOWNLOAD, CHATML), says=("Inference time: ", "Prompt", "年轻人", "Output"), leaves=SAVED
    ),
    "QWEN: Gradio page": Section(
        QWEN, (1, 2, 4), (DOWNLOAD, CHATML, CHAT, *PAIRS, BUBBLE, PRETENCE, LAUNCH), says=("steps ",), leaves=SAVED
    ),
    "DSW: quantize and save": Section(
        DSW, (0, 1), (IMPORTS,), leaves=("qwen2chat_int4/nibble.json", "qwen2chat_int4/tokenizer.json")
    ),
    "L2: import, load, generate, streamed chat": Section(
        LLAMA, (0, 2, 3, 4, 5, 6, 7, 8), (HUB, *XPU), typed="What is AI?\nIs it dangerous?\nstop\n",
        says=("Output", "Stream Chat", "Input: ", "Response: ", "Input: ", "Response: ", "Input: ", "stopped."),
    ),
    # Blocks 4 and 5 change places: the text tokenizes the data before it loads the tokenizer.
    "QLORA: train, merge, load merged, generate": Section(
        QLORA, (0, 1, 2, 3, 5, 4, *range(6, 14)),
        (LORA_IMPORTS, BASE, HUB, *XPU, HALF, QUOTES, *TRAINING, *MERGING),
        says=("train_loss", "The paradox of time and eternity is"),
        leaves=("outputs/checkpoint-20/adapter_model.safetensors", "outputs/checkpoint-20-merged/model.safetensors"),
    ),
}  # fmt: skip


@pytest.fixture(scope="session")
def tutorials(shared_data: Path) -> Path:
    folder = shared_data.parent / "tutorials"
    if not folder.is_dir():
        pytest.skip("the tutorials are not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def model(request: pytest.FixtureRequest, stories: Path) -> Path:
    """The guide; stories260K while it is not trained."""
    guide = ROOT / "guide" / "model"
    return guide if (guide / "config.json").exists() else stories


def script_of(section: Section, tutorials: Path) -> str:
    text = (tutorials / section.file).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL) or re.findall(
        r"> ```python\n(.*?)> ```", text, re.DOTALL
    )
    script = "\n".join(re.sub(r"^> ?", "", blocks[number], flags=re.MULTILINE) for number in section.blocks)
    for change in section.changes:
        assert change.was in script, f"no longer in the tutorial: {change.was}"
        script = script.replace(change.was, change.now)
    return script


@pytest.mark.parametrize("name", SECTIONS)
def test_the_tutorial_runs(tutorials: Path, model: Path, tmp_path: Path, name: str) -> None:
    section = SECTIONS[name]
    script = tmp_path / "tutorial.py"
    quotes = ROOT / "guide" / "data" / "quotes.jsonl"
    prelude = f"from nibble import compat\ncompat.install()\nMODEL, QUOTES = {str(model)!r}, {str(quotes)!r}\n"
    script.write_text(prelude + script_of(section, tutorials), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "GRADIO_ANALYTICS_ENABLED": "False"}
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, input=section.typed, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rest = done.stdout
    for words in section.says:
        assert words in rest, f"{words!r} was not printed in its turn:\n{done.stdout}"
        rest = rest.partition(words)[2]
    for path in section.leaves:
        assert (tmp_path / path).is_file()


def test_every_change_stands_in_the_docs() -> None:
    page = (ROOT / "docs" / "tutorials.md").read_text(encoding="utf-8")
    for section in SECTIONS.values():
        for change in section.changes:
            assert change.why in page, change.why
