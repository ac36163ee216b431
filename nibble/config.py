"""Settings: every one a field with its default and a line of prose; flag > environment > config.yaml > default.

Promises that a bad setting is named with its place and that nothing is read at import. Knows nothing of what the
settings are used for.
"""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from nibble.errors import ConfigError

MAX_BYTES = 1_000_000

HUBS = ("huggingface", "hf-mirror", "modelscope")
"""Where models come from. An address in place of a name is a mirror that speaks Hugging Face's protocol."""


def setting(default: Any, prose: str, *, env: str = "") -> Any:
    """A settings field: its default, what it means, and a second environment variable that is honoured."""
    return field(default=default, metadata={"prose": prose, "env": env})


@dataclass(frozen=True)
class Settings:
    """Everything that can be set. config.yaml mirrors this class, in this order; a test holds them together."""

    host: str = setting("127.0.0.1", "address to listen on; another one needs `auth`, or `public: true`")
    port: int = setting(7860, "port to listen on", env="GRADIO_SERVER_PORT")
    root_path: str = setting(
        "", "path or full public URL under which a proxy serves the page, such as /dsw-123/proxy/7860",
        env="GRADIO_ROOT_PATH",
    )  # fmt: skip
    public_origins: tuple[str, ...] = setting((), "further origins that may call the page, such as https://example.org")
    auth: str = setting("", "user:password that visitors must give; empty is none")
    public: bool = setting(False, "strangers may chat; operator endpoints (load, unload, ...) then do not exist")
    home: str = setting("~/.nibble", "folder of models, adapters, runs and chats")
    model: str = setting("guide", "model loaded at start: a name in home/models, `guide`, or a folder")
    low_bit: str = setting("sym_int4", "format in which a full-precision model is loaded")
    device: str = setting("auto", "auto, cpu, xpu or cuda")
    engine: str = setting("nibble", "nibble, or bigdl: models run in BigDL-LLM / IPEX-LLM itself (`make bigdl`)")
    bigdl_python: str = setting(".venv-bigdl/bin/python", "the Python of the environment with ipex-llm or bigdl-llm")
    trust_remote_code: tuple[str, ...] = setting(
        (), "names of models whose own Python code may run; never from the page"
    )
    hubs: tuple[str, ...] = setting(
        ("huggingface",),
        "hubs that a download tries, in this order: huggingface, hf-mirror, modelscope, or a mirror's URL",
    )
    queue_size: int = setting(256, "requests that may wait; a further one is told that the server is full")
    max_new_tokens_limit: int = setting(4096, "longest answer that a visitor may ask for, in tokens")

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65_535:
            raise ConfigError(f"port is {self.port}.", "It must lie between 0 and 65535; 0 takes any free one.")
        if self.device not in ("auto", "cpu", "xpu", "cuda"):
            raise ConfigError(f"device is {self.device!r}.", "It must be auto, cpu, xpu or cuda.")
        if self.engine not in ("nibble", "bigdl"):
            raise ConfigError(f"engine is {self.engine!r}.", "It must be nibble or bigdl.")
        if self.auth and not all(self.auth.partition(":")):
            raise ConfigError("auth is not of the form user:password.", 'Write it as auth: "user:password".')
        for hub in self.hubs:
            if hub not in HUBS and not hub.startswith(("https://", "http://")):
                raise ConfigError(
                    f"hubs names {hub!r}.",
                    f"Hubs are {', '.join(HUBS)}, or a mirror's address that begins with https://.",
                )
        for name in ("queue_size", "max_new_tokens_limit"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}.", "It must be 1 or more.")

    @property
    def home_folder(self) -> Path:
        """`home`, with ~ opened."""
        return Path(self.home).expanduser()


def _boolean(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    if text in ("true", "yes", "on", "1"):
        return True
    if text in ("false", "no", "off", "0", ""):
        return False
    raise ValueError


def _integer(value: Any) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError
    return int(value)


def _text(value: Any) -> str:
    if isinstance(value, (list, dict, bool)):
        raise ValueError
    return "" if value is None else str(value)


def _names(value: Any) -> tuple[str, ...]:
    items = value.split(",") if isinstance(value, str) else [] if value is None else value
    if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) for item in items):
        raise ValueError
    return tuple(item.strip() for item in items if item.strip())


