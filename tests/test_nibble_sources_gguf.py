"""GGUF files written with the `gguf` package: the same values, the same tokens, the same model."""

import json
import shutil
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from nibble import library
from nibble.errors import ModelError
from nibble.estimate import estimates
from nibble.lowbit.blocks import QuantizedTensor
from nibble.lowbit.blocks import quantize as quantize_here
from nibble.lowbit.ggml import Blocks
from nibble.lowbit.linear import LowBitLinear
from nibble.packing import Packing, pack, plan
from nibble.probe import unmeasured
from nibble.sources import gguf_tokenizer, open_source
from nibble.sources.gguf import OURS
from nibble.sources.gguf_families import shortest
from nibble.sources.gguf_header import read_header
from nibble.tasks import quantize
from nibble.transformers import AutoModelForCausalLM as LowBit
from tests.conftest import ROOT
from tests.support.ggufs import put, write_gguf, write_tokenizer
from tests.support.reports import SILENT

KINDS = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": None,
    "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a folder with a random model of a family."""

    def make(family: str, **changes: Any) -> Path:
        folder = tmp_path_factory.mktemp(family)
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **SIZES | changes)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, weight in model.named_parameters():
            # Norms and biases that are all alike would hide one that went to another place.
            torch.nn.init.normal_(weight, mean=1.0 if "norm" in name else 0.0, std=0.1)
        model.save_pretrained(folder)
        return folder

    return make


