"""Unpack files for a search: archives, compressed files, tables, and encoded text.

Everything is bounded: the depth of nested archives, and the bytes unpacked from a file.
"""

from __future__ import annotations

import base64
import bz2
import gzip
import lzma
import re
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import IO, Any

import numpy as np
import polars as pl

MAX_DEPTH = 4
"""Most levels of nested archives."""
MIN_BYTES, MAX_RATIO, MAX_BYTES = 64 << 20, 100, 4 << 30
"""Bytes that a file may unpack to: at most `MAX_RATIO` times its size, clamped to `MIN_BYTES` and `MAX_BYTES`."""

SIZE, OVERLAP = 4 << 20, 8192
"""Bytes of a piece that is searched at once, and of its overlap with the next piece."""

_IN_MEMORY = 32 << 20  # bytes of a member; a larger one lies on disk
_PIECE = 1 << 20  # bytes
_ROWS = 10_000  # of a table at a time
_PICKLED = re.compile(rb"\x80[\x02-\x05][\x95\x8c\x8ac(}\])KMJXUNG]")
_OPENING = (zipfile.BadZipFile, tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError, RuntimeError)
_OPENING_TABLES = (pl.exceptions.PolarsError, pl.exceptions.PanicException)


class UnsearchableError(Exception):
    """Content that can't be searched; the text says why."""


@dataclass(slots=True)
class UnpackBudget:
    """Bytes that may still be unpacked from one file."""

    left: int

    @classmethod
    def of(cls, size: int) -> UnpackBudget:
        """The budget for a file of `size` bytes."""
        return cls(min(MAX_BYTES, max(MIN_BYTES, MAX_RATIO * size)))

    def take(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise UnsearchableError("it unpacks to more than can be searched")


@dataclass(frozen=True, slots=True)
class UnpackedFile:
    """Unpacked content (seekable), and its names from the outermost archive inwards."""

    names: tuple[str, ...]
    content: IO[bytes]


def unpacked_files(
    content: IO[bytes], budget: UnpackBudget, names: tuple[str, ...] = (), *, nested: bool = True
) -> Iterator[UnpackedFile]:
    """Yield the content itself, then each of its members, recursively.

    `names`: of the archives that it lies in; `nested`: whether to open archives in archives.

    Raises:
        UnsearchableError: an archive is damaged, encrypted, too deep or too large, or of a kind that can't be opened.
    """
    yield UnpackedFile(names, content)
    opener = _opener(content)
    if opener is None or (names and not nested):
        return
    if len(names) >= MAX_DEPTH:
        raise UnsearchableError(f"more than {MAX_DEPTH} archives lie in each other")
    members = opener(content)
    with closing(members):
        while True:
            try:
                entry = next(members, None)
            except _OPENING as error:
                raise UnsearchableError(f"an archive that can't be opened ({error})") from error
            if entry is None:
                return
            name, stream = entry
            with tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY) as member:
                try:
                    _copy(stream, member, budget)
                except _OPENING as error:
                    raise UnsearchableError(f"an archive that can't be opened ({error})") from error
                member.seek(0)
                yield from unpacked_files(member, budget, (*names, name), nested=nested)


def is_pickle(content: IO[bytes]) -> bool:
    """Whether the content starts like a pickle."""
    return _PICKLED.match(_head(content, 4)) is not None


