"""Models in low bit, through the API that BigDL-LLM and IPEX-LLM had."""

import errno
import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from nibble import publish
from nibble.errors import FormatError, ModelError
from nibble.lowbit import FORMATS, LowBitLinear, attention, kernel_name, prepare, quantize
from nibble.transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    count_parameters,
    save_low_bit,
)

PACKED = [name for name, row in FORMATS.items() if row.quantized]


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Qwen2 with tied embeddings, biases, and sizes that are no whole blocks; saved in float32."""
    folder = tmp_path_factory.mktemp("tied")
    config = transformers.Qwen2Config(
        vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=256,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data.mul_(4)
    model.save_pretrained(folder)
    return folder


def greedy(model: nn.Module, length: int = 24) -> list[int]:
    ids = torch.tensor([[1, 5, 9, 2, 7]])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False, pad_token_id=0
    )
    return out[0].tolist()


def packed_layers(model: nn.Module) -> dict[str, LowBitLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LowBitLinear)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PACKED)
def test_a_saved_model_says_the_same(stories: Path, tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_pretrained(stories, load_in_low_bit=name, dtype=dtype)
    before = greedy(model)
    model.save_low_bit(tmp_path / "m")
    assert greedy(model) == before
    ours = AutoModelForCausalLM.load_low_bit(tmp_path / "m")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert greedy(ours) == greedy(plain) == before
    assert ours.dtype == dtype
    assert {key: value.dtype for key, value in ours.state_dict().items()} == {
        key: value.dtype for key, value in model.state_dict().items()
    }
    for key, value in model.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[key])


def test_the_guide_says_the_same_after_saving(guide_model: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(guide_model, load_in_4bit=True, dtype=torch.float32)
    model.save_low_bit(tmp_path / "m")
    assert greedy(AutoModelForCausalLM.load_low_bit(tmp_path / "m")) == greedy(model)


@pytest.mark.parametrize("name", PACKED)
def test_every_weight_is_the_quantized_original(tied: Path, name: str) -> None:
    dense = transformers.AutoModelForCausalLM.from_pretrained(tied, dtype=torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(tied, load_in_low_bit=name, dtype=dtype)
        layers = packed_layers(model)
        assert len(layers) == 2 * 7 + 1
        for path, layer in layers.items():
            # From the precision of the file, whatever the model computes in.
            expected = quantize(dense.get_submodule(path).weight, name).dequantize()
            assert torch.equal(layer.dequantize(), expected)
        assert torch.equal(model.model.embed_tokens.weight, dense.model.embed_tokens.weight.to(dtype))
        assert count_parameters(model) == dense.num_parameters()


def test_logits_are_those_of_the_dequantized_model(tied: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tied, load_in_4bit=True, dtype="float32")
    dense = transformers.AutoModelForCausalLM.from_pretrained(tied, dtype=torch.float32, tie_word_embeddings=False)
    for path, layer in packed_layers(model).items():
        dense.get_submodule(path).weight.data = layer.dequantize()
    ids = torch.tensor([[3, 1, 4, 1, 5, 9]])
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, dense(ids).logits, atol=1e-4)
    back = model.dequantize()
    assert not packed_layers(back)
    assert greedy(back) == greedy(dense)


def test_a_tied_head_stays_right(tied: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tied, load_in_low_bit="asym_int5")
    model.save_low_bit(tmp_path / "m")
    for again in (AutoModelForCausalLM.load_low_bit(tmp_path / "m"),
                  transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")):  # fmt: skip
        assert isinstance(again.lm_head, LowBitLinear)
        assert torch.equal(again.lm_head.dequantize(), model.lm_head.dequantize())
        assert torch.equal(again.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert count_parameters(AutoModelForCausalLM.load_low_bit(tmp_path / "m")) == count_parameters(model)


def test_modules_to_not_convert_stay_as_they_are(tied: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        tied, load_in_4bit=True, modules_to_not_convert=["lm_head", "layers.1", "k_proj"]
    )
    left = set(packed_layers(model))
    assert left == {f"model.layers.0.{name}" for name in (
        "self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"
    )}  # fmt: skip
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_low_bit(tmp_path / "m")
    again = AutoModelForCausalLM.load_low_bit(tmp_path / "m")
    assert set(packed_layers(again)) == left
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert greedy(again) == greedy(model)


def test_a_name_that_matches_nothing_is_told(tied: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        AutoModelForCausalLM.from_pretrained(tied, load_in_4bit=True, modules_to_not_convert=["lm_haed"])
    assert "lm_haed" in caplog.text


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_plain_formats_pack_nothing(tied: Path, tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_pretrained(tied, load_in_low_bit=name)
    assert not packed_layers(model)
    assert model.dtype == dtype
    with pytest.raises(ModelError, match="not a low-bit model"):
        model.save_low_bit(tmp_path / "m")


def test_arguments_of_ipex_llm_are_accepted(tied: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        str(tied), load_in_low_bit="sym_int8", optimize_model=True, torch_dtype=torch.float32, trust_remote_code=False,
        use_cache=True, cpu_embedding=True, low_cpu_mem_usage=True,
    )  # fmt: skip
    assert model.dtype == torch.float32
    assert AutoModelForCausalLM.from_pretrained(tied, load_in_4bit=True, torch_dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "fp4"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "int4"}, "sym_int4"),
        ({"load_in_8bit": True}, "sym_int8"),
    ],
)
def test_a_config_of_bitsandbytes_is_taken_for_the_nearest(tied: Path, arguments: dict, name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        tied, quantization_config={**arguments, "quant_method": "bitsandbytes"}
    )
    assert {layer.format.name for layer in packed_layers(model).values()} == {name}
    pytest.importorskip("bitsandbytes")
    config = transformers.BitsAndBytesConfig(**arguments, llm_int8_skip_modules=["lm_head"])
    model = AutoModelForCausalLM.from_pretrained(tied, quantization_config=config)
    assert {layer.format.name for layer in packed_layers(model).values()} == {name}
    assert type(model.lm_head) is nn.Linear


def test_the_three_sentences_of_ipex_llm(tied: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="load_in_4bit.*load_in_low_bit"):
        AutoModelForCausalLM.from_pretrained(tied)
    with pytest.raises(ModelError, match="not a low-bit model"):
        AutoModelForCausalLM.load_low_bit(tied)
    AutoModelForCausalLM.from_pretrained(tied, load_in_4bit=True).save_low_bit(tmp_path / "m")
    with pytest.raises(ModelError, match="Please use load_low_bit"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "m", load_in_low_bit="nf4")
    assert packed_layers(AutoModelForCausalLM.from_pretrained(tmp_path / "m", load_in_4bit=True))


def test_what_cannot_be_loaded_is_a_sentence(tied: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="sym_int4"):
        AutoModelForCausalLM.from_pretrained(tied, load_in_low_bit="sym_int3")
    with pytest.raises(ModelError, match="float17"):
        AutoModelForCausalLM.from_pretrained(tied, load_in_4bit=True, dtype="float17")
    with pytest.raises(ModelError):
        AutoModelForCausalLM.from_pretrained(tmp_path / "nowhere", load_in_4bit=True)
    foreign = tmp_path / "gptq"
    shutil.copytree(tied, foreign)
    config = json.loads((foreign / "config.json").read_text())
    (foreign / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ModelError, match="gptq"):
        AutoModelForCausalLM.from_pretrained(foreign, load_in_4bit=True)
    (foreign / "config.json").write_text(json.dumps({**config, "bigdl_transformers_low_bit": "sym_int4"}))
    with pytest.raises(ModelError, match="IPEX-LLM"):
        AutoModelForCausalLM.load_low_bit(foreign)


@pytest.mark.parametrize("stage", ["dense", "packed"])
def test_a_weight_missing_from_the_files_is_an_error(tied: Path, tmp_path: Path, stage: str) -> None:
    broken = tmp_path / "broken"
    if stage == "dense":
        shutil.copytree(tied, broken)
    else:
        AutoModelForCausalLM.from_pretrained(tied, load_in_4bit=True).save_low_bit(broken)
        (broken / publish.MANIFEST).unlink()
    tensors = load_file(broken / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj"):
        AutoModelForCausalLM.from_pretrained(broken, load_in_4bit=True)


def test_a_weight_that_is_not_finite_is_an_error(tied: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tied, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.up_proj\.weight of broken .* NaN"):
        AutoModelForCausalLM.from_pretrained(broken, load_in_4bit=True)


@pytest.mark.parametrize("name", PACKED)
def test_without_the_plug_in_a_packed_folder_does_not_load(tied: Path, tmp_path: Path, name: str) -> None:
    AutoModelForCausalLM.from_pretrained(tied, load_in_low_bit=name).save_low_bit(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "unheard_of"
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")


def test_a_saved_folder_is_complete(stories: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    model = AutoModelForCausalLM.from_pretrained(stories, load_in_low_bit="nf4")
    model.save_low_bit(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer("Once upon a time") == transformers.AutoTokenizer.from_pretrained(stories)("Once upon a time")
    assert transformers.GenerationConfig.from_pretrained(folder).eos_token_id == model.generation_config.eos_token_id
    manifest = publish.read_manifest(folder)
    assert manifest["format"] == "nf4"
    assert manifest["parameters"] == 260_032
    assert manifest["source"] == "stories260K-hf"
    assert set(manifest["versions"]) == {"nibble", "torch", "transformers"}
    assert set(manifest["files"]) == {path.name for path in folder.iterdir()} - {publish.MANIFEST}
    publish.verify(folder, contents=True)
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "nibble"
    assert attention.NAME not in config.values()
    again = AutoModelForCausalLM.load_low_bit(folder)
    again.save_low_bit(tmp_path / "again")
    assert publish.read_manifest(tmp_path / "again")["source"] == "stories260K-hf"
    assert (tmp_path / "again" / "tokenizer.json").exists()


def test_saving_over_the_folder_it_was_loaded_from(stories: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    AutoModelForCausalLM.from_pretrained(stories, load_in_4bit=True, dtype=torch.float32).save_low_bit(folder)
    model = AutoModelForCausalLM.load_low_bit(folder)
    before = greedy(model)
    model.save_low_bit(folder)
    assert greedy(model) == before
    assert greedy(AutoModelForCausalLM.load_low_bit(folder)) == before


def test_a_model_lives_on_when_its_files_are_cut(stories: Path, tmp_path: Path) -> None:
    for folder, arguments in ((tmp_path / "dense", {"load_in_4bit": True}), (tmp_path / "packed", {})):
        if arguments:
            shutil.copytree(stories, folder)
            (folder / "model.safetensors").chmod(0o644)
        else:
            AutoModelForCausalLM.from_pretrained(stories, load_in_4bit=True).save_low_bit(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, **arguments)
        before = greedy(model)
        os.truncate(folder / "model.safetensors", 0)
        assert greedy(model) == before


def test_a_full_disk_leaves_the_old_model(stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "m"
    AutoModelForCausalLM.from_pretrained(stories, load_in_low_bit="sym_int8").save_low_bit(folder)
    model = AutoModelForCausalLM.from_pretrained(stories, load_in_4bit=True)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    for owner, name in ((model, "save_pretrained"), (shutil, "copyfile"), (os, "fsync")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            with pytest.raises(OSError, match="no space"):
                model.save_low_bit(folder)
        assert publish.read_manifest(folder)["format"] == "sym_int8"
        publish.verify(folder, contents=True)
        assert sorted(path.name for path in tmp_path.iterdir()) == [".m.lock", "m"]


def test_attention_is_chosen_unless_the_caller_chose(tied: Path) -> None:
    assert AutoModelForCausalLM.from_pretrained(tied, load_in_4bit=True).config._attn_implementation == attention.NAME
    eager = AutoModelForCausalLM.from_pretrained(tied, load_in_4bit=True, attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"


def test_one_token_steps_take_our_attention(tied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(tied, load_in_4bit=True)
    lengths = []
    real = attention.sdpa_attention_forward
    monkeypatch.setattr(
        attention, "sdpa_attention_forward",
        lambda module, query, *rest, **more: lengths.append(query.shape[2]) or real(module, query, *rest, **more),
    )  # fmt: skip
    greedy(model, 8)
    assert lengths
    assert 1 not in lengths


def test_a_seq2seq_model_with_shared_embeddings(tmp_path: Path) -> None:
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, tie_word_embeddings=True,
        decoder_start_token_id=0, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path / "t5")
    dense = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "t5")
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "t5", load_in_low_bit="sym_int8", dtype="float32")
    model.save_low_bit(tmp_path / "m")
    again = AutoModelForSeq2SeqLM.load_low_bit(tmp_path / "m")
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    for low in (model, again):
        out = low(input_ids=ids, decoder_input_ids=ids).logits
        expected = dense(input_ids=ids, decoder_input_ids=ids).logits
        assert (out - expected).norm() < 0.05 * expected.norm()
        assert low.encoder.embed_tokens.weight is low.decoder.embed_tokens.weight


def test_a_speech_model(tmp_path: Path) -> None:
    config = transformers.WhisperConfig(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        max_source_positions=20, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8,
        max_target_positions=20,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.AutoModelForSpeechSeq2Seq.from_config(config).save_pretrained(tmp_path / "w")
    dense = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "w")
    model = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "w", load_in_low_bit="sym_int8", dtype="float32")
    sound, ids = torch.randn(1, 8, 40, generator=torch.Generator().manual_seed(0)), torch.tensor([[1, 5, 9]])
    expected = dense(input_features=sound, decoder_input_ids=ids).logits
    out = model(input_features=sound, decoder_input_ids=ids).logits
    assert (out - expected).norm() < 0.05 * expected.norm()


def test_a_model_without_a_head(tied: Path) -> None:
    model = AutoModel.from_pretrained(tied, load_in_low_bit="sym_int8", dtype="float32")
    dense = transformers.AutoModel.from_pretrained(tied, dtype=torch.float32)
    ids = torch.tensor([[3, 1, 4]])
    expected = dense(ids).last_hidden_state
    assert (model(ids).last_hidden_state - expected).norm() < 0.05 * expected.norm()


def test_kernels_and_plain_functions(tied: Path, tmp_path: Path) -> None:
    transformers.AutoModelForCausalLM.from_pretrained(tied)
    AutoModelForCausalLM.from_pretrained(tied, load_in_4bit=True).save_low_bit(tmp_path / "m")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    save_low_bit(model, tmp_path / "n")
    assert greedy(AutoModelForCausalLM.load_low_bit(tmp_path / "n")) == greedy(model)
    prepare(model)
    prepare(model)
    assert kernel_name(model) in ("int4 kernel of torch", "portable")
    model.to(torch.float32)
    assert kernel_name(model) == "portable"
    assert len(greedy(model)) > 5


@pytest.mark.parametrize("low_bit", ["bf16", "sym_int4"])
def test_a_weight_that_the_files_lack_is_no_noise(guide_model: Path, tmp_path: Path, low_bit: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(guide_model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.other"] = tensors.pop("model.layers.0.mlp.down_proj.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lack 1 of the model's weights|lack 2 of the model's weights"):
        AutoModelForCausalLM.from_pretrained(folder, load_in_low_bit=low_bit)
