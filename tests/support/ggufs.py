"""GGUF files of Hugging Face models, written with the `gguf` package: its names for tensors, its quantizers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM

Change = Callable[[gguf.GGUFWriter], None]
"""Adds to a file, or changes it, before it is written."""


def write_gguf(
    folder: Path, path: Path, kind: str = "F32", tokenizer: tuple[Path, str] | None = None, also: Change | None = None
) -> Path:
    """Write the model in a folder as llama.cpp's converter does.

    Args:
        folder: a Hugging Face model.
        path: of the file.
        kind: type of the matrices, where their width allows it, and after a slash that of the embedding where it
            differs; norms and biases are F32.
        tokenizer: as `write_tokenizer`; None writes none.
        also: called before the file is written.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = model.config
    arch = config.model_type
    writer = gguf.GGUFWriter(path, arch)
    _write_sizes(writer, config)
    if tokenizer is not None:
        write_tokenizer(writer, *tokenizer)
    names = gguf.get_tensor_name_map(_arch(arch), config.num_hidden_layers)
    matrices, _, table = kind.partition("/")
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        values = tensor.float()
        if arch == "llama" and any(part in name for part in ("q_proj", "k_proj")):
            values = pairs(values, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        kind_here = table or matrices if "embed_tokens" in name else matrices
        put(writer, names.get_name(name, (".weight", ".bias")), values.numpy(), kind_here)
    if also is not None:
        also(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pairs(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's order of the rows of q and k (`LlamaModel.permute` of convert_hf_to_gguf.py)."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def put(writer: gguf.GGUFWriter, name: str, values: np.ndarray, kind: str) -> None:
    """Add a tensor in a type; F32 where it is no matrix, F16 where its rows are no whole blocks."""
    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]
    if values.ndim == 1:
        kind = "F32"
    elif values.shape[-1] % block:
        kind = "F16"
    number = gguf.GGMLQuantizationType[kind]
    if kind in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"):
        data = k_quants(values.shape, number)
    else:
        data = gguf.quants.quantize(np.ascontiguousarray(values), number)
    writer.add_tensor(name, data, raw_dtype=number)


def k_quants(shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Blocks of a k-quant that no quantizer wrote (the package has none): any codes, and scales that are small."""
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(7).integers(0, 256, (*shape[:-1], shape[-1] // block, nbytes), dtype=np.uint8)
    places = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[kind.name]
    for place in places:
        data[..., place : place + 2] = np.array([1e-4], np.float16).view(np.uint8)
    return data.reshape(*shape[:-1], -1)


def _arch(name: str) -> Any:
    return next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)


def _write_sizes(writer: gguf.GGUFWriter, config: Any) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if config.model_type == "llama":
        writer.add_rope_dimension_count(head_dim)
        writer.add_vocab_size(config.vocab_size)
    if config.model_type == "qwen3":
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)


def write_tokenizer(writer: gguf.GGUFWriter, folder: Path, pre: str) -> None:
    """The tokenizer of a folder, as llama.cpp's converter puts it: SentencePiece where `pre` is empty."""
    if pre:
        _write_byte_pairs(writer, folder, pre)
    else:
        _write_sentencepiece(writer, folder / "tokenizer.model")
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    template = folder / "chat_template.jinja"
    if config.get("chat_template") or template.exists():
        writer.add_chat_template(config.get("chat_template") or template.read_text(encoding="utf-8"))


def _write_sentencepiece(writer: gguf.GGUFWriter, path: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(str(path))
    kinds = []
    for number in range(len(model)):
        kind = gguf.TokenType.NORMAL
        for kind_here, holds in (
            (gguf.TokenType.UNKNOWN, model.IsUnknown), (gguf.TokenType.CONTROL, model.IsControl),
            (gguf.TokenType.UNUSED, model.IsUnused), (gguf.TokenType.BYTE, model.IsByte),
        ):  # fmt: skip
            kind = kind_here if holds(number) else kind
        kinds.append(kind)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([model.IdToPiece(number) for number in range(len(model))])
    writer.add_token_scores([model.GetScore(number) for number in range(len(model))])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(model.bos_id())
    writer.add_eos_token_id(model.eos_id())
    writer.add_unk_token_id(model.unk_id())


def _write_byte_pairs(writer: gguf.GGUFWriter, folder: Path, pre: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = {number: token for token, number in tokenizer.get_vocab().items()}
    added = {entry["id"]: entry["special"] for entry in state["added_tokens"]}
    kinds = [
        gguf.TokenType.NORMAL
        if number not in added
        else gguf.TokenType.CONTROL
        if added[number]
        else gguf.TokenType.USER_DEFINED
        for number in range(len(vocabulary))
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([vocabulary[number] for number in range(len(vocabulary))])
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in state["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
