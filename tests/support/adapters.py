"""Adapters of the guide with noise in place of what training leaves: loud enough to change what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nibble.library import GUIDE_FOLDER
from nibble.publish import MANIFEST


def make_adapter(folder: Path, seed: int = 0, base: Path = GUIDE_FOLDER, **more: Any) -> Path:
    """An adapter with noise in place of what training leaves, saved by PEFT."""
    import peft
    import torch

    from nibble.transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, load_in_low_bit="bf16", dtype=torch.float32)
    config: dict[str, Any] = {
        "r": 8,
        "lora_alpha": 32,
        "target_modules": ["q_proj", "k_proj", "v_proj"],
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tuned = peft.get_peft_model(model, peft.LoraConfig(**{**config, **more}, task_type="CAUSAL_LM"))
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name or (more.get("bias") and name.endswith("bias")):
                torch.nn.init.normal_(parameter, std=0.25)
    tuned.save_pretrained(folder)
    # PEFT writes a card of its own beside, which is of no use here.
    (folder / "README.md").unlink(missing_ok=True)
    return folder


def sign(folder: Path, base: str, fingerprint: str, **facts: Any) -> None:
    """Write down what an adapter was trained on, as our own training does."""
    said = {"kind": "adapter", "base": {"name": base, "fingerprint": fingerprint}, **facts}
    (folder / MANIFEST).write_text(json.dumps({"files": {}, **said}), encoding="utf-8")
