"""What the Models tab says, in English and Chinese: key -> (English, Chinese).

Knows nothing of when it is said. Values in braces are filled in by `Words.say`. The fixed labels lie in one table with
those of the other tabs: no key stands in two.
"""

from nibble.words import Words

WORDS = Words(
    {
        # fixed labels
        "models": ("Models", "模型"),
        "get": ("Get", "获取"),
        "get_intro": ("A model from a hub, with its weights as safetensors.", "从模型社区下载（safetensors 权重）。"),
        "repo": ("Model on the hub", "模型名称"),
        "hub": ("Hub", "模型社区"),
        "hub_own": ("as in the settings", "按配置"),
        "get_more": ("Revision, GGUF file, name", "版本、GGUF 文件、名称"),
        "revision": ("Revision", "版本"),
        "revision_info": ("branch, tag or commit", "分支、标签或提交"),
        "gguf": ("One GGUF file", "单个 GGUF 文件"),
        "gguf_info": ("instead of the safetensors", "代替 safetensors"),
        "name_here": ("Name here", "本机名称"),
        "start_get": ("Download", "下载"),
        "shrink": ("Shrink", "压缩"),
        "shrink_intro": ("One new model for each format that you choose.", "每选一种格式，生成一个新模型。"),
        "source": ("Model", "源模型"),
        "source_info": ("one that is here, or a hub's org/name", "本机模型，或社区上的 org/name"),
        "start_shrink": ("Start", "开始"),
        "advanced": ("Name, mixed bits, pick for me", "名称、混合精度、自动挑选"),
        "out": ("Name of what is made", "新模型名称"),
        "out_info": ("empty: the model's name and the format", "留空：模型名加格式"),
        "skip": ("Keep in full precision", "保持全精度的模块"),
        "skip_info": ("modules, with commas between: lm_head, layers.0", "模块名，用逗号分隔：lm_head, layers.0"),
        "overrides": ("A format of their own", "单独指定格式"),
        "overrides_info": ("a line each: layers.0.mlp=sym_int8", "每行一条：layers.0.mlp=sym_int8"),
        "judge_after": ("Measure what was lost", "完成后评测损失"),
        "pick_memory": ("At most this much memory (GB)", "内存上限（GB）"),
        "pick_kl": ("At most this much lost (mean KL, nats)", "损失上限（平均 KL，nat）"),
        "pick_intro": (
            "**Pick for me** tries the formats on a short text, gives the worst layers more bits, and makes the "
            "smallest model that stays within these limits.",
            "**自动挑选**：在一小段文本上试各种格式，给最差的层更多比特，生成满足上限的最小模型。",
        ),
        "start_pick": ("Pick for me", "自动挑选"),
        "keep_models": ("Keep", "管理"),
        "shelf_load": ("Load", "加载"),
        "shelf_unload": ("Unload", "卸载"),
        "shelf_judge": ("Evaluate", "评测"),
        "shelf_delete": ("Delete", "删除"),
        "shelf_delete_really": ("Delete for good", "确认删除"),
        "shelf_keep": ("Keep it", "保留"),
        # the table of formats
        "th_format": ("Format", "格式"),
        "th_disk": ("Disk", "磁盘"),
        "th_memory": ("Memory", "内存"),
        "th_speed": ("Tokens/s", "词元/秒"),
        "th_lost": ("Lost (KL)", "损失（KL）"),
        "bits": ("{value:g} bits", "{value:g} 比特"),
        "as_stored": ("as it is stored", "保持原有格式"),
        "peak": ("At most {peak} while it is made and loaded.", "生成和加载时最多 {peak}。"),
        "fits": ("Fits this machine.", "这台机器放得下。"),
        "too_large": ("Does not fit this machine.", "这台机器放不下。"),
        "legend": (
            "● fits this machine, ○ does not. Disk, memory and speed are estimates; what is lost is measured.",
            "● 放得下，○ 放不下。磁盘、内存、速度为估计值；损失由评测得出。",
        ),
        "measuring": ("Measuring this machine's speed…", "正在测量这台机器的速度……"),
        "not_here": (
            "Memory and speed are known once the model is here.",
            "下载到本机后才能估计内存和速度。",
        ),
        # the library
        "th_model": ("Model", "模型"),
        "th_size": ("Size", "大小"),
        "is_in": ("loaded", "已加载"),
        "adapter": ("adapter", "适配器"),
        "to_shrink": ("to be shrunk first", "需先压缩"),
        "cannot": ("cannot be used", "无法使用"),
        "disk_use": ("Models take {used}; {free} are free.", "模型占用 {used}，剩余 {free}。"),
        "unfinished": ("Cut downloads keep {size} more.", "未完成的下载另占 {size}。"),
        "choose_one": ("Choose a model to see what is known of it.", "选择一个模型查看详情。"),
        "family": ("Family", "模型家族"),
        "parameters": ("Parameters", "参数量"),
        "context_length": ("Context", "上下文"),
        "context_tokens": ("{value:,} tokens", "{value:,} 词元"),
        "chat_template": ("Chat template", "对话模板"),
        "template_own": ("the model's own", "模型自带"),
        "template_family": ("its family's", "按模型家族"),
        "base": ("Trained on", "基础模型"),
        "estimated": ("Estimated", "估计"),
        "estimated_line": (
            "{memory} of memory, {speed} tokens/s in {format}",
            "{format}：内存 {memory}，{speed} 词元/秒",
        ),
        # the report
        "report": ("What was lost", "量化损失"),
        "no_report": ("Not measured yet: Evaluate does so.", "尚未评测：点“评测”。"),
        "th_perplexity": ("Perplexity", "困惑度"),
        "th_kl": ("KL mean", "KL 均值"),
        "th_kl95": ("KL 95 %", "KL 95 %"),
        "th_top1": ("Same top token", "首选一致"),
        "reference": ("reference", "参照"),
        "shipped": ("the text that ships with Nibble", "Nibble 自带文本"),
        "report_of": (
            "On {tokens:,} tokens of {text}, {device}. KL in nats a token, against the reference.",
            "文本 {text}，{tokens:,} 个词元，{device}。KL 单位 nat/词元，相对参照。",
        ),
        "chart": ("Size against loss: lower left is better", "大小与损失：越靠左下越好"),
        "worst": ("Worst layers", "误差最大的层"),
        "th_error": ("Error", "误差"),
        # what is said under a card
        "is_unloaded": ("No model is loaded now; its memory is free again.", "模型已卸载，内存已释放。"),
        "deleted": ("{model} is deleted; {size} are free again.", "{model} 已删除，释放 {size}。"),
        "delete_asks": (
            "Delete {model} ({size})? It cannot be brought back.",
            "删除 {model}（{size}）？删除后无法恢复。",
        ),
        "delete_worn": (
            "These adapters were trained on it and are of no use without it: {names}.",
            "这些适配器是在它上面训练的，没有它就无法使用：{names}。",
        ),
        "no_formats": ("Choose at least one format.", "请至少选择一种格式。"),
        "stored_alone": (
            "“As it is stored” stands alone: start the other formats after it.",
            "“保持原有格式”只能单独选择，其他格式请另外开始。",
        ),
        "no_limit": ("Give a limit for memory, for what is lost, or for both.", "请填写内存上限或损失上限。"),
        "no_number": ("{label}: {value} is not a number above 0.", "{label}：{value} 不是大于 0 的数。"),
        "no_rule": ("{value} is not of the form module=format.", "{value} 不是“模块=格式”的形式。"),
    }
)
