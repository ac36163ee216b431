"""What the Fine-tune tab says, in English and Chinese."""

from nibble.words import Words

WORDS = Words(
    {
        "finetune": ("Fine-tune", "微调"),
        "finetune_intro": (
            "### Teach a model\n\nQLoRA fine-tuning, with a dry run, a live loss and a merge that is checked, is on "
            "its way to this tab. Until then, these Python lines train an adapter on a low-bit model "
            "(`.venv/bin/pip install peft` first, "
            "then run them with `.venv/bin/python` in Nibble's folder):",
            "### 教模型新东西\n\nQLoRA 微调（含试运行、实时损失曲线和经过验证的合并）正在开发中。"
            "目前可以用下面的 Python 在低比特模型上训练适配器"
            "（先运行 `.venv/bin/pip install peft`，再在 Nibble 文件夹里用 `.venv/bin/python` 运行）：",
        ),
    }
)
