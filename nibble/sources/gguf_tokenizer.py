"""The tokenizer of a GGUF file, as the files that transformers reads.

Promises the token ids of the tokenizer that the file was made from, or a refusal where the file says too little: then a
tokenizer.json beside it is taken. Two kinds are built, SentencePiece's pairs (`llama`) and pairs of bytes (`gpt2`).
Knows nothing of models. Sources: docs/gguf.md of ggml, and llama.cpp's llama-vocab.cpp for what the names mean.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from nibble.errors import ModelError
from nibble.screen.templates import check_template
from nibble.sources.gguf_families import special_ids
from nibble.sources.gguf_header import Header, broken
from nibble.sources.safetensors import copy_files

KEY = "tokenizer.ggml."
WHOLE = "tokenizer.huggingface.json"
"""Metadata that holds a whole tokenizer.json."""

TEMPLATE = "tokenizer.chat_template"

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
"""Kinds of tokens that stand for themselves in a text."""

MAX_PIECE = 256
"""Characters of a SentencePiece token: every one of its splits is tried."""


@dataclass(frozen=True)
class Split:
    """How a text is cut before pairs of bytes are merged."""

    pattern: str
    bos: bool = False
    """Whether a text begins with the first token where the file does not say."""
    composed: bool = False
    """Whether a text is brought into Unicode's form NFC first."""
    whole: bool = False
    """Whether a piece that is a token is taken without merging."""


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = Split(_WORDS + r"\p{N}{1,3}" + _REST, bos=True, whole=True)
_QWEN2 = Split(_WORDS + r"\p{N}" + _REST, composed=True)

SPLITS = {
    "gpt-2": Split(_GPT2),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "tekken": Split(_CASED, bos=True, whole=True),
}
"""`tokenizer.ggml.pre` -> row."""


def check(header: Header) -> None:
    """Refuse a file whose tokenizer cannot be written, or must not be used.

    Raises:
        ModelError: its kind is not known, and none stands beside the file; or what it says makes no sense.
    """
    if problem := check_template(header.get(TEMPLATE, str, "")):
        raise ModelError(f"The chat template of {header.path.name} {problem}.", "Do not use this model.")
    if _beside(header):
        return
    for key, kind in NEEDED[_kind(header)].items():
        _list(header, key, kind)


def write(header: Header, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json, generation_config.json and the chat template.

    Raises:
        ModelError: as `check`.
        OSError: writing failed.
    """
    if _beside(header):
        copy_files(header.path.parent, folder)
        return
    text = BUILDERS[_kind(header)](header).to_str()
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(_config(header), indent=2), encoding="utf-8")
    template = header.get(TEMPLATE, str, "")
    if template:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    ends = [header.get(f"{KEY}{name}_token_id", int, -1) for name in ("eos", "eot")]
    generation = special_ids(header) | {"eos_token_id": sorted({number for number in ends if number >= 0}) or None}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2), encoding="utf-8")


def _kind(header: Header) -> str:
    """Key of BUILDERS."""
    if isinstance(header.metadata.get(WHOLE), str):
        return WHOLE
    kind = header.get(f"{KEY}model", str, "")
    split = header.get(f"{KEY}pre", str, "")
    if kind not in BUILDERS or (kind == "gpt2" and split not in SPLITS):
        what = f"kind of tokenizer ({split or 'it names none'})" if kind == "gpt2" else f"tokenizer ({kind or 'none'})"
        raise ModelError(
            f"The {what} of {header.path.name} is not built here.",
            "Put the model's tokenizer.json and tokenizer_config.json beside the file.",
        )
    return kind


def _beside(header: Header) -> bool:
    """Whether a tokenizer for as many tokens stands in the file's folder, and is needed."""
    try:
        _kind(header)
    except ModelError:
        return (header.path.parent / "tokenizer.json").is_file()
    return False


def _config(header: Header) -> dict[str, Any]:
    tokens = _tokens(header)
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: header.get(f"{KEY}{key}_token_id", int, -1) for name, key in names.items()}
    special = {name: tokens[number] for name, number in ids.items() if 0 <= number < len(tokens)}
    context = header.get(f"{header.get('general.architecture', str)}.context_length", int, 0)
    return {
        "tokenizer_class": "TokenizersBackend",
        "backend": "tokenizers",
        "clean_up_tokenization_spaces": False,
        "model_max_length": context or None,
        **special,
    }


def _tokens(header: Header) -> list[str]:
    return _list(header, "tokens", str)


