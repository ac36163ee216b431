"""Which keys of a model's JSON files would make a library run code, reach for the network or leave the folder.

transformers takes whatever stands in config.json, generation_config.json and tokenizer_config.json as arguments and
attributes, at any depth. Promises that a key is judged wherever it stands. What the keys do was read in transformers
5.23 and 4.37 and PEFT; a benign `save_pretrained` writes the underscored ones in `UNDERSCORED` and no others.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nibble.checkpoint import INDEX, WEIGHTS
from nibble.errors import ModelError


def _is_off(value: Any) -> bool:
    return not value


def _is_plain_attention(value: Any) -> bool:
    """Any other one can name a repository with a kernel, also in a dict by part; flash attention is fetched as one."""
    values = value.values() if isinstance(value, dict) else [value]
    return all(item in (None, "eager", "sdpa", "flex_attention") for item in values)


def _is_tokenizer(value: Any) -> bool:
    """transformers takes any of its own names: AutoTokenizer calls itself for ever, RAG's fetches and unpickles."""
    name = re.fullmatch(r"\w{0,80}Tokenizer(Fast)?|\w{0,80}Backend", value) if isinstance(value, str) else None
    return value is None or (name is not None and not re.match(r"Auto|Rag|TransfoXL", name[0]))


@dataclass(frozen=True)
class Rule:
    """A key that is let through with harmless values only."""

    key: str
    """A pattern for the whole key."""
    harmless: Callable[[Any], bool]
    why: str
    """What it could do; goes on a sentence that names the key."""


FOREIGN = "can make transformers run foreign code"
RULES = (
    Rule("_attn_implementation_autoset", lambda value: isinstance(value, bool), FOREIGN),
    Rule("_(attn|experts)_implementation.*", lambda value: False, FOREIGN),
    Rule("attn_implementation", _is_plain_attention, FOREIGN),
    Rule("experts_implementation", lambda value: value in (None, "eager", "batched_mm", "grouped_mm"), FOREIGN),
    Rule("trust_remote_code|custom_generate|use_kernels|allow_all_kernels", _is_off, FOREIGN),
    Rule("tokenizer_class", _is_tokenizer, "names no tokenizer"),
    Rule("init_inputs", _is_off, "passes a tokenizer arguments that cannot be judged"),
    Rule("use_pretrained_backbone|gguf_file", _is_off, "makes transformers fetch another model"),
    Rule("transformers_weights", lambda value: value in (None, WEIGHTS, INDEX), "names other weights"),
    Rule("parent_library", lambda value: bool(re.fullmatch(r"transformers(\.\w+)*", str(value or "transformers"))),
         "makes PEFT import a foreign module"),
    Rule("megatron_config", _is_off, "makes PEFT import a foreign module"),
)  # fmt: skip
"""The first rule that fits a key holds. No trust lifts them: a maker who is trusted has no need of these."""

CODE_KEYS = ("auto_map", "custom_pipelines")
"""Name Python files to run; allowed for a model that is trusted."""

UNDERSCORED = {
    "_name_or_path", "_commit_hash", "_num_labels", "_from_model_config", "_original_object_hash",
    "_output_attentions", "_attn_implementation_autoset", "_flash_attn_2_enabled", "_remove_final_layer_norm",
    "_sliding_window_pattern", "_frame_rate", "_pad_token_id", "_label_trainable_num_channels", "_out_features",
    "_out_indices", "_pre_quantization_dtype", "_load_in_4bit", "_load_in_8bit", "_class_name", "_diffusers_version",
    "_processor_class", "_valid_processor_keys", "_comment", "__float__",
}  # fmt: skip
"""Underscored keys that real folders have, of this version's `save_pretrained` and of earlier ones."""

NAMES_ONLY = ("id2label", "label2id", "vocabulary_map", "added_tokens_decoder")
"""Keys whose values map a model's own words: no library takes these for settings."""