def pieces(content: IO[bytes]) -> Iterator[tuple[bytes, int]]:
    """The content in overlapping pieces, each with the number of lines before it.

    Pieces end after a space, quote or line break if there is one: half a hash must not look like a key.
    """
    content.seek(0)
    kept, lines, new = b"", 0, content.read(SIZE)
    while new:
        following, piece = content.read(SIZE), kept + new
        end = max(piece.rfind(sign, len(piece) - OVERLAP // 2) for sign in (b" ", b'"', b"\n")) + 1
        cut = end if end and following else len(piece)
        yield piece[:cut], lines
        begin = max(0, cut - OVERLAP)
        lines += piece.count(b"\n", 0, begin)
        kept, new = piece[begin:], following


def header(content: IO[bytes]) -> bytes | None:
    """The JSON header of a safetensors file; None if it is not one."""
    start = _head(content, 8)
    size = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    content.seek(0, 2)
    if not 2 <= size <= min(content.tell() - 8, 100 << 20):  # the format's own limit of a header
        return None
    return _head(content, 8 + size)[8:]


# --- containers ------------------------------------------------------------------------------------------------------

Members = Generator[tuple[str, IO[bytes]], None, None]


def _opener(content: IO[bytes]) -> Callable[[IO[bytes]], Members] | None:
    head = _head(content, 512)
    for start, opener in _OPENERS.items():
        if head.startswith(start):
            return opener
    if head[257:262] == b"ustar":
        return _tar
    content.seek(0)
    is_zip = zipfile.is_zipfile(content)  # also behind something else, as in a program that unpacks itself
    content.seek(0)
    return _zip if is_zip else None


def _zip(content: IO[bytes]) -> Members:
    with zipfile.ZipFile(content) as archive:
        for entry in archive.infolist():
            with archive.open(entry) as member:
                yield entry.filename, member


def _tar(content: IO[bytes]) -> Members:
    with tarfile.open(fileobj=content, mode="r:") as archive:
        for entry in archive:
            member = archive.extractfile(entry) if entry.isfile() else None
            if member is not None:
                yield entry.name, member


def _compressed(name: str, open_stream: Callable[[IO[bytes]], Any], content: IO[bytes]) -> Members:
    with open_stream(content) as member:
        yield name, member


def _parquet(content: IO[bytes]) -> Members:
    """The rows of its columns with texts, as lines of JSON. Columns are compressed, so the file itself can't be
    searched.
    """
    try:
        frame = pl.read_parquet(content)
        bytes_ = [name for name, kind in frame.schema.items() if kind == pl.Binary]
        numbers = [name for name, kind in frame.schema.items() if kind.is_numeric() or kind.is_temporal()]
        texts = frame.drop(numbers).with_columns(pl.col(name).bin.encode("base64") for name in bytes_)
        for start in range(0, len(texts) if texts.width else 0, _ROWS):
            with tempfile.TemporaryFile() as lines:
                texts.slice(start, _ROWS).write_ndjson(lines)
                lines.seek(0)
                yield f"(rows from {start})", lines
    except _OPENING_TABLES as error:
        raise UnsearchableError("a table that can't be read") from error


def _closed(content: IO[bytes]) -> Members:
    yield from ()
    raise UnsearchableError("an archive of a kind that can't be opened (zip, tar, gz, bz2 and xz can)")


_OPENERS: dict[bytes, Callable[[IO[bytes]], Members]] = {
    b"PK\3\4": _zip,
    b"\x1f\x8b": partial(_compressed, "(gzip)", gzip.open),
    b"BZh": partial(_compressed, "(bzip2)", bz2.open),
    b"\xfd7zXZ\0": partial(_compressed, "(xz)", lzma.open),
    b"PAR1": _parquet,
    b"7z\xbc\xaf\x27\x1c": _closed,
    b"Rar!\x1a\x07": _closed,
    b"\x28\xb5\x2f\xfd": _closed,  # zstd
}
"""By the first bytes."""


def _head(content: IO[bytes], count: int) -> bytes:
    content.seek(0)
    head = content.read(count)
    content.seek(0)
    return head


def _copy(source: IO[bytes], target: IO[bytes], budget: UnpackBudget) -> None:
    while piece := source.read(_PIECE):
        budget.take(len(piece))
        target.write(piece)


# --- encodings -------------------------------------------------------------------------------------------------------

_TEXT = rb"[\t\n\r\x20-\x7e]"
_WIDE = {
    "UTF-32": (re.compile(rb"(?:" + _TEXT + rb"\0\0\0){8,}"), re.compile(rb"(?:\0\0\0" + _TEXT + rb"){8,}")),
    "UTF-16": (re.compile(rb"(?:" + _TEXT + rb"\0){8,}"), re.compile(rb"(?:\0" + _TEXT + rb"){8,}")),
}
_ESCAPE = re.compile(rb"""\\(?:u00([0-7][0-9A-Fa-f])|x([0-7][0-9A-Fa-f])|([nrtbf"'/\\]))""")
_ESCAPED = {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"b": b" ", b"f": b" "}
_BASE_64 = re.compile(rb"[A-Za-z0-9+/_-]{24,}")
# From the beginning of a run on alone: tried at each of its letters, a long run without line ends would take hours.
_BASE_64_LINES = re.compile(
    rb"(?<![A-Za-z0-9+/_-])(?:[A-Za-z0-9+/_-]{24,}+(?:\\n|\r?\n)[ \t]{0,8}){1,}+[A-Za-z0-9+/_-]*"
)
_TO_STANDARD = bytes.maketrans(b"-_", b"+/")
_CONTROLS = bytes([*range(9), 11, *range(14, 32)])
_IS_LETTER = np.array([value in b"\t\n\r" or 32 <= value < 127 for value in range(256)])
_BEGINNING = 4096  # letters of a run, in which other text may stand before base64
_TURNS = 3  # of escapes, as JSON in JSON in JSON has them


def decoded(piece: bytes, *, deep: int = 2) -> Iterator[tuple[str, bytes]]:
    """The texts behind the encodings of a piece, each with the encoding's name.

    `deep`: how many times base64 may stand in itself, and another encoding in it.
    """
    if _has_wide_text(piece):
        for name, patterns in _WIDE.items():
            for pattern in patterns:
                if runs := [run.replace(b"\0", b"") for run in pattern.findall(piece)]:
                    yield name, b"\n".join(runs)
    text = piece
    for _ in range(_TURNS if _is_text(piece) else 0):
        if b"\\" not in text or (plain := _ESCAPE.sub(_unescape, text)) == text:
            break
        text = plain
    if text is not piece:
        yield "escaped", text
    if deep and (content := b"\n".join(_from_base64(piece))):
        yield "base64", content
        for name, further in decoded(content, deep=deep - 1):
            yield f"base64, {name}", further


def _is_text(piece: bytes) -> bool:
    """Whether it has few control characters; in compressed data they are a tenth of all bytes."""
    return len(piece) - len(piece.translate(None, _CONTROLS)) < 0.05 * len(piece)


def _has_wide_text(piece: bytes) -> bool:
    """Whether it contains eight letters of UTF-16 or UTF-32 in a row. This is much faster than a pattern."""
    if b"\0" not in piece:
        return False
    values = np.frombuffer(piece, dtype=np.uint8)
    for width in (2, 4):
        is_letter = _IS_LETTER[values[: 1 - width]]
        for place in range(1, width):
            is_letter = is_letter & (values[place : len(is_letter) + place] == 0)
        for _ in range(3):  # one, two, four letters in a row, and then eight
            is_letter = is_letter[:-width] & is_letter[width:]
            width *= 2
        if is_letter.any():
            return True
    return False


def _unescape(match: re.Match[bytes]) -> bytes:
    code = match[1] or match[2]
    return bytes([int(code, 16)]) if code else _ESCAPED.get(match[3], match[3])


def _runs_of_base64(piece: bytes) -> list[bytes]:
    """Runs of base64 letters: each line by itself, and consecutive lines as one."""
    lines = [re.sub(rb"\\n|\s", b"", block) for block in _BASE_64_LINES.findall(piece)]
    return [run.translate(_TO_STANDARD) for run in (*_BASE_64.findall(piece), *lines)]


def _from_base64(piece: bytes) -> Iterator[bytes]:
    """Decode runs of base64 letters from each of their first four letters on, as other text may stand before base64."""
    for run in _runs_of_base64(piece):
        yield _plain(run)
        for start in (1, 2, 3):
            yield _plain(run[start:_BEGINNING])


def _plain(run: bytes) -> bytes:
    return base64.b64decode(run + b"A" * (-len(run) % 4))


def packed_in_base64(piece: bytes) -> Iterator[bytes]:
    """Archives that are embedded in a text as base64."""
    for run in _runs_of_base64(piece):
        content = _plain(run)
        if content.startswith(tuple(_OPENERS)):
            yield content