def _list(header: Header, key: str, kind: type | tuple[type, ...]) -> list[Any]:
    values: list[Any] = header.get(KEY + key, list)
    if values and not isinstance(values[0], kind):
        raise broken(header.path, f"its {KEY}{key} is of the wrong kind")
    return values


def _given(header: Header) -> Tokenizer:
    """The one that stands in the file whole."""
    try:
        return Tokenizer.from_str(header.metadata[WHOLE])
    except Exception as error:  # noqa: BLE001 - what the library raises has no kind of its own
        raise broken(header.path, f"its {WHOLE} is none ({str(error)[:80]})") from None


def _byte_pairs(header: Header) -> Tokenizer:
    """GPT-2's kind: bytes written as letters, merged in the order of a list."""
    split = SPLITS[header.get(f"{KEY}pre", str)]
    merges = [tuple(line.split(" ")) for line in _list(header, "merges", str)]
    tokens = _tokens(header)
    vocabulary = {token: number for number, token in enumerate(tokens)}
    try:
        model = models.BPE(vocabulary, merges, ignore_merges=split.whole)
    except Exception as error:  # noqa: BLE001 - what the library raises has no kind of its own
        raise broken(header.path, f"its merges do not fit its tokens ({str(error)[:80]})") from None
    tokenizer = Tokenizer(model)
    if split.composed:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split.pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    _finish(tokenizer, header, bos=split.bos)
    return tokenizer


def _sentencepiece(header: Header) -> Tokenizer:
    """SentencePiece's kind: of all neighbours that make a token, those that make the one with the best score merge."""
    tokens, scores = _tokens(header), _list(header, "scores", (float, int))
    if len(scores) != len(tokens) or max(map(len, tokens), default=0) > MAX_PIECE:
        raise broken(header.path, "its tokens and their scores make no sense")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    ranked = sorted(range(len(tokens)), key=lambda number: -scores[number])
    merges = [pair for number in ranked for pair in _splits(tokens[number], vocabulary)]
    unknown = header.get(f"{KEY}unknown_token_id", int, 0)
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary, merges, unk_token=tokens[unknown] if unknown < len(tokens) else None,
            fuse_unk=True, byte_fallback=True,
        )
    )  # fmt: skip
    prefix = header.get(f"{KEY}add_space_prefix", bool, True)
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)] if prefix else back)
    _finish(tokenizer, header, bos=True)
    return tokenizer


def _splits(token: str, vocabulary: dict[str, int]) -> Iterator[tuple[str, str]]:
    """The pairs of tokens that make up a token."""
    for place in range(1, len(token)):
        if token[:place] in vocabulary and token[place:] in vocabulary:
            yield token[:place], token[place:]


def _finish(tokenizer: Tokenizer, header: Header, *, bos: bool) -> None:
    """Tokens that stand for themselves, and those that every text begins and ends with."""
    tokens = _tokens(header)
    kinds = header.get(f"{KEY}token_type", list, [])
    alone = [
        (kind, AddedToken(token, normalized=False))
        for token, kind in zip(tokens, kinds, strict=False)
        if token and kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    tokenizer.add_special_tokens([token for kind, token in alone if kind != USER_DEFINED])
    tokenizer.add_tokens([token for kind, token in alone if kind == USER_DEFINED])
    first, last = _edge(header, "bos", bos), _edge(header, "eos", False)
    single = [*(token for token, _ in first), "$A", *(token for token, _ in last)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=[*single, "$B:1"], special_tokens=[*first, *last]
    )


def _edge(header: Header, name: str, default: bool) -> list[tuple[str, int]]:
    """The token that every text begins or ends with, and its number; or nothing."""
    tokens, number = _tokens(header), header.get(f"{KEY}{name}_token_id", int, -1)
    wanted = header.get(f"{KEY}add_{name}_token", bool, default)
    return [(tokens[number], number)] if wanted and 0 <= number < len(tokens) else []


BUILDERS = {"llama": _sentencepiece, "gpt2": _byte_pairs, WHOLE: _given}
"""`tokenizer.ggml.model`, or the key of a whole one -> what builds it."""

NEEDED: dict[str, dict[str, type | tuple[type, ...]]] = {
    "llama": {"tokens": str, "scores": (float, int)},
    "gpt2": {"tokens": str, "merges": str},
    WHOLE: {"tokens": str},
}
"""Key of BUILDERS -> lists that the file must hold, and of what."""
