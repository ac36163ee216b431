"""A file made into text: whether it is one, in which encoding, and its lines.

Promises to hold about a chunk in memory however long the file is, and to name what a file is when it is not text:
compressed, binary, in a foreign encoding, a pipe, a folder. Knows nothing of JSON or CSV.
"""

from __future__ import annotations

import codecs
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from nibble.errors import DataError

CHUNK = 2**20
"""Bytes read at once."""

MAX_ROW = 4_000_000
"""Longest row in characters. One that is longer holds a whole file by mistake, or never ends."""

BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    # UTF-32's little-endian mark begins with UTF-16's, so it is looked for first.
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""Byte order mark -> the codec that reads on from it."""

SIGNATURES = (
    (b"\x1f\x8b", "is compressed with gzip", "Unpack it first: gunzip."),
    (b"PK\x03\x04", "is a zip archive or an Excel workbook", "Unpack it, or save the sheet as CSV in UTF-8."),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd", "Unpack it first: unzstd."),
    (b"BZh", "is compressed with bzip2", "Unpack it first: bunzip2."),
    (b"\xfd7zXZ", "is compressed with xz", "Unpack it first: unxz."),
    (b"7z\xbc\xaf", "is a 7z archive", "Unpack it first."),
    (b"PAR1", "is a Parquet file", "Give it the ending .parquet."),
    (b"ARROW1", "is an Arrow file", "Save it as .parquet or .jsonl."),
    (b"%PDF", "is a PDF", "Save its text as JSON Lines."),
    (b"SQLite format 3", "is an SQLite database", "Export the table as CSV or JSON Lines."),
    (b"\x80\x04\x95", "is a Python pickle, which is never opened", "Save it as JSON Lines or CSV."),
    (b"version https://git-lfs", "is a Git LFS pointer, not the data itself", "Fetch the file: git lfs pull."),
    (b"<!DOCTYPE", "is a web page, not the data itself", "Download the file by its raw address."),
    (b"<!doctype", "is a web page, not the data itself", "Download the file by its raw address."),
    (b"<html", "is a web page, not the data itself", "Download the file by its raw address."),
)
"""First bytes -> what such a file is, and what to do."""

SPECIAL = (
    (stat.S_ISDIR, "is a folder"),
    (stat.S_ISFIFO, "is a pipe"),
    (stat.S_ISSOCK, "is a socket"),
    (stat.S_ISCHR, "is a device"),
    (stat.S_ISBLK, "is a device"),
)


def check_plain(path: Path, suffixes: tuple[str, ...]) -> None:
    """Refuse what is not a plain, readable, non-empty file.

    Raises:
        DataError: missing, not permitted, a folder, a pipe, a device, or empty.
    """
    try:
        status = path.stat()
        what = next((what for test, what in SPECIAL if test(status.st_mode)), "")
        if what == "is a folder":
            found = sorted(file.name for file in path.iterdir() if file.suffix.lower() in suffixes)[:5]
            raise DataError(f"{path.name} is a folder.", f"Name a file in it: {', '.join(found) or 'it holds none'}.")
        if what:
            raise DataError(f"{path.name} {what}, not a file.", "Save the data into a file first.")
        if not status.st_size:
            raise DataError(f"{path.name} is empty: it has no bytes.", "Choose a file that holds rows.")
        with path.open("rb"):
            pass
    except FileNotFoundError:
        raise DataError(f"There is no file {path}.", "Check the name.") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path.name or path} cannot be read: {reason}.", "Check its name and permissions.") from None


def check_signature(path: Path, own: bytes = b"") -> None:
    """Refuse a file whose first bytes say that it is something else than text, or than `own`.

    Raises:
        DataError: naming what it is.
    """
    with path.open("rb") as stream:
        head = stream.read(32)
    if own and head.startswith(own):
        return
    for magic, what, hint in SIGNATURES:
        if head.lstrip().startswith(magic):
            raise DataError(f"{path.name} {what}.", hint)


def read_text(path: Path) -> Iterator[str]:
    """The text of a file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark, about a chunk at a time.

    Raises:
        DataError: bytes that are not text, naming the line and, as far as it can be told, the encoding.
    """
    line, decoder = 1, None
    with path.open("rb") as stream:
        while True:
            data = stream.read(CHUNK)
            if decoder is None:
                codec = next((codec for mark, codec in BOMS if data.startswith(mark)), "utf-8")
                decoder = codecs.getincrementaldecoder(codec)()
            if codec.startswith("utf-8") and b"\0" in data:
                raise _nul(path, line + data.count(b"\n", 0, data.index(b"\0")))
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                line += error.object[: error.start].decode(error.encoding, "ignore").count("\n")
                raise _not_text(path, line, error, codec) from None
            if "\0" in text:
                raise _nul(path, line + text.count("\n", 0, text.index("\0")))
            yield text
            line += text.count("\n")
            if not data:
                return


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number, from 1, and text of each line, without its end; blank lines too.

    Lines end at LF or CRLF only: U+2028 and its like may stand inside a JSON string.

    Raises:
        DataError: as `read_text`; a line longer than `MAX_ROW`.
    """
    number, rest = 0, ""
    for text in read_text(path):
        *whole, rest = (rest + text).split("\n")
        for line in whole:
            number += 1
            if len(line) > MAX_ROW:
                raise too_long(path, f"line {number}")
            yield number, line.removesuffix("\r")
        if len(rest) > MAX_ROW:
            raise too_long(path, f"line {number + 1}")
    if rest:
        yield number + 1, rest.removesuffix("\r")


