"""Scripts written for ipex_llm and bigdl.llm, run on Nibble after `nibble.compat.install()`."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nibble import compat
from nibble.errors import FormatError, ModelError, NibbleError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def installed() -> Iterator[None]:
    compat.install()
    yield
    compat.uninstall()


@pytest.mark.parametrize("library", ["ipex_llm", "bigdl.llm"])
def test_names_are_ours(installed: None, library: str) -> None:
    import importlib

    import nibble.transformers as ours

    theirs = importlib.import_module(f"{library}.transformers")
    for name in ("AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForSpeechSeq2Seq"):
        assert getattr(theirs, name) is getattr(ours, name)
    assert importlib.import_module(library).optimize_model is compat.optimize_model


def test_a_name_that_is_not_offered_says_which_are(installed: None) -> None:
    with pytest.raises(ImportError, match="AutoModelForTokenClassification"):
        from ipex_llm.transformers import AutoModelForTokenClassification  # noqa: F401
    import ipex_llm

    with pytest.raises(AttributeError, match="offered: optimize_model"):
        ipex_llm.llm_patch  # noqa: B018


def test_nothing_is_answered_before_and_after() -> None:
    for _ in range(2):
        with pytest.raises(ImportError):
            import bigdl.llm.transformers  # noqa: F401
        compat.install()
        compat.install()
        import bigdl.llm.transformers  # noqa: F401, F811

        compat.uninstall()


def test_the_extension_is_answered_only_where_it_is_not_there(installed: None, tmp_path: Path, monkeypatch) -> None:
    import intel_extension_for_pytorch

    assert isinstance(intel_extension_for_pytorch.__loader__, compat._Finder)
    compat.uninstall()
    (tmp_path / "intel_extension_for_pytorch.py").write_text("real = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    compat.install()
    import intel_extension_for_pytorch

    assert intel_extension_for_pytorch.real
    del sys.modules["intel_extension_for_pytorch"]


def test_the_real_library_is_not_answered_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ipex_llm", type(sys)("ipex_llm"))
    with pytest.raises(NibbleError, match="imported already"):
        compat.install()


def test_installing_is_light() -> None:
    code = "import sys; from nibble import compat; compat.install(); import ipex_llm; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_optimize_model_packs_saves_and_reloads(installed: None, stories: Path, tmp_path: Path) -> None:
    import torch
    from ipex_llm import optimize_model
    from ipex_llm.transformers import AutoModelForCausalLM
    from transformers import AutoModelForCausalLM as Plain

    model = optimize_model(Plain.from_pretrained(stories, dtype="float32"), low_bit="asym_int5")
    ids = torch.tensor([[1, 403, 407, 261, 378]])
    options = {"max_new_tokens": 24, "do_sample": False}
    expected = AutoModelForCausalLM.from_pretrained(stories, load_in_low_bit="asym_int5", dtype="float32")
    assert torch.equal(model.generate(ids, **options), expected.generate(ids, **options))
    model.save_low_bit(tmp_path / "saved")
    again = AutoModelForCausalLM.load_low_bit(tmp_path / "saved", dtype="float32")
    assert torch.equal(again.generate(ids, **options), expected.generate(ids, **options))
    assert (tmp_path / "saved" / "tokenizer.json").exists()


def test_optimize_model_keeps_what_is_named_and_refuses_what_it_cannot(stories: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from nibble.lowbit import LowBitLinear

    model = compat.optimize_model(
        AutoModelForCausalLM.from_pretrained(stories), "nf4", modules_to_not_convert=["lm_head", "mlp"]
    )
    packed = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, LowBitLinear)}
    assert packed == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    plain = AutoModelForCausalLM.from_pretrained(stories, dtype="float32")
    assert compat.optimize_model(plain, None).dtype == torch.float32
    assert compat.optimize_model(plain, "bf16").dtype == torch.bfloat16
    with pytest.raises(ModelError, match="no model of transformers"):
        compat.optimize_model(torch.nn.Linear(2, 2))
    with pytest.raises(FormatError, match="nf5"):
        compat.optimize_model(AutoModelForCausalLM.from_pretrained(stories), "nf5")