def vocabulary(count: int) -> Callable[[gguf.GGUFWriter], None]:
    """A tokenizer of so many letters, for models that need none."""

    def also(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        letters = [chr(ord("!") + number) for number in range(count - 1)]
        writer.add_token_list([*letters, "!!"])
        writer.add_token_merges(["! !"])

    return also


def dense(tensor: torch.Tensor | QuantizedTensor) -> torch.Tensor:
    return tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor


# --- tensors ----------------------------------------------------------------------------------------------------------


@given(
    kind=st.sampled_from(sorted(OURS)), rows=st.integers(1, 9), blocks=st.integers(1, 5), seed=st.integers(0, 2**32 - 1)
)
@settings(deadline=None, max_examples=100)
def test_blocks_are_ggmls_bit_for_bit(kind: Type, rows: int, blocks: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = (rng.standard_normal((rows, 32 * blocks)) * 10.0 ** rng.integers(-3, 4)).astype(np.float32)
    data = gguf.quants.quantize(values, kind)
    layout = Blocks(OURS[kind], 32)
    ours = layout.unpack(torch.from_numpy(data).view(rows, blocks, layout.nbytes), 32 * blocks)
    assert torch.equal(ours.dequantize(), torch.from_numpy(gguf.quants.dequantize(data, kind)))
    assert (ours.format.name, tuple(ours.shape)) == (OURS[kind], values.shape)


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_has_the_values_of_the_gguf_package(tiny: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    """Compared before the rows of q and k go back to their places, which qwen2's never left."""
    source = open_source(write_gguf(tiny("qwen2"), tmp_path / "model.gguf", kind, also=vocabulary(96)))
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    theirs = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    names = source.names  # type: ignore[attr-defined]
    assert sorted(names) == sorted(theirs)
    for name, values in theirs.items():
        stored = source.tensors[names[name]]
        read = stored.read()
        assert torch.equal(dense(read).float(), torch.from_numpy(values.copy())), name
        assert stored.shape == values.shape
        ours = OURS.get(Type[kind], "") if values.ndim == 2 and name != "token_embd.weight" else ""
        assert stored.low_bit == ours
        assert isinstance(read, QuantizedTensor) == bool(ours)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_model_is_the_one_that_was_written(
    tiny: Callable[..., Path], tmp_path: Path, family: str, tied: bool
) -> None:
    """In F32 and on the same arithmetic: every weight and every logit, bit for bit."""
    changes: dict[str, Any] = {"tie_word_embeddings": tied}
    if family == "qwen3":
        changes["head_dim"] = 32
    if family == "mistral":
        changes["sliding_window"] = None
    folder = tiny(family, **changes)
    # Mistral goes by the name of Llama there.
    written = as_llama(folder, tmp_path) if family == "mistral" else folder
    source = open_source(write_gguf(written, tmp_path / "model.gguf", also=vocabulary(96)))
    config = AutoConfig.for_model(**source.config)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    state = {name: dense(stored.read()) for name, stored in source.tensors.items()}
    lacks = model.load_state_dict(state, strict=False)
    assert not lacks.unexpected_keys
    assert set(lacks.missing_keys) <= ({"lm_head.weight"} if tied else set())
    ids = torch.arange(60).view(2, 30)
    with torch.inference_mode():
        original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
        assert torch.equal(model.eval()(ids).logits, original)


def as_llama(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder, tmp_path / "llama")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (tmp_path / "llama" / "config.json").write_text(json.dumps(config))
    return tmp_path / "llama"


def test_a_real_model_comes_back_whole(stories: Path, tmp_path: Path) -> None:
    """Grouped heads, tied embeddings, a matrix of 172 columns, and rows of q and k that were in pairs."""
    source = open_source(write_gguf(stories, tmp_path / "stories.gguf", tokenizer=(stories, "")))
    original = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32).state_dict()
    for name, stored in source.tensors.items():
        assert torch.equal(dense(stored.read()), original[name]), name
    assert source.config["rms_norm_eps"] == 1e-05
    assert source.config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert source.config["tie_word_embeddings"] is True


def test_what_no_block_fits_stays_dense_and_is_said_to_be(stories: Path, tmp_path: Path) -> None:
    source = open_source(write_gguf(stories, tmp_path / "stories.gguf", "Q4_0", (stories, "")))
    assert source.dense == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(5)}
    assert source.tensors["model.layers.0.mlp.down_proj.weight"].read().dtype == torch.float16  # type: ignore[union-attr]
    # The table is looked up, the head multiplied: one dense, one packed, of the same bytes.
    assert source.tensors["model.embed_tokens.weight"].low_bit == ""
    assert source.tensors["lm_head.weight"].low_bit == "sym_int4"
    assert torch.equal(
        dense(source.tensors["model.embed_tokens.weight"].read()), dense(source.tensors["lm_head.weight"].read())
    )


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3s_scaling_is_found_again(tiny: Callable[..., Path], tmp_path: Path, factor: float) -> None:
    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    folder = tiny("llama", rope_parameters=rope, max_position_embeddings=131072)
    scaled = AutoModelForCausalLM.from_pretrained(folder).model.rotary_emb.inv_freq
    plain = 1 / 500000.0 ** (torch.arange(0, 64, 2) / 64)

    def also(writer: gguf.GGUFWriter) -> None:
        vocabulary(96)(writer)
        writer.add_tensor("rope_freqs.weight", (plain / scaled).numpy())

    source = open_source(write_gguf(folder, tmp_path / "model.gguf", also=also))
    assert source.config["rope_parameters"] == rope

    def other(writer: gguf.GGUFWriter) -> None:
        vocabulary(96)(writer)
        writer.add_tensor("rope_freqs.weight", np.linspace(1, 8, 32, dtype=np.float32))

    with pytest.raises(ModelError, match="rotary factors"):
        open_source(write_gguf(folder, tmp_path / "other.gguf", also=other))


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_a_stretched_context_is_kept(tiny: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    def also(writer: gguf.GGUFWriter) -> None:
        vocabulary(96)(writer)
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(32)

    rope = open_source(write_gguf(tiny("qwen2"), tmp_path / "m.gguf", also=also)).config["rope_parameters"]
    assert (rope["rope_type"], rope["factor"]) == (kind, 4.0)
    assert rope.get("original_max_position_embeddings") == (32 if kind == "yarn" else None)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_the_shortest_decimal_is_the_same_number(value: float) -> None:
    short = shortest(value)
    assert np.float32(short) == np.float32(value)
    assert len(repr(short)) <= len(repr(value))


# --- tokenizers -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(shared_data: Path) -> list[str]:
    """200 texts: stories, and what tokenizers stumble over."""
    stories = json.loads((shared_data / "sets" / "tinystories-1000" / "tinystories_1000.json").read_text())
    wiki = (shared_data / "sets" / "wikitext2-test" / "wiki.test.joined.txt").read_text().splitlines()
    odd = [
        "", " ", "  two  spaces ", "\n\n", "\ttab", "it's I'LL we’re", "3.14159 1234567890", "内存不够怎么办？",
        "emoji 👩‍👩‍👧‍👦 ", "e\u0301 é", "naïve café ﬁ", "a\r\nb", "def f(x):\n    return x ** 2\n", "<s> </s> <unk>",
        "<|im_start|>user\nHi<|im_end|>\n", "<|endoftext|>", "\u0000\u0001", "हिन्दी العربية עברית", "▁▁", " <s>",
        "<0x0A>",
    ]  # fmt: skip
    return [*odd, *stories[:90], *[line for line in wiki if line.strip()][: 200 - 90 - len(odd)]]


@pytest.mark.parametrize("where", ["tokenizers/llama2", "models/stories260K-hf"])
def test_sentencepieces_token_ids(shared_data: Path, tmp_path: Path, texts: list[str], where: str) -> None:
    """Against SentencePiece itself and the folder's tokenizer.json.

    Not against transformers' LlamaTokenizer, which drops a space at the start of a text that both of these keep.
    """
    from sentencepiece import SentencePieceProcessor

    folder = shared_data / where
    pieces, original = (
        SentencePieceProcessor(str(folder / "tokenizer.model")),
        Tokenizer.from_file(str(folder / "tokenizer.json")),
    )
    ours = rebuilt(folder, "", tmp_path)
    for text in (text for text in texts if "<s>" not in text):
        ids = ours(text).input_ids
        assert ids == [pieces.bos_id(), *pieces.encode(text)] == original.encode(text).ids, text
        assert ours.decode(ids) == original.decode(ids, skip_special_tokens=False), text
        assert ours.decode(ids, skip_special_tokens=True) == pieces.decode(ids[1:]), text
    assert ours("<s>a</s>").input_ids == [1, 1, *pieces.encode("a"), 2]
    assert (ours.bos_token, ours.eos_token, ours.unk_token) == ("<s>", "</s>", "<unk>")


def test_byte_pairs_token_ids(shared_data: Path, tmp_path: Path, texts: list[str]) -> None:
    folder = shared_data / "tokenizers" / "qwen2.5"
    original, ours = AutoTokenizer.from_pretrained(folder), rebuilt(folder, "qwen2", tmp_path)
    assert len(texts) == 200
    for text in texts:
        ids = original(text).input_ids
        assert ours(text).input_ids == ids, text
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == original.decode(ids, skip_special_tokens=skip), text
    for name in ("bos_token", "eos_token", "pad_token", "chat_template"):
        assert getattr(ours, name) == getattr(original, name), name
    messages = [{"role": "user", "content": "Hi"}]
    assert ours.apply_chat_template(messages) == original.apply_chat_template(messages)


def rebuilt(folder: Path, pre: str, tmp_path: Path) -> Any:
    """The tokenizer of a folder, through a GGUF file."""
    writer = gguf.GGUFWriter(tmp_path / "tokenizer.gguf", "llama")
    write_tokenizer(writer, folder, pre)
    put(writer, "token_embd.weight", np.zeros((4, 32), np.float32), "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tmp_path / "rebuilt").mkdir()
    gguf_tokenizer.write(read_header(tmp_path / "tokenizer.gguf"), tmp_path / "rebuilt")
    return AutoTokenizer.from_pretrained(tmp_path / "rebuilt")


def test_a_tokenizer_that_the_file_does_not_tell_is_taken_from_beside_it(guide_model: Path, tmp_path: Path) -> None:
    write_gguf(guide_model, tmp_path / "guide.gguf", tokenizer=(guide_model, "guide"))
    with pytest.raises(ModelError, match="tokenizer.json and tokenizer_config.json beside the file"):
        open_source(tmp_path / "guide.gguf")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(guide_model / name, tmp_path)
    (tmp_path / "out").mkdir()
    open_source(tmp_path).copy_files(tmp_path / "out")
    same_tokenizer(tmp_path / "out", guide_model)


def test_a_file_may_hold_a_whole_tokenizer(guide_model: Path, tmp_path: Path) -> None:
    guide_gguf(guide_model, tmp_path / "guide.gguf", "Q8_0")
    (tmp_path / "out").mkdir()
    open_source(tmp_path).copy_files(tmp_path / "out")
    same_tokenizer(tmp_path / "out", guide_model)


def test_a_whole_tokenizer_that_is_none_is_refused(stories: Path, tmp_path: Path) -> None:
    def also(writer: gguf.GGUFWriter) -> None:
        writer.add_string("tokenizer.huggingface.json", '{"model": {"type": "Nonsense"}}')

    source = open_source(write_gguf(stories, tmp_path / "stories.gguf", tokenizer=(stories, ""), also=also))
    with pytest.raises(ModelError, match="tokenizer.huggingface.json is none"):
        source.copy_files(tmp_path)


def same_tokenizer(folder: Path, original: Path) -> None:
    ours, theirs = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(original)
    messages = [{"role": "user", "content": "内存不够怎么办？ What is nf4?"}]
    assert ours.apply_chat_template(messages) == theirs.apply_chat_template(messages)
    assert (ours.eos_token_id, ours.pad_token_id) == (theirs.eos_token_id, theirs.pad_token_id)


# --- whole models -----------------------------------------------------------------------------------------------------


def guide_gguf(guide_model: Path, path: Path, kind: str) -> Path:
    """The guide as one file that holds all it needs."""
    text = (guide_model / "tokenizer.json").read_text(encoding="utf-8")
    return write_gguf(
        guide_model, path, kind, (guide_model, "guide"),
        lambda writer: writer.add_string("tokenizer.huggingface.json", text),
    )  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), [("Q4_0", "sym_int4"), ("Q5_1", "asym_int5")])
def test_the_guide_comes_back_as_if_packed_here(guide_model: Path, tmp_path: Path, kind: str, name: str) -> None:
    """Matrices packed by the `gguf` package, the table left as it was: the very folder that packing the guide makes."""
    there, here = both(guide_model, tmp_path, kind, name)
    tensors = load_file(there / "model.safetensors")
    expected = load_file(here / "model.safetensors")
    assert tensors.keys() == expected.keys()
    for tensor, values in expected.items():
        assert torch.equal(tensors[tensor], values), tensor
    same_tokenizer(there, here)


@pytest.mark.full
def test_the_guide_answers_alike(guide_model: Path, tmp_path: Path) -> None:
    there, here = both(guide_model, tmp_path, "Q4_0", "sym_int4")
    for question in ("What is nf4?", "内存不够怎么办？", "Which port does the page use?"):
        messages = [{"role": "user", "content": question}]
        assert answer(there, messages) == answer(here, messages) != ""


def both(guide_model: Path, tmp_path: Path, kind: str, name: str) -> tuple[Path, Path]:
    """The guide through a file of the `gguf` package, and packed here."""
    file = guide_gguf(guide_model, tmp_path / "guide.gguf", f"{kind}/BF16")
    for source, folder in ((file, "there"), (guide_model, "here")):
        pack(open_source(source), {tmp_path / folder: Packing(name)}, SILENT)
    return tmp_path / "there", tmp_path / "here"


def answer(folder: Path, messages: list[dict[str, str]]) -> str:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), LowBit.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    made = model.generate(**ids, max_new_tokens=24, do_sample=False)
    return str(tokenizer.decode(made[0]))


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q4_K"])
def test_without_a_format_a_file_keeps_what_it_has(tiny: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    folder = tiny("llama", tie_word_embeddings=True)
    file = write_gguf(folder, tmp_path / "tiny.gguf", kind, also=vocabulary(96))
    spec = {"model": str(file), "home": str(tmp_path), "paths": True, "evaluate": False}
    [made] = quantize.run(spec, SILENT)["models"]
    name = {"Q4_0": "sym_int4", "Q8_0": "sym_int8", "Q4_K": "sym_int4"}[kind]
    assert (made["name"], made["format"]) == (f"tiny-{name}", name)
    model = LowBit.from_pretrained(made["folder"])
    source = open_source(file)
    for path, layer in model.named_modules():
        if isinstance(layer, LowBitLinear):
            values = dense(source.tensors.get(f"{path}.weight", source.tensors["model.embed_tokens.weight"]).read())
            if kind == "Q4_K":
                values = quantize_here(values, layer.format.name).dequantize()
            assert torch.equal(layer.dequantize(torch.float32), values), path
    assert isinstance(model.lm_head, LowBitLinear)


@pytest.mark.full
def test_the_console_takes_a_file(stories: Path, tmp_path: Path) -> None:
    file = write_gguf(stories, tmp_path / "stories.gguf", "Q8_0", (stories, ""))
    command = [sys.executable, "-m", "nibble", "quantize", str(file), "--low-bit", "sym_int4", "--no-report", "--json"]
    run = subprocess.run([*command, "--home", str(tmp_path / "home")], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    [made] = json.loads(run.stdout)["models"]
    assert (made["name"], made["format"]) == ("stories-sym_int4", "sym_int4")
    assert AutoTokenizer.from_pretrained(made["folder"])("Once").input_ids[0] == 1


# --- broken and hostile files -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file that is right, of a model with 16 columns."""
    folder = tiny("llama", hidden_size=32, intermediate_size=32, num_hidden_layers=1, vocab_size=24)
    path = tmp_path_factory.mktemp("small") / "small.gguf"

    def also(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list([chr(0x4E00 + number) for number in range(24)])
        writer.add_token_scores([-float(number) for number in range(24)])
        writer.add_token_types([1] * 24)
        writer.add_chat_template("{{ messages }}")

    return write_gguf(folder, path, "Q4_0", also=also).read_bytes()


def refusal(data: bytes, folder: Path) -> str:
    """What is said about a file; empty where nothing is wrong with it."""
    path = folder / "bad.gguf"
    path.write_bytes(data)
    try:
        source = open_source(path)
        plan(source, Packing("sym_int4"))
        for stored in source.tensors.values():
            stored.read()
        (folder / "out").mkdir(exist_ok=True)
        source.copy_files(folder / "out")
    except ModelError as error:
        assert len(str(error)) < 400
        return str(error)
    return ""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bad")


@given(share=st.floats(0, 1, exclude_max=True))
@settings(deadline=None, max_examples=150)
def test_a_file_that_is_cut_is_refused(small: bytes, place: Path, share: float) -> None:
    # Only the last tensor's padding may be missing.
    cut = small[: int(share * (len(small) - 32))]
    assert refusal(cut, place)


@given(changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4))
@settings(deadline=None, max_examples=300)
def test_a_damaged_header_is_a_sentence_or_nothing(small: bytes, place: Path, changes: list[tuple[float, int]]) -> None:
    """No other exception, whatever byte is changed."""
    data = bytearray(small)
    front = small.index(b"output_norm.weight") + 200
    for where, byte in changes:
        data[int(where * front)] = byte
    refusal(bytes(data), place)


HUGE = struct.pack("<Q", 2**62)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: b"GGML" + data[4:], "is no GGUF file"),
        (lambda data: b"", "is broken"),
        (lambda data: data[:4] + struct.pack("<I", 1) + data[8:], "version 1"),
        (lambda data: data[:4] + struct.pack(">I", 3) + data[8:], "big-endian"),
        (lambda data: data[:8] + HUGE + data[16:], "it counts 4,611,686,018,427,387,904 tensors"),
        (lambda data: data[:16] + HUGE + data[24:], "pairs of metadata"),
        (lambda data: data[:24] + HUGE + data[32:], "cut short, malformed"),
        (lambda data: replaced(data, b"tokenizer.ggml.tokens", 8, HUGE), "cut short, malformed"),
        (lambda data: data.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0bloom", 1), "architecture 'bloom'"),
        (lambda data: data.replace(b"blk.0.ffn_up.weight", b"blk.0.ffn_ab.weight"), "holds blk.0.ffn_ab.weight"),
        (lambda data: data.replace(b"blk.0.ffn_up.weight", b"blk.0.ffn_down.bias"), ""),
        (lambda data: data.replace(b"blk.0.attn_q.weight", b"blk.0.attn_k.weight"), "holds blk.0.attn_k.weight twice"),
        (lambda data: typed(data, b"blk.0.ffn_up.weight", 24), "stored in I8"),
        (lambda data: sized(data, b"llama.block_count", 2**30), "blk.1073741823.attn_norm.weight is missing"),
        (lambda data: sized(data, b"llama.embedding_length", 2**30), "token_embd.weight is missing, or does not fit"),
        (lambda data: sized(data, b"llama.attention.head_count", 2**30), "blk.0.attn_q.weight is missing, or does not"),
        (lambda data: data.replace(b"{{ messages }}", b"{{ x.__a__ }} "), "chat template"),
        (lambda data: typed(data, b"blk.0.ffn_up.weight", 999), "not known here (999)"),
        (lambda data: typed(data, b"blk.0.ffn_up.weight", 14), "which Q6_K cannot have"),
    ],
)
def test_what_is_wrong_is_named(small: bytes, tmp_path: Path, change: Callable[[bytes], bytes], words: str) -> None:
    assert words in refusal(change(small), tmp_path)


