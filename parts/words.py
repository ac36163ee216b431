"""What more than one tab says, in English and Chinese: the jobs, refusals, and what stands beside every action.

Knows nothing of when it is said. Values in braces are filled in by `Words.say`.
"""

from nibble.words import Words

WORDS = Words(
    {
        "console": ("The same in the console", "对应的命令行"),
        "jobs": ("Jobs", "任务"),
        "began": ("Begun: {what}. It goes on when this page is closed.", "已开始：{what}。关闭网页也会继续。"),
        "refused": ("{error}", "未能完成：{error}"),
        "loading_now": ("{model} is being loaded…", "正在加载 {model}……"),
        "is_loaded": (
            "{model} is loaded in {format} on {device}, in {seconds:.1f} s.",
            "{model} 已加载：{format}，{device}，用时 {seconds:.1f} 秒。",
        ),
        # jobs
        "no_jobs": ("No jobs yet.", "还没有任务。"),
        "waiting": ("waiting", "等待中"),
        "running": ("running", "进行中"),
        "done": ("done", "完成"),
        "failed_job": ("failed", "失败"),
        "stopped_job": ("stopped", "已停止"),
        "killed": ("killed", "被系统终止"),
        "job_download": ("Get {what}", "获取 {what}"),
        "job_quantize": ("Shrink {what} to {formats}", "压缩 {what} 为 {formats}"),
        "job_evaluate": ("Evaluate {what}", "评测 {what}"),
        "job_finetune": ("Train {name}: {what} on {data}", "训练 {name}：{what} ← {data}"),
        "job_dry": ("Try two steps: {what} on {data}", "试两步：{what} ← {data}"),
        "job_merge": ("Merge {what}", "合并 {what}"),
        "job_compare": ("Compare {what}", "比较 {what}"),
        "job_other": ("{task} {what}", "{task} {what}"),
        "own_format": ("its own format", "原有格式"),
        "picked_format": ("what fits best", "最合适的格式"),
        "stage_downloading": ("downloading", "下载"),
        "stage_download": ("downloading", "下载"),
        "stage_checking": ("checking", "校验"),
        "stage_pack": ("shrinking", "压缩"),
        "stage_evaluate": ("measuring", "评测"),
        "stage_prepare": ("preparing", "准备"),
        "stage_train": ("training", "训练"),
        "stage_save": ("saving", "保存"),
        "stage_measure": ("measuring", "测量"),
        "stage_compare": ("comparing", "比较"),
        "stage_merge": ("merging", "合并"),
        "stage_prove": ("proving", "验证"),
        "stage_logits": ("comparing answers", "比较输出"),
        "unit_step": ("steps", "步"),
        "unit_parts": ("parts", "部分"),
        "unit_models": ("models", "个模型"),
        "unit_tensors": ("tensors", "个张量"),
        "left": ("{value} left", "剩余 {value}"),
        "took": ("took {value}", "用时 {value}"),
        "do_stop": ("Stop", "停止"),
        "do_resume": ("Resume", "继续"),
        "do_log": ("Log", "日志"),
        "do_load": ("Load {what}", "加载 {what}"),
        "no_log": ("The log is empty.", "日志为空。"),
    }
)
