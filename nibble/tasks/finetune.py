"""The task `finetune`: an adapter trained on a base, into home/adapters; or two steps of it, measured and forgotten.

Promises that whatever cannot be is refused before a model is loaded, and that what ends a run is a sentence. Knows
nothing of how a step is made.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from nibble.tasks import Report
from nibble.training.order import order_from

QUIET = {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
"""Environment of the libraries: their progress bars would fill the log."""


def run(spec: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Fine-tune.

    Args:
        spec: the recipe's settings, and keys of `nibble.training.recipe.SPEC`.
        report: told the stages `prepare`, `train` and `save`, or `measure` in a dry run; a row of numbers at each
            `logging_steps` and each evaluation.

    Returns:
        `name`, `folder`, `adapter`, `steps`, `loss_first`, `loss_last`, `eval_loss`, `eval_loss_before`,
        `seconds_per_step`, `peak_memory_bytes`, `stopped_early`, `checkpoints` and `notes`; of a dry run
        `seconds_per_step`, `peak_memory_bytes`, `total_s`, `steps`, `samples`, `trained_tokens`,
        `trainable_parameters`, `parameters`, `truncated_share`, `free_memory_bytes`, `fits` and `notes`.

    Raises:
        NibbleError: a setting, data set or base that cannot be used; a loss that is no number; too little memory.
    """
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    order = order_from(spec)
    # It imports torch; a refusal above needs none.
    from nibble.training import session

    with ExitStack() as held:
        folder = report.folder
        if folder is None or order.dry:
            folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="nibble-")))
        return session.run(order, report, folder, leads=os.environ.get("RANK", "0") == "0")