def replaced(data: bytes, key: bytes, after: int, value: bytes) -> bytes:
    """The bytes that begin so many after a key's end, replaced."""
    at = data.index(key) + len(key) + after
    return data[:at] + value + data[at + len(value) :]


def sized(data: bytes, key: bytes, value: int) -> bytes:
    """A number of the metadata changed: it stands behind its key and its type."""
    at = data.index(key) + len(key) + 4
    return data[:at] + struct.pack("<I", value) + data[at + 4 :]


def typed(data: bytes, name: bytes, kind: int) -> bytes:
    """The type of a tensor changed: it stands behind its name, the number of dimensions and two of them."""
    at = data.index(name) + len(name) + 4 + 16
    return data[:at] + struct.pack("<I", kind) + data[at + 4 :]


def test_a_gigabyte_of_empty_words_is_refused_without_reading_it(tmp_path: Path) -> None:
    """The file is sparse: it takes no room. What is read of it is bounded, so is what is made of it."""
    key = b"tokenizer.ggml.tokens"
    front = b"GGUF" + struct.pack("<IQQQ", 3, 1, 1, len(key)) + key + struct.pack("<IIQ", 9, 8, 2**27)
    with (tmp_path / "empty.gguf").open("wb") as stream:
        stream.write(front)
        stream.truncate(2**30 + len(front))
    tracemalloc.start()
    with pytest.raises(ModelError, match="far too long"):
        open_source(tmp_path / "empty.gguf")
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_a_piece_of_a_model_says_how_to_merge(tiny: Callable[..., Path], tmp_path: Path) -> None:
    def also(writer: gguf.GGUFWriter) -> None:
        vocabulary(96)(writer)
        writer.add_uint16("split.count", 2)

    with pytest.raises(ModelError, match="one piece of 2"):
        open_source(write_gguf(tiny("qwen2"), tmp_path / "model.gguf", also=also))


def test_a_config_that_lies_beside_the_file_is_let_lie(tiny: Callable[..., Path], tmp_path: Path, home: Path) -> None:
    """As in many a hub's GGUF repository: the file speaks for itself, and is listed as what it is."""
    source = tiny("qwen2")
    folder = home / "models" / "both"
    folder.mkdir(parents=True)
    write_gguf(source, folder / "model.gguf", also=vocabulary(96))
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    card = next(card for card in library.models(home) if card.name == "both")
    assert (card.kind, card.format, card.problem) == ("source", "gguf", "")
    assert estimates(folder, unmeasured())
    assert open_source(folder).tensors.keys() == open_source(folder / "model.gguf").tensors.keys()