CASTS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "str": (_text, "text"),
    "int": (_integer, "a whole number"),
    "bool": (_boolean, "true or false"),
    "tuple[str, ...]": (_names, "a list of names"),
}
"""Type of a field -> how a value from a flag, the environment or YAML becomes it, and how to say so."""


def _cast(name: str, value: Any, place: str) -> Any:
    cast, kind = CASTS[str(Settings.__dataclass_fields__[name].type)]
    try:
        return cast(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{place}: {name} is {value!r}.", f"It must be {kind}.") from None


class StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice and aliases, which plain YAML lets pass."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.constructor.ConstructorError(None, None, "aliases are not accepted", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key_node.value} is set twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file of at most 1 MB.

    Raises:
        ConfigError: the file is missing, too large, not UTF-8, not YAML, not a mapping, or sets a key twice.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path} is larger than 1 MB.", "A settings file is a few lines of `key: value`.")
        value = yaml.load(path.read_text(encoding="utf-8"), StrictLoader)  # noqa: S506 - a SafeLoader, made stricter
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.", "Name an existing file.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text.", "Save it as UTF-8.") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        raise ConfigError(
            f"{where}: {getattr(error, 'problem', None) or 'not valid YAML'}.", "Mend that line."
        ) from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is not a list of settings.", "Write one `key: value` a line.")
    return value


def check_keys(given: Mapping[str, Any], known: list[str], place: str) -> None:
    """Refuse a key that is not known, naming the nearest one.

    Raises:
        ConfigError: the first unknown key.
    """
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Known settings: {', '.join(known)}."
            raise ConfigError(f"{place}: there is no setting {key!r}.", hint)


def load_settings(
    flags: Mapping[str, Any] | None = None,
    config_file: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> Settings:
    """Settings from all four sources; the earlier in flag > environment > file > default wins.

    Args:
        flags: values from the command line; None means not given.
        config_file: a YAML file; None reads the config.yaml that ships with Nibble.
        environ: the environment; None is this process's. `NIBBLE_PORT` sets `port`, and so on.

    Raises:
        ConfigError: a setting that is unknown or has the wrong type, with its place.
    """
    environ = os.environ if environ is None else environ
    path = config_file or Path(__file__).parents[1] / "config.yaml"
    from_file = read_yaml(path) if config_file or path.exists() else {}
    names = [item.name for item in fields(Settings)]
    check_keys(from_file, names, str(path))
    values = {name: _cast(name, value, str(path)) for name, value in from_file.items()}
    for item in fields(Settings):
        for variable in (item.metadata["env"], f"NIBBLE_{item.name.upper()}"):
            if environ.get(variable):
                values[item.name] = _cast(item.name, environ[variable], variable)
    for name, value in (flags or {}).items():
        if value is not None:
            values[name] = _cast(name, value, f"--{name.replace('_', '-')}")
    return Settings(**values)


def add_flags(parser: argparse.ArgumentParser, names: list[str]) -> None:
    """Give a parser `--config` and one flag for each named setting; `settings_from` reads them."""
    parser.add_argument("--config", metavar="FILE", help="settings file instead of config.yaml")
    for item in fields(Settings):
        if item.name in names:
            parser.add_argument(
                f"--{item.name.replace('_', '-')}", dest=item.name, metavar=item.name.upper(),
                help=f"{item.metadata['prose']} (default: {item.default})",
            )  # fmt: skip


def settings_from(arguments: argparse.Namespace) -> Settings:
    """Settings from parsed flags, the environment and the file.

    Raises:
        ConfigError: as `load_settings`.
    """
    names = {item.name for item in fields(Settings)}
    flags = {name: value for name, value in vars(arguments).items() if name in names}
    return load_settings(flags, Path(arguments.config) if arguments.config else None)
