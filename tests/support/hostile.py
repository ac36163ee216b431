"""Model folders that mean harm: each is a good folder and one change, with a canary that dies where the change works.

`FOLDERS` says how each is made; a canary is a file that its code or pickle would make, a file outside that it would
read, or a hub that it would ask. Whether one was touched is told by `Watch`, from the interpreter's own audit events.
"""

from __future__ import annotations

import json
import os
import pickle
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SECRET = "canary-outside"
"""Name of the file beside the folder that nothing may read."""

DEAD = "canary-dead"
"""Name of the file beside the folder that code in it makes."""

Make = Callable[[Path], object]


class Bomb:
    """Makes the dead canary when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.place,)


def edit(path: Path, **values: object) -> None:
    """Put keys into a JSON file; make it where there is none."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(content | values), encoding="utf-8")


def config(**values: object) -> Make:
    return lambda folder: edit(folder / "config.json", **values)


def tokenizer(**values: object) -> Make:
    return lambda folder: edit(folder / "tokenizer_config.json", **values)


def in_file(name: str, **values: object) -> Make:
    return lambda folder: edit(folder / name, **values)


def code(folder: Path, name: str = "modeling_evil.py") -> None:
    """Python that makes the dead canary when it is imported."""
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(
        f"from pathlib import Path\nPath({str(folder.parent / DEAD)!r}).touch()\nEvil = object\n"
    )


def with_code(make: Make) -> Make:
    def both(folder: Path) -> None:
        code(folder)
        make(folder)

    return both


def pickled(folder: Path, name: str) -> None:
    (folder / name).write_bytes(pickle.dumps(Bomb(folder.parent / DEAD)))


def pickle_instead(name: str, *, index: str = "", **keys: object) -> Make:
    """The weights as a pickle under a name, which an index or config.json may point at."""

    def make(folder: Path) -> None:
        if "transformers_weights" not in keys:
            (folder / "model.safetensors").unlink()
        pickled(folder, name)
        if index:
            edit(folder / index, weight_map={"model.embed_tokens.weight": name})
        if keys:
            edit(folder / "config.json", **keys)

    return make


def header(entries: Any, data: bytes = bytes(64), raw: bytes | None = None) -> Make:
    """A weight file with this header over these bytes."""

    def make(folder: Path) -> None:
        text = json.dumps(entries).encode() if raw is None else raw
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)

    return make


