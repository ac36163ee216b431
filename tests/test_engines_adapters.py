"""Adapters on a loaded model: what PEFT would say, the base untouched, one conversation's adapter never another's."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from nibble import adapters, publish
from nibble.engines.base import Chunk, Sampling
from nibble.engines.local import LocalEngine
from nibble.errors import ModelError
from nibble.lowbit import lean
from nibble.transformers import AutoModelForCausalLM as LowBit

ONCE = [{"role": "user", "content": "Once upon a time"}]


def write_adapter(base: Path, folder: Path, seed: int, mark: str = "", **config: object) -> Path:
    """An adapter with random weights that are large enough to be heard, as PEFT saves it; with a mark, as ours are."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        settings = LoraConfig(
            **{"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"], **config}
        )
        tuned = get_peft_model(model, settings)
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name or name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    facts = {"kind": "adapter", "base": {"name": base.name, "fingerprint": mark or adapters.fingerprint(base)}}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with publish.publication(folder, facts) as fresh:
        tuned.save_pretrained(fresh)
        (fresh / "README.md").unlink(missing_ok=True)
    return folder


def ask(engine: LocalEngine, adapter: Path | str = "", tokens: int = 40) -> tuple[str, Chunk]:
    sampling = Sampling(max_new_tokens=tokens, temperature=0)
    chunks = list(engine.stream(ONCE, sampling, threading.Event(), None, str(adapter)))
    text = "".join(chunk.text for chunk in chunks)
    return chunks[-1].full_text or text, chunks[-1]


@pytest.fixture(scope="module")
def engine(stories: Path) -> Iterator[LocalEngine]:
    engine = LocalEngine.load(stories, "", dtype="float32")
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def worn(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("adapters")
    return [
        write_adapter(stories, root / "one", 1),
        write_adapter(stories, root / "two", 2, use_rslora=True, rank_pattern={"v_proj": 2}),
    ]


def test_it_says_what_peft_says(engine: LocalEngine, stories: Path, worn: list[Path]) -> None:
    base = ask(engine)[0]
    tokenizer = AutoTokenizer.from_pretrained(stories)
    inputs = tokenizer("Once upon a time", return_tensors="pt")
    texts = []
    for folder in worn:
        tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32), folder)
        ids = tuned.generate(**inputs, max_new_tokens=40, do_sample=False)[0].tolist()
        texts.append(tokenizer.decode(ids, skip_special_tokens=True)[len("Once upon a time") :])
        assert ask(engine, folder)[0] == texts[-1]
    assert len({base, *texts}) == 3
    assert ask(engine)[0] == base


def test_keys_and_values_of_another_adapter_are_not_reused(engine: LocalEngine, worn: list[Path]) -> None:
    assert ask(engine, worn[0])[1].prompt_tokens > 1
    assert ask(engine, worn[0])[1].reused_tokens > 0
    assert ask(engine, worn[1])[1].reused_tokens == 0
    assert ask(engine)[1].reused_tokens == 0


def test_visitors_with_other_adapters_never_mix(engine: LocalEngine, worn: list[Path]) -> None:
    wanted = {str(folder): ask(engine, folder)[0] for folder in ("", *worn)}
    found: list[tuple[str, str]] = []

    def visit(folder: str) -> None:
        found.append((folder, ask(engine, folder)[0]))

    threads = [threading.Thread(target=visit, args=(folder,)) for folder in list(wanted) * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 12
    assert all(text == wanted[folder] for folder, text in found)


def test_only_its_own_bytes_are_added(engine: LocalEngine, worn: list[Path]) -> None:
    for folder in worn:
        ask(engine, folder)
    wardrobe = engine._wardrobe
    assert wardrobe is not None
    files = sum((folder / adapters.WEIGHTS).stat().st_size for folder in worn)
    assert 0 < wardrobe.nbytes <= files


def test_one_that_was_trained_anew_is_read_anew(engine: LocalEngine, stories: Path, tmp_path: Path) -> None:
    folder = write_adapter(stories, tmp_path / "a", 3)
    before = ask(engine, folder)[0]
    write_adapter(stories, folder, 4)
    assert ask(engine, folder)[0] != before


def test_one_of_another_model_is_refused(engine: LocalEngine, stories: Path, tmp_path: Path) -> None:
    base = ask(engine)[0]
    other = write_adapter(stories, tmp_path / "other", 1, mark="0" * 64)
    with pytest.raises(ModelError, match="not on the model that is loaded"):
        ask(engine, other)
    with pytest.raises(ModelError, match="is not here any more"):
        ask(engine, tmp_path / "gone")
    whole = write_adapter(stories, tmp_path / "whole", 1, modules_to_save=["norm"])
    with pytest.raises(ModelError, match="nibble merge whole"):
        ask(engine, whole)
    assert ask(engine)[0] == base


@pytest.mark.parametrize(
    ("said", "why"),
    [({"init_lora_weights": "pissa"}, "the base's own weights"), ({"alora_invocation_tokens": [5]}, "certain words"),
     ({"alpha_pattern": {"(a+)+$": 1}}, "no module's name"), ({"peft_type": "IA3"}, "only LoRA")],
)  # fmt: skip
def test_what_would_be_put_on_wrongly_is_refused(
    engine: LocalEngine, stories: Path, tmp_path: Path, said: dict, why: str
) -> None:
    folder = write_adapter(stories, tmp_path / "odd", 1)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **said}), encoding="utf-8")
    with pytest.raises(ModelError, match=why):
        ask(engine, folder)


@pytest.mark.parametrize("low_bit", ["sym_int4", "nf4", "bf16"])
def test_the_lean_way_adds_it_too(guide_model: Path, tmp_path: Path, low_bit: str) -> None:
    """The logits of a token behind a prompt, with and without what serves a single token."""
    from nibble.engines.wardrobe import read_lora
    from nibble.lowbit import prepare
    from nibble.lowbit.lora import Wearing

    targets = ["q_proj", "k_proj", "gate_proj", "down_proj"]
    adapter = adapters.read(write_adapter(guide_model, tmp_path / "a", 5, target_modules=targets, bias="lora_only"))
    model = LowBit.from_pretrained(guide_model, load_in_low_bit=low_bit)
    prepare(model)
    wearing = Wearing(model)
    ids = torch.arange(5, 25).unsqueeze(0)

    def logits() -> torch.Tensor:
        with torch.inference_mode():
            whole = model(ids).logits[0, -1]
            cache = model(ids[:, :-1], use_cache=True)
            held = getattr(cache, lean.CACHE)
            last = model(ids[:, -1:], use_cache=True, **{lean.CACHE: held}).logits[0, -1]
        # The many-row and the one-row kernels round otherwise.
        assert (whole - last).float().norm() < 0.05 * whole.float().norm()
        return last.float()

    plain = logits()
    wearing.put_on(read_lora(adapter, model))
    assert (logits() - plain).norm() > 0.1 * plain.norm()
    wearing.put_on(None)
    assert torch.equal(logits(), plain)
