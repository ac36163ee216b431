"""The Fine-tune tab: what it will do, and the Python lines that train an adapter on a low-bit model today."""

from __future__ import annotations

import gradio as gr

from finetune_ui.words import WORDS

__all__ = ["LINES", "WORDS", "build"]

LINES = """import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer
from nibble.transformers import AutoModelForCausalLM

name = "Qwen/Qwen2-1.5B-Instruct"
model = AutoModelForCausalLM.from_pretrained(name, load_in_low_bit="nf4")
model = get_peft_model(model, LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj"]))
tokenizer = AutoTokenizer.from_pretrained(name)
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-4)

for text in ["The blue door was the oldest door of the house."] * 20:
    batch = tokenizer(text, return_tensors="pt")
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"{loss.item():.3f}")

model.save_pretrained("my-adapter")
"""


def build(i18n: gr.I18n) -> None:
    """Lay the tab out, within the Tab that is open."""
    with gr.Column(elem_classes="page"):
        gr.Markdown(i18n("finetune_intro"))
        gr.Code(LINES, language="python", interactive=False, show_label=False, container=False, elem_id="finetune-code")