def too_long(path: Path, where: str) -> DataError:
    """The refusal of a row that is longer than `MAX_ROW`."""
    return DataError(
        f"{where.capitalize()} of {path.name} is longer than {MAX_ROW:,} characters, or never ends.",
        "Write one row a line, and split very long texts.",
    )


def _nul(path: Path, line: int) -> DataError:
    return DataError(
        f"Line {line} of {path.name} holds a NUL byte: the file is binary, or UTF-16 without its mark.",
        "Save it as UTF-8 text.",
    )


def _not_text(path: Path, line: int, error: UnicodeDecodeError, codec: str) -> DataError:
    if error.reason in ("unexpected end of data", "truncated data"):
        return DataError(
            f"{path.name} is cut short: line {line}, its last, ends in the middle of a character.", "Get it again."
        )
    if codec != "utf-8":
        return DataError(f"Line {line} of {path.name} is not valid {codec.upper()}.", "Save the file as UTF-8.")
    # The other lines may be sound: only this one tells.
    start = error.object.rfind(b"\n", 0, error.start) + 1
    name = _guess(error.object[start:].split(b"\n", 1)[0])
    if not name:
        return DataError(
            f"Line {line} of {path.name} is not text in UTF-8.",
            "Save it as UTF-8: in Excel as `CSV UTF-8`, in an editor with the encoding UTF-8.",
        )
    return DataError(
        f"Line {line} of {path.name} is not UTF-8; the file looks like {name}.",
        f"Save it as UTF-8, for example: iconv -f {name} -t UTF-8 {path.name} > new{path.suffix}",
    )


def _guess(data: bytes) -> str:
    """The encoding in which bytes that are not UTF-8 are surely text; empty where none is: a wrong name misleads."""
    data = data[: 2**16]
    for name, codec, sure in GUESSES:
        try:
            text = codecs.getincrementaldecoder(codec)().decode(data)
        except UnicodeDecodeError:
            continue
        if any(ord(character) > 0x7F for character in text) and sure(text):
            return name
    return ""


def _share(text: str, inside: Callable[[str], bool]) -> float:
    """Of the characters beyond ASCII, how many are of a kind."""
    foreign = [character for character in text if ord(character) > 0x7F]
    return sum(map(inside, foreign)) / len(foreign)


def _kana(character: str) -> bool:
    return "\u3040" <= character <= "\u30ff"


def _hangul(character: str) -> bool:
    return "\uac00" <= character <= "\ud7a3"


def _common_chinese(character: str) -> bool:
    """Whether a character is one of the 3,755 of GB 2312's first level, or Chinese punctuation."""
    coded = character.encode("gbk", "replace")
    return len(coded) == 2 and (0xB0 <= coded[0] <= 0xD7 and coded[1] >= 0xA1 or coded[0] in (0xA1, 0xA3))


def _western(text: str) -> bool:
    """Whether letters with marks stand thinly among plain ones."""
    letters = [character for character in text if character.isalpha()]
    foreign = [character for character in text if ord(character) > 0x7F]
    marked = sum("\xc0" <= character <= "\xff" for character in foreign)
    return len(foreign) < 0.4 * len(letters) and marked >= 0.7 * len(foreign)


GUESSES: tuple[tuple[str, str, Callable[[str], bool]], ...] = (
    # Japanese mixes kana with other characters, so a smaller share of it tells.
    ("SHIFT-JIS", "shift_jis", lambda text: _share(text, _kana) >= 0.3),
    # Chinese read as Korean has Hangul too, but never so much of it.
    ("EUC-KR", "euc_kr", lambda text: _share(text, _hangul) >= 0.97 and sum(map(_hangul, text)) >= 6),
    ("GBK", "gb18030", lambda text: _share(text, _common_chinese) >= 0.7),
    ("WINDOWS-1252", "cp1252", _western),
)
"""Name of an encoding, its codec, and what tells that a text was surely written in it; in this order."""
