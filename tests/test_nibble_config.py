"""Settings: precedence, and a sentence with its place for whatever is wrong."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nibble.config import Settings, load_settings, read_yaml
from nibble.errors import ConfigError, NibbleError

SHIPPED = Path(__file__).parents[1] / "config.yaml"


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_shipped_file_holds_every_setting_with_its_default() -> None:
    assert load_settings({}, SHIPPED, {}) == Settings()
    assert list(read_yaml(SHIPPED)) == list(Settings.__dataclass_fields__)


def test_a_comment_stands_over_every_key() -> None:
    lines = SHIPPED.read_text(encoding="utf-8").splitlines()
    keys = [number for number, line in enumerate(lines) if line and not line.startswith("#")]
    assert all(lines[number - 1].startswith("#") for number in keys)


def test_flag_wins_over_environment_over_file_over_default(tmp_path: Path) -> None:
    path = write(tmp_path, "port: 1001\n")
    assert load_settings({}, path, {}).port == 1001
    assert load_settings({}, path, {"GRADIO_SERVER_PORT": "1002"}).port == 1002
    assert load_settings({}, path, {"GRADIO_SERVER_PORT": "1002", "NIBBLE_PORT": "1003"}).port == 1003
    assert load_settings({"port": "1004"}, path, {"NIBBLE_PORT": "1003"}).port == 1004
    assert load_settings({"port": None}, path, {}).port == 1001


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prot: 1", ["prot", "port"]),
        ("port: 1\nport: 2", ["line 2", "port"]),
        ("port: many", ["port", "whole number"]),
        ("port: 1.5", ["port", "whole number"]),
        ("port: true", ["port", "whole number"]),
        ("port: 99999", ["port", "65535"]),
        ("public: maybe", ["public", "true or false"]),
        ("public_origins: 3", ["public_origins", "list"]),
        ("device: tpu", ["device", "xpu"]),
        ("auth: nobody", ["auth", "user:password"]),
        ("- a\n- b", ["key: value"]),
        ("host: !!python/object/apply:os.system ['true']", ["line 1"]),
        ("host: &a x\nmodel: *a", ["aliases", "line 2"]),
        ("host: [", ["line"]),
        ("\thost: x", ["line 1"]),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings({}, write(tmp_path, text), {})
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert caught.value.exit_code == 2


def test_a_missing_file_that_was_asked_for_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        load_settings({}, tmp_path / "none.yaml", {})


@given(st.binary(max_size=300))
def test_any_bytes_give_settings_or_a_sentence(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(content)
    try:
        assert isinstance(load_settings({}, path, {}), Settings)
    except NibbleError as error:
        assert error.message


@given(
    key=st.sampled_from(list(Settings.__dataclass_fields__)),
    value=st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.lists(st.integers())
    ),
)
def test_any_value_gives_settings_or_a_sentence(key: str, value: object) -> None:
    try:
        assert isinstance(load_settings({key: value}, SHIPPED, {}), Settings)
    except NibbleError as error:
        assert key in error.message
