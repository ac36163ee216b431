"""What the Models tab says, in English and Chinese."""

from nibble.words import Words

WORDS = Words(
    {
        "models": ("Models", "模型"),
        "models_intro": (
            "### Get, shrink and keep models\n\nDownloading, quantizing and judging models here in the page is on "
            "its way. Until then, the console downloads "
            "(`.venv/bin/python -m nibble download Qwen/Qwen2-1.5B-Instruct`), "
            "and these Python lines, run with `.venv/bin/python` in Nibble's folder, download, shrink and keep:",
            "### 获取、压缩与管理模型\n\n网页里的下载、量化和评测功能正在开发中。目前可以在终端下载："
            "`.venv/bin/python -m nibble download Qwen/Qwen2-1.5B-Instruct`；"
            "也可以在 Nibble 文件夹里用 `.venv/bin/python` 运行下面几行，"
            "下载、压缩并保存：",
        ),
        "models_after": (
            "Put a saved folder into `models` in Nibble's home (`~/.nibble`), and the Chat tab offers it under Model.",
            "把保存好的文件夹放进 Nibble 主目录（`~/.nibble`）的 `models` 里，就能在“对话”页的“模型”中选择它。",
        ),
    }
)
