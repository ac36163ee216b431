"""What the Fine-tune tab says, in English and Chinese."""

from nibble.words import Words

WORDS = Words(
    {
        "finetune": ("Fine-tune", "微调"),
        "finetune_intro": (
            "### Teach a model\n\nQLoRA fine-tuning, with a dry run, a live loss and a merge that is checked, is on "
            "its way to this tab.",
            "### 教模型新东西\n\nQLoRA 微调（含试运行、实时损失曲线和经过验证的合并）正在开发中。",
        ),
    }
)
