"""Folders in the form of transformers 4.37: what is written, and that the real 4.37 reads the same model from it."""

import json
import subprocess
from pathlib import Path

import pytest

from nibble.bigdl.older_folder import older_config, older_copy, older_tokenizer, older_tokenizer_config
from nibble.errors import ModelError

pytestmark = pytest.mark.full

TEXTS = [
    "Once upon a time, there was", "  two  spaces and\ttab\n\nnew lines ", "给我讲一个年轻人奋斗创业最终取得成功的故事",
    "emoji 👩‍👩‍👧 kana カタカナ", "def f(x):\n    return x**2  # ok", "",
]  # fmt: skip


def test_rope_and_dtype_take_their_older_names() -> None:
    new = {"model_type": "qwen2", "dtype": "bfloat16", "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}
    assert older_config(new) == {"model_type": "qwen2", "torch_dtype": "bfloat16", "rope_theta": 1e6}


def test_an_older_config_stays_as_it_is() -> None:
    old = {"model_type": "llama", "torch_dtype": "float16", "rope_theta": 5e5}
    assert older_config(old) == old


@pytest.mark.parametrize("kind", ["linear", "dynamic"])
def test_scalings_that_4_37_computes_are_kept(kind: str) -> None:
    config = older_config({"rope_parameters": {"rope_theta": 1e4, "rope_type": kind, "factor": 4}})
    assert config == {"rope_theta": 1e4, "rope_scaling": {"type": kind, "factor": 4.0}}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0},
        {"full_attention": {"rope_theta": 1e6, "rope_type": "default"}, "sliding_attention": {"rope_theta": 1e4}},
    ],
)
def test_scalings_that_would_be_lost_are_refused(rope: dict) -> None:
    with pytest.raises(ModelError, match=r"M .*4\.37"):
        older_config({"rope_parameters": rope}, "M")


def test_the_template_moves_into_the_tokenizer_config() -> None:
    new = {
        "backend": "tokenizers",
        "tokenizer_class": "Qwen2Tokenizer",
        "extra_special_tokens": ["<a>"],
        "unk_token": None,
    }
    assert older_tokenizer_config(new, "{{ messages }}") == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<a>"],
        "chat_template": "{{ messages }}",
        "clean_up_tokenization_spaces": False,
    }


def test_a_merge_with_a_space_is_refused() -> None:
    with pytest.raises(ModelError, match="spaces"):
        older_tokenizer({"model": {"type": "BPE", "merges": [["a ", "b"]]}})


def test_a_file_that_is_no_tokenizer_is_refused() -> None:
    with pytest.raises(ModelError, match="no tokenizer"):
        older_tokenizer({"version": "1.0"})


def test_the_copy_links_weights_and_leaves_the_original_alone(stories: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in stories.iterdir()}
    copy = older_copy(stories, tmp_path)
    assert (copy / "model.safetensors").is_symlink()
    assert isinstance(json.loads((copy / "tokenizer.json").read_text())["model"]["merges"][0], str)
    assert {path.name: path.read_bytes() for path in stories.iterdir()} == before


# --- against the real library ---------------------------------------------------------------------------------------

LOGITS = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], torch_dtype=torch.float32)
with torch.inference_mode():
    print(json.dumps(model(torch.arange(3, 67)[None]).logits[0, -1].tolist()))
"""

IDS = """
import json, sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = [tokenizer(text)["input_ids"] for text in json.load(sys.stdin)]
print(json.dumps([ids, [tokenizer.decode(row) for row in ids], bool(tokenizer.chat_template)]))
"""


def run_there(python: Path, code: str, folder: Path, given: str = "") -> list:
    """What a script prints, as JSON, when the other environment's Python runs it on a folder."""
    done = subprocess.run([python, "-W", "ignore", "-c", code, folder], input=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Qwen2 with random weights and a RoPE base that is not 4.37's default, saved by transformers 5."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, rope_parameters={"rope_theta": 3e5, "rope_type": "default"},
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("qwen")
    Qwen2ForCausalLM(config).float().save_pretrained(folder)
    return folder


def test_logits_are_those_of_transformers_5(bigdl_python: Path, qwen: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.inference_mode():
        here = AutoModelForCausalLM.from_pretrained(qwen, dtype="float32")(torch.arange(3, 67)[None]).logits[0, -1]
    there = torch.tensor(run_there(bigdl_python, LOGITS, older_copy(qwen, tmp_path)))
    assert torch.allclose(here, there, atol=1e-5)
    # Without the copy 4.37 takes its own base, in silence: what the copy is for.
    assert not torch.allclose(here, torch.tensor(run_there(bigdl_python, LOGITS, qwen)), atol=1e-3)


@pytest.mark.parametrize("name", ["qwen2.5", "llama2"])
def test_token_ids_are_those_of_transformers_5(
    bigdl_python: Path, shared_data: Path, tmp_path: Path, name: str
) -> None:
    from transformers import AutoTokenizer

    new, old = tmp_path / "new", tmp_path / "old"
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / name)
    tokenizer.save_pretrained(new)
    (new / "config.json").write_text('{"model_type": "llama"}')
    old.mkdir()
    tokenizer = AutoTokenizer.from_pretrained(new)
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    there = run_there(bigdl_python, IDS, older_copy(new, old), json.dumps(TEXTS))
    assert there == [ids, [tokenizer.decode(row) for row in ids], bool(tokenizer.chat_template)]
