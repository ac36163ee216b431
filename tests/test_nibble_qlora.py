"""LoRA on low-bit bases: the names of IPEX-LLM, gradients and losses beside PEFT on bitsandbytes, every format."""

import copy
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from nibble import compat, qlora
from nibble.errors import ModelError
from nibble.lowbit import FORMATS, LowBitLinear
from nibble.transformers import AutoModelForCausalLM

pytestmark = pytest.mark.usefixtures("one_thread")

PACKED = [name for name, row in FORMATS.items() if row.quantized]
TARGETS = ["q_proj", "k_proj", "v_proj"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of widths that bitsandbytes' blocks divide: elsewhere its blocks run on over the ends of rows."""
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        initializer_range=0.1,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def base_of(folder: Path, low_bit: str = "nf4", dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, load_in_low_bit=low_bit, dtype=dtype, modules_to_not_convert=["lm_head"]
    )


def peer_of(folder: Path) -> Any:
    """The same weights in bitsandbytes' nf4, as its QLoRA must be set up on a CPU."""
    nn = pytest.importorskip("bitsandbytes.nn")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=False,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, nn.Linear4bit):
            # It repacks the weight in evaluation, and then gives no gradient.
            module.support_avx512bf16_for_cpu = False
    return model


def adapted(base: Any, targets: Any = TARGETS, *, checkpointing: bool | None = None, dropout: float = 0.0) -> Any:
    """LoRA on a base; checkpointing is off, or reentrant or not. The same random numbers each time."""
    how = {"use_reentrant": checkpointing}
    base.config.use_cache = False
    base = qlora.prepare_model_for_kbit_training(base, checkpointing is not None, how if checkpointing else None)
    torch.manual_seed(0)
    config = qlora.LoraConfig(
        r=8, lora_alpha=32, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM", bias="none"
    )
    model = qlora.get_peft_model(base, config).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02)
    return model


