"""What the Chat tab says, in English and Chinese: key -> (English, Chinese).

Knows nothing of when it is said. Values in braces are filled in by `Words.say`.
"""

from nibble.words import Words

WORDS = Words(
    {
        # fixed labels
        "chat": ("Chat", "对话"),
        "new_chat": ("New chat", "新对话"),
        "conversations": ("Conversations", "历史对话"),
        "delete": ("Delete this chat", "删除此对话"),
        "delete_really": ("Delete for good", "确认删除"),
        "keep": ("Keep it", "保留"),
        "download_markdown": ("↓ Markdown", "↓ Markdown"),
        "download_json": ("↓ JSON", "↓ JSON"),
        "message": ("Your message", "输入消息"),
        "model_settings": ("Model", "模型"),
        "model": ("Model", "模型"),
        "low_bit": ("Format", "格式"),
        "low_bit_info": (
            "for models stored in full precision; a low-bit folder keeps its own",
            "用于全精度模型；已量化的模型保持自己的格式",
        ),
        "device": ("Device", "设备"),
        "load": ("Load", "加载"),
        "unload": ("Unload", "卸载"),
        "chat_adapter": ("Adapter in this chat", "此对话使用的适配器"),
        "adapter_info": (
            "what the model was taught; one of another model loads that first",
            "微调的成果；若属于其他模型，会先加载该模型",
        ),
        "adapter_none": ("none: the model as it is", "不使用：模型本身"),
        "system_prompt": ("System prompt", "系统提示词"),
        "system_placeholder": ("none: the model answers as it was trained", "空：按模型本来的方式回答"),
        "sampling": ("Sampling", "采样参数"),
        "own": ("model's own", "模型默认"),
        "max_new_tokens": ("Longest answer (tokens)", "回答最长（词元）"),
        "temperature": ("Temperature (0: always the likeliest)", "温度（0 为贪心）"),
        "top_p": ("Top-p", "Top-p"),
        "top_k": ("Top-k", "Top-k"),
        "repetition_penalty": ("Repetition penalty", "重复惩罚"),
        "seed": ("Seed", "随机种子"),
        # the empty chat
        "greeting": ("What would you like to know?", "想了解什么？"),
        "greeting_guide": (
            "You are talking to **the guide**, a small model that knows Nibble itself. Load a bigger one for the rest.",
            "与你对话的是**小向导**，一个只熟悉 Nibble 本身的小模型。其他问题请加载更大的模型。",
        ),
        "greeting_model": (
            "You are talking to **{model}** in {format}, on this machine.",
            "与你对话的是本机上的 **{model}**（{format}）。",
        ),
        "greeting_none": ("No model is loaded: choose one in the sidebar.", "尚未加载模型：请在侧栏选择。"),
        # under an answer
        "speed": ("{value:.1f} tokens/s", "{value:.1f} 词元/秒"),
        "first": ("first token {value:.2f} s", "首词元 {value:.2f} 秒"),
        "tokens": ("{value:,} tokens", "{value:,} 个词元"),
        "reused": ("{value:,} reused", "复用 {value:,}"),
        "end_length": ("reached the longest answer", "达到长度上限"),
        "end_stopped": ("stopped", "已停止"),
        "end_stop": ("complete", "完成"),
        "thinking": ("Thinking", "思考中"),
        "thought": ("Thought", "思考过程"),
        # notices in the chat
        "loading": ("The model is being loaded. The answer follows.", "模型正在加载，随后回答。"),
        "place": ("{value} before you in the queue.", "前面还有 {value} 个请求。"),
        "reading": ("Reading…", "正在阅读……"),
        "cut": (
            "The conversation no longer fits into the model's context. Oldest turns left out: {value}.",
            "对话超出模型的上下文，最早的 {value} 轮未参与回答。",
        ),
        "lost_adapter": (
            "The adapter {name} is not here any more; the model answers without it.",
            "适配器 {name} 已不存在，由模型本身回答。",
        ),
        "unknown_adapter": ("There is no adapter {name!r} to choose here.", "这里没有可选的适配器 {name!r}。"),
        "switched": ("From here on {model} ({format}) answers.", "从这里起由 {model}（{format}）回答。"),
        "failed": ("{error}", "出错了：{error}"),
        "died": (
            "{error}",
            "运行模型的进程已终止（多半是内存不足）。再发一条消息就会重新启动。详情：{error}",
        ),
        "nothing": (
            "The model ended its answer without a word. Regenerate, or ask differently.",
            "模型没有给出内容。请重新生成或换个问法。",
        ),
        "busy": (
            "An answer is still being written in this chat. Stop it first.",
            "这个对话里还有回答正在生成，请先停止。",
        ),
        "full": (
            "The server is full: {value} answers are being written. Try again in a moment.",
            "服务器已满：{value} 个回答正在生成。请稍后再试。",
        ),
        "empty": ("The message is empty. Write something first.", "消息是空的，请先输入内容。"),
        "too_long": (
            "The message has {value:,} characters; {limit:,} is the most.",
            "消息有 {value:,} 个字符，最多 {limit:,} 个。",
        ),
        "not_text": ("The message must be text.", "消息必须是文字。"),
        "bad_number": (
            "{label}: {value} is not a number. Leave it empty for the model's own.",
            "{label}：{value} 不是数字。留空则用模型默认值。",
        ),
        "gone": ("This chat no longer exists.", "这个对话已不存在。"),
        # the model
        "loaded": (
            "{model} is loaded in {format} on {device}, in {seconds:.1f} s.",
            "{model} 已加载：{format}，{device}，用时 {seconds:.1f} 秒。",
        ),
        "unloaded": ("No model is loaded now; its memory is free again.", "模型已卸载，内存已释放。"),
        "export_title": ("Conversation", "对话"),
        "untitled": ("New chat", "新对话"),
        # the status line
        "state_empty": ("no model is loaded", "未加载模型"),
        "state_loading": ("loading {model}…", "正在加载 {model}……"),
        "state_failed": ("not loaded", "加载失败"),
        "kernel": ("One token at a time by: {value}.", "逐词元计算方式：{value}。"),
        "template": ("Chat template: {value}.", "对话模板：{value}。"),
        "context": ("Context: {value:,} tokens.", "上下文：{value:,} 个词元。"),
        "queue_free": ("idle", "空闲"),
        "queue_busy": ("{value} in work", "{value} 个进行中"),
    }
)

EXAMPLES: dict[str, tuple[str, ...]] = {
    "en": ("What is Nibble?", "How do I load a model of my own?", "Nibble 是什么？", "内存不够怎么办？"),
    "zh": ("Nibble 是什么？", "内存不够怎么办？", "What is nf4?", "How do I fine-tune a model?"),
}
"""Four first questions for each language: two English, two Chinese, the visitor's own first."""
