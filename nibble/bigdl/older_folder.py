"""A copy of a model folder that transformers 4.37 reads as transformers 5 meant it.

transformers 5 writes `rope_parameters` where 4 reads `rope_theta` and `rope_scaling`: 4 would take its own default base
in silence and the model would talk nonsense. It also writes `dtype`, other tokenizer classes, the chat template as a
file, and a tokenizer.json that tokenizers 0.15 cannot parse.

Promises that the original is not touched, that weights are linked and not copied, and that what 4.37 cannot express is
refused with a sentence. Uses the standard library alone, so that any interpreter can run it. Knows nothing of engines.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nibble.checkpoint import read_config
from nibble.errors import ModelError

ROPE_SCALINGS = ("linear", "dynamic")
"""Values of `rope_type`, besides `default`, that transformers 4.37 computes."""

UNKNOWN_TO_4 = ("backend", "is_local", "local_files_only", "extra_special_tokens", "fix_mistral_regex")
"""Keys of tokenizer_config.json that transformers 5 writes and 4 would take for special tokens or arguments."""

REWRITTEN = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")


def older_copy(folder: Path, into: Path) -> Path:
    """Write a copy of `folder`, in the form of transformers 4.37, into the empty folder `into`, and return `into`.

    A folder that already has that form comes out meaning the same.

    Raises:
        ModelError: config.json is missing or broken, or needs what transformers 4.37 does not have.
    """
    _write(into / "config.json", older_config(read_config(folder), folder.name))
    for name, convert in (("tokenizer.json", older_tokenizer), ("generation_config.json", _without_nulls)):
        if (folder / name).exists():
            _write(into / name, convert(_read(folder / name)))
    if (folder / "tokenizer_config.json").exists():
        template = folder / "chat_template.jinja"
        text = template.read_text(encoding="utf-8") if template.exists() else None
        _write(into / "tokenizer_config.json", older_tokenizer_config(_read(folder / "tokenizer_config.json"), text))
    for path in folder.iterdir():
        if path.is_file() and path.name not in REWRITTEN:
            (into / path.name).symlink_to(path.resolve())
    return into


def older_config(config: dict[str, Any], name: str = "The model") -> dict[str, Any]:
    """config.json for transformers 4.37: `rope_theta`, `rope_scaling`, `torch_dtype`.

    Raises:
        ModelError: a rotary embedding that 4.37 does not compute; it would be left out in silence.
    """
    config = dict(config)
    if "dtype" in config:
        config.setdefault("torch_dtype", config.pop("dtype"))
    rope = dict(config.pop("rope_parameters", None) or {})
    if any(isinstance(value, dict) for value in rope.values()):
        raise _cannot(name, "has a rotary embedding for each kind of layer")
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in rope:
            config[key] = rope.pop(key)
    scaling = rope or dict(config.get("rope_scaling") or {})
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        config.pop("rope_scaling", None)
    elif kind in ROPE_SCALINGS:
        config["rope_scaling"] = {"type": kind, "factor": float(scaling["factor"])}
    else:
        raise _cannot(name, f"scales its rotary embedding by {kind!r}")
    return config


def _cannot(name: str, why: str) -> ModelError:
    return ModelError(
        f"{name} {why}, which transformers 4.37, under BigDL-LLM, does not know.",
        "Load it with Nibble's own engine: engine: nibble in config.yaml.",
    )


def older_tokenizer_config(config: dict[str, Any], template: str | None = None) -> dict[str, Any]:
    """tokenizer_config.json for transformers 4.37, with the chat template inside.

    Args:
        config: as transformers 4 or 5 wrote it.
        template: what chat_template.jinja holds, where there is one.
    """
    older = {key: value for key, value in config.items() if value is not None and key not in UNKNOWN_TO_4}
    extra = config.get("extra_special_tokens")
    if isinstance(extra, list) and extra:
        older["additional_special_tokens"] = extra
    elif isinstance(extra, dict):
        older.update(extra)
    if "backend" in config or config.get("tokenizer_class") == "TokenizersBackend":
        # What transformers 5 saved in tokenizer.json is the whole tokenizer; the named class of 4 would rebuild parts.
        older["tokenizer_class"] = "PreTrainedTokenizerFast"
    if template is not None:
        older["chat_template"] = template
    older.setdefault("clean_up_tokenization_spaces", False)  # 4 would tidy spaces by default
    return older


def older_tokenizer(state: dict[str, Any]) -> dict[str, Any]:
    """tokenizer.json for tokenizers 0.15: merges as one string each, no unsplit Metaspace.

    Raises:
        ModelError: no tokenizer at all, or a merge whose parts hold spaces, which 0.15 cannot write.
    """
    state = dict(state)
    if not isinstance(state.get("model"), dict):
        raise ModelError("tokenizer.json holds no tokenizer.", "Download that file again.")
    model = dict(state["model"])
    merges = model.get("merges")
    if merges and isinstance(merges[0], list):
        if any(" " in part for pair in merges for part in pair):
            raise ModelError(
                "The tokenizer merges tokens that hold spaces, which tokenizers 0.15, under BigDL-LLM, cannot read.",
                "Load the model with Nibble's own engine: engine: nibble in config.yaml.",
            )
        model["merges"] = [" ".join(pair) for pair in merges]
    state["model"] = model
    before = state.get("pre_tokenizer") or {}
    if before.get("type") == "Metaspace" and before.get("split") is False:
        # 0.15 always splits at the mark; a normalizer leaves the text whole. It must not touch the special tokens.
        state["pre_tokenizer"] = None
        state["normalizer"] = _sequence(state.get("normalizer"), _marks(before))
        state["added_tokens"] = [{**token, "normalized": False} for token in state.get("added_tokens", [])]
    return _with_prefix_flag(state)


def _marks(metaspace: dict[str, Any]) -> list[dict[str, Any]]:
    """Normalizers that write marks for spaces, and one before a text that has none.

    The scheme `first` becomes `always`, as it was in transformers 4: a mark also after each special token.
    """
    mark = metaspace["replacement"]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": mark}
    prepend = {"type": "Replace", "pattern": {"Regex": rf"\A(?!{mark})"}, "content": mark}
    return [replace] if metaspace.get("prepend_scheme") == "never" else [replace, prepend]


def _sequence(first: dict[str, Any] | None, then: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": ([first] if first else []) + then}


def _with_prefix_flag(value: Any) -> Any:
    """Each Metaspace in a tokenizer, at any depth, with the flag that 0.15 demands."""
    if isinstance(value, list):
        return [_with_prefix_flag(item) for item in value] if value and isinstance(value[0], dict) else value
    if not isinstance(value, dict):
        return value
    if value.get("type") == "Metaspace":
        kept = {key: item for key, item in value.items() if key != "split"}
        return {"add_prefix_space": value.get("prepend_scheme") != "never", **kept}
    return {key: item if key in ("vocab", "merges") else _with_prefix_flag(item) for key, item in value.items()}


def _without_nulls(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if value is not None}


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ModelError(f"{path.name} in {path.parent.name} is not a JSON object.", "Download that file again.")
    return value


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