ELSEWHERE = ("special_tokens_map_file", "tokenizer_config_file", "added_tokens_file")
"""Files that tokenizers once named with paths of their maker's machine, and that no library opens by these names."""

LARGEST = {
    "vocab_size": 2**24, "hidden_size": 2**20, "n_embd": 2**20, "d_model": 2**20, "intermediate_size": 2**24,
    "max_position_embeddings": 2**30, "n_positions": 2**20, "num_attention_heads": 2**16, "head_dim": 2**16,
    "num_experts": 2**16, "num_local_experts": 2**16, "n_routed_experts": 2**16,
}  # fmt: skip
"""Sizes beyond which a config.json cannot be true: ten times what the largest models have, at the least."""

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "num_encoder_layers")


def check_keys(folder: Path, file: str, content: dict[str, Any]) -> str:
    """Judge every key of one JSON file.

    Args:
        folder: whose file it is.
        file: its name.
        content: what is in it.

    Returns:
        The first key that names Python files of the folder's own; empty where none does.

    Raises:
        ModelError: a key that nobody's trust lets through.
    """
    code = ""
    for depth, key, value in _pairs(content):
        if key in CODE_KEYS and value:
            code = code or key
        rule = next((rule for rule in RULES if re.fullmatch(rule.key, key)), None)
        if rule and not rule.harmless(value):
            raise _refused(folder, file, key, rule.why)
        model = file in ("config.json", "generation_config.json")
        if model and key.startswith("_") and (key not in UNDERSCORED or isinstance(value, dict)):
            raise _refused(folder, file, key, "no library writes there and which could reach into transformers")
        if key == "quantization_config" and depth and value is not None:
            raise _refused(folder, file, key, "in a part of the model can make transformers load another quantizer")
        if file == "tokenizer_config.json" and re.search("_files?$", key) and key not in ELSEWHERE:
            _check_place(folder, key, value)
    return code


def check_sizes(folder: Path, config: dict[str, Any], tensors: int) -> None:
    """Refuse a config.json that would fill the memory, or build layers for ever, before a weight is read.

    Args:
        folder: whose config it is.
        config: of the model.
        tensors: how many the weights hold; a layer has one at the least.

    Raises:
        ModelError: a size that cannot be true.
    """
    for _, key, value in _pairs(config):
        limit = LARGEST.get(key, max(tensors, 1) if key in LAYERS else None)
        if limit is not None and isinstance(value, int | float) and not 0 <= value <= limit:
            least = f"; its weights hold {tensors:,} tensors" if key in LAYERS else ""
            raise ModelError(
                f"config.json of {folder.name} sets {key} to {value:.8g}, which cannot be true{least}.",
                "Download that file again.",
            )


def _pairs(content: dict[str, Any]) -> Iterator[tuple[int, str, Any]]:
    """Every key and value at any depth, the outermost at depth 0."""
    waiting: list[tuple[int, Any]] = [(0, content)]
    while waiting:
        depth, item = waiting.pop()
        for key, value in item.items() if isinstance(item, dict) else ():
            yield depth, key, value
        values = item.items() if isinstance(item, dict) else ((None, value) for value in item)
        waiting += [(depth + 1, v) for key, v in values if key not in NAMES_ONLY and isinstance(v, dict | list)]


def _check_place(folder: Path, key: str, value: Any) -> None:
    """A path of the maker's own machine, which is not on this one, is harmless and common."""
    for name in value if isinstance(value, list) else [value]:
        if isinstance(name, str) and (name.startswith(("/", "~")) or ".." in name or "\\" in name):
            try:
                there = (folder / Path(name).expanduser()).exists()
            except (OSError, ValueError, RuntimeError):
                there = True
            if there or ".." in name:
                raise _refused(folder, "tokenizer_config.json", key, "leads out of the folder")


def _refused(folder: Path, file: str, key: str, why: str) -> ModelError:
    return ModelError(
        f"{file} of {folder.name} sets {key[:80]}, which {why}.", "Remove that line, or get the model from its maker."
    )