def tensor(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def index(name: str) -> Make:
    return lambda folder: edit(folder / "model.safetensors.index.json", weight_map={"a": name.format(folder=folder)})


def contents(name: str, content: bytes) -> Make:
    def make(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)

    return make


def link(name: str, target: str) -> Make:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return make


def fifo(name: str) -> Make:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return make


def a_socket(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    here = Path.cwd()
    os.chdir(folder)  # a socket's path may have 107 bytes at most
    try:
        with socket.socket(socket.AF_UNIX) as end:
            end.bind("tokenizer.json")
    finally:
        os.chdir(here)


def sparse(name: str, size: int) -> Make:
    def make(folder: Path) -> None:
        with (folder / name).open("wb") as stream:
            stream.truncate(size)

    return make


def template(text: str) -> Make:
    return tokenizer(chat_template=text)


ROUND = "{% for i in range(9999) %}{% for j in range(9999) %}x{% endfor %}{% endfor %}"
FOLDERS: dict[str, Make] = {
    # Code of the folder's own, or of a hub.
    "auto_map in config.json": with_code(config(auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})),
    "auto_map in tokenizer_config.json": with_code(tokenizer(auto_map={"AutoTokenizer": ["modeling_evil.Evil", None]})),
    "auto_map in text_config": config(text_config={"auto_map": {"AutoModel": "evil/repo--modeling_evil.Evil"}}),
    "auto_map in a list": config(parts=[{"deep": [{"auto_map": {"AutoModel": "evil/repo--modeling_evil.Evil"}}]}]),
    "auto_map in processor_config.json": in_file("processor_config.json", auto_map={"AutoProcessor": "a.B"}),
    "auto_map in generation_config.json": in_file("generation_config.json", auto_map={"AutoModel": "a.B"}),
    "auto_map on a hub": config(auto_map={"AutoModelForCausalLM": "evil/repo--modeling_evil.Evil"}),
    "custom_pipelines": with_code(config(custom_pipelines={"text": {"impl": "modeling_evil.Evil", "pt": ["A"]}})),
    "python alone": code,
    "custom_generate": lambda folder: code(folder, "custom_generate/generate.py"),
    "python in capitals": lambda folder: code(folder, "EVIL.PY"),
    "compiled python": contents("evil.pyc", b"\0"),
    "kernel, internal": config(_attn_implementation_internal="evil/kernel"),
    "kernel, underscored": config(_attn_implementation="evil/kernel"),
    "kernel, nested": config(text_config={"_attn_implementation_internal": "evil/kernel"}),
    "kernel, plain": config(attn_implementation="evil/kernel"),
    "kernel, by part": config(attn_implementation={"": "sdpa", "text_config": "evil/kernel:forward"}),
    "kernel, as flash attention": config(attn_implementation="flash_attention_2"),
    "kernel of experts": config(experts_implementation="sonicmoe"),
    "kernel of experts, internal": config(_experts_implementation_internal="evil/kernel"),
    "autoset that is no switch": config(_attn_implementation_autoset="evil/kernel"),
    "trust in config.json": config(trust_remote_code=True),
    "trust in tokenizer_config.json": tokenizer(trust_remote_code=True),
    "trust, nested": config(vision_config={"encoder": {"trust_remote_code": 1}}),
    "underscored, of Python": config(__class__="evil"),
    "underscored, unknown": config(_auto_class="AutoModel"),
    "underscored, nested": config(text_config={"_from_pipeline": "evil"}),
    "underscored in generation_config.json": in_file("generation_config.json", _from_evil=1),
    # Pickles where they would be read, and adapters.
    "pickle alone": pickle_instead("pytorch_model.bin"),
    "pickle in the index": pickle_instead("pytorch_model.bin", index="model.safetensors.index.json"),
    "pickle named by config.json": pickle_instead("adapter_model.bin", transformers_weights="adapter_model.bin"),
    "pickle behind a decoy": lambda folder: (
        (folder / "model.safetensors").rename(folder / "decoy.safetensors"), pickled(folder, "pytorch_model.bin")
    ),
    "hidden pickle": pickle_instead("weights.mdl"),
    "adapter beside the model": lambda folder: (
        edit(folder / "adapter_config.json", peft_type="LORA"), pickled(folder, "adapter_model.bin")
    ),
    "adapter with a foreign library": in_file("adapter_config.json", auto_mapping={"parent_library": "evil"}),
    "adapter with megatron": in_file("adapter_config.json", megatron_config={"a": 1}, megatron_core="evil"),
    # Headers.
    "header of 2**60 bytes": contents("model.safetensors", struct.pack("<Q", 2**60) + b"{}" + bytes(64)),
    "header beyond the limit": header(None, raw=b"{" + b" " * (17 * 2**20) + b"}", data=b""),
    "overlap": header({"a": tensor(0, 64, [16]), "b": tensor(32, 64, [8])}),
    "gap": header({"a": tensor(0, 16, [4]), "b": tensor(32, 64, [8])}),
    "negative shape": header({"a": tensor(0, 64, [-16])}),
    "two negative sides": header({"a": tensor(0, 64, [-4, -4])}),
    "negative place": header({"a": tensor(-64, 0, [16])}),
    "backward place": header({"a": tensor(64, 0, [0])}),
    "a name twice": header(None, raw=b'{"a":{"dtype":"F32","shape":[16],"data_offsets":[0,64]},'
                           b'"a":{"dtype":"U8","shape":[64],"data_offsets":[0,64]}}'),
    "unknown dtype": header({"a": tensor(0, 64, [16], "F1")}),
    "shape and length apart": header({"a": tensor(0, 64, [17])}),
    "enormous shape": header({"a": tensor(0, 64, [2**62, 2**62])}),
    "true for a number": header({"a": tensor(0, 64, [True])}),
    "beyond the file": header({"a": tensor(0, 2**40, [2**38])}),
    "deep header": header(None, raw=b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "wide header": header(None, raw=b'{"a":[' + b"[]," * 3_000_000 + b"1]}"),
    "metadata that is no text": header({"__metadata__": {"a": {}}, "b": tensor(0, 64, [16])}),
    "no bytes": contents("model.safetensors", b""),
    "LFS pointer": contents("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
    # Places outside the folder, and what is no file.
    "index to ../": index(f"../{SECRET}"),
    "index to an absolute path": index("{folder}/../" + SECRET),
    "index with backslashes": index(f"..\\{SECRET}.safetensors"),
    "index with NUL": index("a\0.safetensors"),
    "index with an endless name": index("a" * 5_000 + ".safetensors"),
    "index of numbers": lambda folder: edit(folder / "model.safetensors.index.json", weight_map={"a": 1}),
    "link from config.json": link("config.json", f"../{SECRET}"),
    "link from the tokenizer": link("tokenizer.json", f"../{SECRET}"),
    "link from a template": link("chat_template.jinja", f"../{SECRET}"),
    "link to a folder": link("additional_chat_templates", ".."),
    "link to nothing": link("merges.txt", "../nothing"),
    "link to itself": link("merges.txt", "merges.txt"),
    "link to a device": link("model.safetensors", "/dev/zero"),
    "vocabulary outside": lambda folder: edit(
        folder / "tokenizer_config.json", vocab_file=str(folder.parent / SECRET)
    ),
    "versioned tokenizer outside": tokenizer(fast_tokenizer_files=["../x/tokenizer.4.0.0.json"]),
    "pipe for config.json": fifo("config.json"),
    "pipe for weights": fifo("model.safetensors"),
    "pipe for a tokenizer": fifo("tokenizer.json"),
    "pipe for a template": fifo("chat_template.jinja"),
    "pipe for a manifest": fifo("nibble.json"),
    "socket": a_socket,
    # Files that fill the memory or never end.
    "deep config.json": contents("config.json", b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "deep list in config.json": contents("config.json", b'{"a":' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}"),
    "wide config.json": contents("config.json", b'{"a":[' + b"[]," * 6_000_000 + b"1]}"),
    "endless number": contents("config.json", b'{"a": ' + b"9" * 1_000_000 + b"}"),
    "config.json that is a list": contents("config.json", b"[1]"),
    "a milliard layers": config(num_hidden_layers=10**9),
    "a milliard layers, nested": config(text_config={"num_hidden_layers": 10**9}),
    "a vocabulary without end": config(vocab_size=10**15),
    "infinite size": contents("config.json", b'{"model_type": "llama", "hidden_size": Infinity}'),
    "tokenizer.json that is none": contents("tokenizer.json", b"\x80\x04canary"),
    "tokenizer.json without end": sparse("tokenizer.json", 2**40),
    "deep tokenizer_config.json": contents("tokenizer_config.json", b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "tokenizer.model without end": sparse("tokenizer.model", 2**40),
    # Quantizers and classes that are looked up by name.
    "foreign quantizer": config(quantization_config={"quant_method": "quark"}),
    "quantizer in a part": config(text_config={"quantization_config": {"quant_method": "fp8"}}),
    "two quantizers": config(quantization_config={"quant_method": "nibble", "low_bit": "nf4", "load_in_4bit": True}),
    "nameless quantizer": config(quantization_config={"load_in_8bit": True}),
    "tokenizer that calls itself": tokenizer(tokenizer_class="AutoTokenizer"),
    "tokenizer that fetches": tokenizer(tokenizer_class="RagTokenizer"),
    "tokenizer that is none": tokenizer(tokenizer_class="pipeline"),
    "tokenizer with arguments": tokenizer(init_inputs=[f"../{SECRET}"]),
    "tokenizer class in config.json": config(tokenizer_class="AutoModelForCausalLM"),
    "backbone from a hub": config(backbone="evil/backbone", use_pretrained_backbone=True),
    # Chat templates whose text tells.
    "template that counts": template("{% for i in range(10**9) %}x{% endfor %}"),
    "template with a large range": template("{% for i in range(1000000000) %}x{% endfor %}"),
    "template of loops in loops": template(ROUND),
    "template with a power": template("{{ 9**9**9 }}"),
    "template with a class": template("{{ ''.__class__.__mro__ }}"),
    "template with attr": template("{{ ''|attr('__class__') }}"),
    "template with an item": template("{{ ''['__class__'] }}"),
    "template with a format": template("{{ '{0.__init__.__globals__}'.format(messages) }}"),
    "template that includes": template("{% include '/etc/passwd' %}"),
    "template of 70,000 characters": template("x" * 70_000),
    "deep template": template("{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}"),
    "deep sum in a template": template("{{ 1" + "+1" * 20_000 + " }}"),
    "template in chat_template.jinja": contents("chat_template.jinja", ROUND.encode()),
    "template in chat_template.json": in_file("chat_template.json", chat_template=ROUND),
    "template in processor_config.json": in_file("processor_config.json", chat_template=ROUND),
    "template in additional_chat_templates": contents("additional_chat_templates/tool.jinja", ROUND.encode()),
    "template among several": tokenizer(chat_template=[{"name": "default", "template": "x"},
                                                       {"name": "tool", "template": ROUND}]),
    "template that is no text": contents("chat_template.jinja", b"\xff\xfe\0"),
}  # fmt: skip

BOMBS: dict[str, Make] = {
    "doubles": template(
        "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}"
    ),
    "multiplies while it is compiled": template("{{ 'a' * 99999 * 99999 }}"),
    "loops over what it makes": template(
        "{% set n = range(99999) %}{% for i in n %}{% for j in n %}{% endfor %}{% endfor %}"
    ),
    "grows": template("{% for i in range(99999) %}{{ messages[0].content }}{% endfor %}"),
    "in another file": contents(
        "additional_chat_templates/rag.jinja", b"{% set n = range(99999) %}{% for i in n %}{% for j in n %}{% endfor %}"
        b"{% endfor %}"
    ),
}  # fmt: skip
"""Templates whose text is harmless to look at."""


@dataclass
class Watch:
    """What the interpreter did while it was watched that it must not."""

    outside: Path
    """The folder around the hostile one."""
    deeds: list[str] = field(default_factory=list)
    watching: bool = False

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.watching:
            return
        if event == "open" and isinstance(args[0], str) and args[0].endswith((SECRET, ".py", ".PY", ".pyc")):
            if Path(args[0]).is_relative_to(self.outside) or SECRET in args[0]:
                self.deeds.append(f"opened {args[0]}")
        elif event in ("socket.getaddrinfo", "socket.connect"):
            self.deeds.append(f"{event} {args}")
        elif event == "pickle.find_class":
            self.deeds.append(f"unpickled {args}")

    @contextmanager
    def over(self) -> Iterator[None]:
        self.watching = True
        try:
            yield
        finally:
            self.watching = False

    @property
    def canaries(self) -> list[str]:
        return self.deeds + [str(path) for path in self.outside.rglob(DEAD)]


def watch(outside: Path) -> Watch:
    """A watch over what happens around a folder; an audit hook stays as long as the interpreter, and sleeps."""
    found = Watch(outside)
    sys.addaudithook(found.hook)
    return found