def batch_of(vocabulary: int, seed: int = 0, shape: tuple[int, int] = (4, 24)) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, vocabulary, shape, generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def gradients(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def off(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of norms."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in ours)


def curve(model: Any, batches: Callable[[int], dict[str, torch.Tensor]], steps: int = 50) -> list[float]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3)
    losses = []
    for step in range(steps):
        loss = model(**batches(step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("targets", [TARGETS, "all-linear"], ids=["qkv", "all-linear"])
@pytest.mark.parametrize("checkpointing", [None, False])
def test_gradients_on_nf4_are_those_of_bitsandbytes(small: Path, targets: Any, checkpointing: bool | None) -> None:
    batch = batch_of(512)
    ours = gradients(adapted(base_of(small), targets, checkpointing=checkpointing), batch)
    theirs = gradients(adapted(peer_of(small), targets, checkpointing=checkpointing), batch)
    assert all(gradient.abs().sum() > 0 for gradient in ours.values())
    assert off(ours, theirs) < 1e-4


def test_gradients_on_the_guide_are_those_of_bitsandbytes(guide_model: Path) -> None:
    batch = batch_of(6144, shape=(2, 16))
    assert off(gradients(adapted(base_of(guide_model)), batch), gradients(adapted(peer_of(guide_model)), batch)) < 1e-4


def test_fifty_steps_give_the_loss_curve_of_bitsandbytes(small: Path) -> None:
    def batches(step: int) -> dict[str, torch.Tensor]:
        return batch_of(512, step % 3)

    ours = curve(adapted(base_of(small), "all-linear"), batches)
    theirs = curve(adapted(peer_of(small), "all-linear"), batches)
    assert ours[-1] < 0.9 * ours[0]
    assert max(abs(one - other) for one, other in zip(ours, theirs, strict=True)) < 1e-3


@pytest.mark.parametrize("name", [*PACKED, "bf16"])
def test_every_format_trains_the_same_with_and_without_checkpointing(stories: Path, name: str) -> None:
    batch = batch_of(512)
    dtype = torch.bfloat16 if name == "bf16" else torch.float32
    plain = gradients(adapted(base_of(stories, name, dtype)), batch)
    assert all(gradient.abs().sum() > 0 for gradient in plain.values())
    for reentrant in (False, True) if name == "nf4" else (False,):
        again = gradients(adapted(base_of(stories, name, dtype), checkpointing=reentrant), batch)
        assert off(again, plain) < 1e-5
    losses = curve(adapted(base_of(stories, name, dtype)), lambda step: batch, steps=5)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["nf4", "sym_int4", "asym_int5", "fp8_e4m3"])
def test_gradients_in_bfloat16_are_near_those_in_float32(stories: Path, name: str) -> None:
    batch = batch_of(512)
    exact = gradients(adapted(base_of(stories, name)), batch)
    rough = gradients(adapted(base_of(stories, name, torch.bfloat16), checkpointing=False), batch)
    whole = [torch.cat([each[key].flatten().float() for key in exact]) for each in (rough, exact)]
    assert (whole[0] - whole[1]).norm() < 0.05 * whole[1].norm()


def test_training_after_chatting_is_training(stories: Path) -> None:
    model = adapted(base_of(stories, "sym_int4", torch.bfloat16))
    before = gradients(model, batch_of(512))
    model.eval()
    model.generate(torch.tensor([[1, 5, 6]]), max_new_tokens=3, do_sample=False)
    assert off(gradients(model.train(), batch_of(512)), before) < 1e-5


@pytest.mark.parametrize("library", ["ipex_llm", "bigdl.llm"])
def test_the_names_are_answered(library: str) -> None:
    compat.install()
    try:
        theirs = importlib.import_module(f"{library}.transformers.qlora")
        for name in qlora.__all__:
            assert getattr(theirs, name) is getattr(qlora, name)
    finally:
        compat.uninstall()


def test_an_adapter_is_read_by_peft_alone(stories: Path, tmp_path: Path) -> None:
    model = adapted(base_of(stories))
    model.save_pretrained(tmp_path)
    assert "training_mode" not in (tmp_path / "adapter_config.json").read_text(encoding="utf-8")
    ids = batch_of(512)["input_ids"]
    plain = transformers.AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32)
    for module in [name for name, module in model.get_base_model().named_modules() if isinstance(module, LowBitLinear)]:
        layer = model.get_base_model().get_submodule(module)
        plain.get_submodule(module.removesuffix(".base_layer")).weight.data = layer.dequantize()
    again = peft.PeftModel.from_pretrained(plain, tmp_path)
    with torch.no_grad():
        assert torch.allclose(again(ids).logits, model.eval()(ids).logits, atol=1e-4)


def test_a_merge_onto_packed_weights_fails_and_leaves_them(stories: Path) -> None:
    model = adapted(base_of(stories))
    stored = {name: copy.deepcopy(value) for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError):
        model.merge_and_unload(safe_merge=True)
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())


def test_modes_and_targets_that_are_not_there_are_sentences(stories: Path) -> None:
    assert qlora.LoraConfig(training_mode="lora").r == 8
    with pytest.raises(ModelError, match="qalora"):
        qlora.LoraConfig(training_mode="qalora")
    with pytest.raises(ModelError) as refused:
        qlora.get_peft_model(base_of(stories), qlora.LoraConfig(target_modules=["c_attn"]))
    assert "q_proj" in str(refused.value.hint)


def test_arguments_of_older_libraries_are_taken(tmp_path: Path) -> None:
    made = qlora.TrainingArguments(
        output_dir=str(tmp_path), optim="adamw_hf", fp16=True, evaluation_strategy="no", warmup_ratio=0.1, no_cuda=True,
        overwrite_output_dir=True, logging_dir="logs",
    )  # fmt: skip
    assert made.optim == "adamw_torch"
    assert not made.fp16
    assert made.warmup_steps == 0.1
    assert not qlora.TrainingArguments(output_dir=str(tmp_path), use_cpu=True).bf16


def test_adapters_are_cast(stories: Path) -> None:
    model = adapted(base_of(stories, dtype=torch.bfloat16))
    qlora.cast_lora_weight(model)
    trained = gradients(model, batch_of(512))
    assert all(gradient.dtype == torch.bfloat16 for gradient in trained.values())
