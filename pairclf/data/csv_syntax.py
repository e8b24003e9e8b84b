"""Check the syntax of a CSV file: quotes as in RFC 4180, and as many cells on every line as in the header.

polars reads a file that breaks these rules without an error, and returns other rows than were written. So each file is
checked before it is read, in blocks of bytes: the check compares the positions of quotes, commas and line feeds with
numpy, without a Python loop over them.

In a valid file, quotes open and close alternately: the first, third, ... open, the others close. An opening quote is at
the start of a cell, or directly after a closing quote (the two are one doubled quote). A closing quote is at the end of
a cell, or directly before an opening one. These rules are sufficient.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from pairclf.errors import DataError

Bytes = NDArray[np.uint8]
Places = NDArray[np.int64]

BLOCK = 1 << 21  # bytes: smaller ones cost more calls; larger ones gain nothing
BOM = b"\xef\xbb\xbf"

QUOTE, COMMA, LF, CR, BACKSLASH = b'",\n\r\\'

_BEFORE = np.isin(np.arange(256), [COMMA, LF])
"""Bytes before a quote that opens a cell."""

_AFTER = np.isin(np.arange(256), [COMMA, LF, CR])
"""Bytes after a quote that closes a cell."""

ESCAPABLE = '"\\,\n\r'
"""Characters that a backslash can escape with `escape: backslash`."""

_QUOTES_REMEDY = (
    "double the quotes inside a quoted cell (pandas: to_csv without doublequote=False and escapechar), or write "
    "parquet; a source of data.train whose quotes have a backslash before them is read with `escape: backslash`"
)
_OPEN_REMEDY = f"get the file again if its end is missing; otherwise {_QUOTES_REMEDY}"
_CELLS_REMEDY = "quote the cells that hold commas or line breaks, and write every cell of a row, empty ones too"
_ENDS_REMEDY = "save the file with one kind of line end (LF or CR LF), or quote cells that end in a carriage return"


@dataclass(frozen=True, slots=True)
class Shape:
    """The shape of a valid CSV.

    Attributes:
        names: names of the columns.
        rows: number of records below the header, blank ones included; a record may have line breaks in quotes.
    """

    names: list[str]
    rows: int


@dataclass(frozen=True, slots=True)
class Fault:
    """The first fault in a file.

    Attributes:
        offset: position in bytes.
        column: number of the cell in its line, from 0; None: the whole line.
        what: description of the fault.
        remedy: what the user can do.
    """

    offset: int
    column: int | None
    what: str
    remedy: str


def check_csv(path: Path, *, lossy: bool = False) -> Shape:
    """Refuse a file that polars would misread.

    Args:
        path: the CSV.
        lossy: test rows: a carriage return at the end of a cell without quotes may be lost.

    Raises:
        DataError: a name stands twice, a quote is not RFC 4180's, a line has more or fewer cells than the header, or
            line ends are CR alone or of two kinds; names line and column.
        OSError: the file can't be read.
    """
    with path.open("rb") as stream:
        return check_stream(stream, path, lossy=lossy)


def check_stream(stream: BinaryIO, path: Path, *, lossy: bool = False) -> Shape:
    """`check_csv` for the bytes of `path`."""
    names = _header(stream, path)
    look = _Look(lossy)
    stream.seek(len(BOM) if _starts_with(stream, BOM) else 0)
    look.offset = look.start = stream.tell()
    for block in _blocks(stream):
        fault = look.take(block)
        if fault is not None:
            raise _refusal(stream, path, fault, names)
    if look.inside:
        fault = Fault(look.opened, look.column, "the quote that opens here is never closed", _OPEN_REMEDY)
        raise _refusal(stream, path, fault, names)
    return Shape(names, max(0, look.records - 1))


def _starts_with(stream: BinaryIO, start: bytes) -> bool:
    stream.seek(0)
    return stream.read(len(start)) == start


def _header(stream: BinaryIO, path: Path) -> list[str]:
    """The names of the columns.

    Raises:
        DataError: a name is repeated, or the header's line ends in CR alone.
    """
    line = ""

    def lines() -> Iterator[str]:
        nonlocal line
        for line in text:  # noqa: UP028 (the last line that was taken is looked at below)
            yield line

    stream.seek(0)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="replace", newline="")
    try:
        names = next(csv.reader(lines()), [])
    finally:
        text.detach()
    if line.endswith("\r"):
        remedy = "save the file with line feeds (LF or CR LF)"
        raise DataError("its lines end in a carriage return (CR) alone", where=path, remedy=remedy)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        remedy = "rename or remove all but one of each"
        raise DataError(f"columns {twice} stand more than once in the header", where=path, remedy=remedy)
    return names


def _blocks(stream: BinaryIO) -> Iterator[Bytes]:
    """The rest of a stream in blocks that end in a line feed, so that no block ends at a quote.

    A last line without a line feed gets one. A block is valid until the next one is requested.
    """
    room, kept = bytearray(BLOCK), 0
    while True:
        count = stream.readinto(memoryview(room)[kept:])  # type: ignore[attr-defined]
        if not count:
            break
        end = room.rfind(b"\n", kept, kept + count) + 1
        if end:
            yield np.frombuffer(room, np.uint8, end)
            room[: kept + count - end] = room[end : kept + count]
        kept += count - end
        if kept == len(room):
            room = room + bytes(len(room))
    if kept:
        yield np.frombuffer(bytes(room[:kept]) + b"\n", np.uint8)


class _Look:
    """The check of a file, block by block; its attributes are the state between blocks.

    Attributes:
        offset: bytes before the next block.
        inside: 1 within a quoted cell, 0 outside.
        opened: offset of the last opening quote.
        column: number of its cell.
        start: offset of the unfinished line.
        commas: number of commas outside quotes in that line so far.
        records: number of finished lines, including the header.
        width: number of commas in the header.
        crlf: the header ends in CR LF.
    """

    def __init__(self, lossy: bool) -> None:
        self.lossy = lossy
        self.offset = self.inside = self.opened = self.column = self.start = self.commas = self.records = 0
        self.width: int | None = None
        self.crlf = False

    def take(self, block: Bytes) -> Fault | None:
        """Check the next block; returns its first fault, or None."""
        quotes = np.flatnonzero(block == QUOTE)
        starts, stops = _outside(block, quotes, self.inside)
        separators = _separators(block, quotes, self.inside, starts, stops)
        of_ends = np.flatnonzero(block[separators] == LF)
        quote = self._wrong_quote(block, starts, stops, separators, of_ends)
        sound = of_ends if quote is None else of_ends[separators[of_ends] < quote.offset - self.offset]
        fault = self._wrong_line(block, separators[sound], sound) or quote
        fault = fault or self._lost_return(block, separators, of_ends)
        if fault is not None:
            return fault
        opening = stops[stops < len(block)][-1:].tolist() or [0] * (not self.inside and len(quotes) > 0)
        if opening:
            self.opened = self.offset + opening[0]
            self.column = self._column(opening[0], separators, separators[of_ends])
        self.inside = (self.inside + len(quotes)) % 2
        if len(of_ends):
            self.records += len(of_ends)
            self.start = self.offset + int(separators[of_ends[-1]]) + 1
            self.commas = len(separators) - 1 - int(of_ends[-1])
        else:
            self.commas += len(separators)
        self.offset += len(block)
        return None

    def _wrong_quote(
        self, block: Bytes, starts: Places, stops: Places, separators: Places, of_ends: Places
    ) -> Fault | None:
        """A quote that neither opens nor closes a cell."""
        starts, stops = starts[starts > 0], stops[stops < len(block)]  # a block begins and ends without a quote
        behind = block.take(starts)
        sound, begins = _AFTER.take(behind), _BEFORE.take(block.take(stops - 1))
        returns = np.flatnonzero(behind == CR)
        if len(returns):
            sound[returns] = block[starts[returns] + 1] == LF
        if sound.all() and begins.all():
            return None
        closing, opening = (starts[~sound][:1] - 1).tolist(), stops[~begins][:1].tolist()
        first = min(closing + opening)
        what = "a quote in a cell that does not begin with one"
        if closing == [first]:
            what = "a quote that is neither doubled nor at the end of its quoted cell"
        if first and block[first - 1] == BACKSLASH:
            what += ", behind a backslash (quotes are escaped by doubling them, not by backslashes)"
        column = self._column(first, separators, separators[of_ends])
        return Fault(self.offset + first, column, what, _QUOTES_REMEDY)

    def _column(self, place: int, separators: Places, ends: Places) -> int:
        """The number of the cell, from 0, at a place of the block."""
        before = int(np.searchsorted(separators, place))
        ended = int(np.searchsorted(ends, place))
        if not ended:
            return self.commas + before
        return before - 1 - int(np.searchsorted(separators, ends[ended - 1]))

    def _wrong_line(self, block: Bytes, ends: Places, of_ends: Places) -> Fault | None:
        """`of_ends`: the places of `ends` among the separators."""
        if not len(ends):
            return None
        commas = np.diff(of_ends, prepend=-1) - 1
        commas[0] += self.commas
        starts = np.concatenate([[self.start - self.offset], ends[:-1] + 1])
        returned = block[ends - 1] == CR
        if self.width is None:
            self.width, self.crlf = int(commas[0]), bool(returned[0])
            if ends[0] - returned[0] == starts[0]:
                what = "the line is blank; the first line must name the columns"
                return Fault(self.offset, None, what, "remove the blank line")
        wrong = np.flatnonzero(commas != self.width)
        blank = (commas[wrong] == 0) & (ends[wrong] - returned[wrong] == starts[wrong])
        for line in wrong[~blank][:1]:
            what = f"the line has {commas[line] + 1} cells; the header has {self.width + 1}"
            return Fault(self.offset + int(starts[line]), None, what, _CELLS_REMEDY)
        return None

    def _lost_return(self, block: Bytes, separators: Places, of_ends: Places) -> Fault | None:
        """A carriage return at the end of an unquoted cell, which polars drops.

        Test rows lose it, as in every reader that takes CR LF as the end of a line.
        """
        if self.lossy:
            return None
        lost = block[separators - 1] == CR
        if self.crlf:
            lost[of_ends] = False
        for place in separators[lost][:1]:
            if block[place] == LF:
                what = "the line ends in CR LF; the header's line ends in LF alone"
            else:
                what = "a carriage return ends a cell that is not quoted"
            column = self._column(int(place), separators, separators[of_ends])
            return Fault(self.offset + int(place) - 1, column, what, _ENDS_REMEDY)
        return None


def _outside(block: Bytes, quotes: Places, inside: int) -> tuple[Places, Places]:
    """Starts and stops of what is outside quotes, but for the nothing between two quotes that are one doubled quote."""
    edges = np.empty(len(quotes) + 2, dtype=np.int64)
    edges[0], edges[1:-1], edges[-1] = -1, quotes, len(block)
    starts, stops = edges[:-1][inside::2], edges[1:][inside::2]
    some = np.flatnonzero(stops - starts > 1)
    return starts[some] + 1, stops[some]


def _separators(block: Bytes, quotes: Places, inside: int, starts: Places, stops: Places) -> Places:
    """Where commas and line feeds stand outside quotes."""
    lengths = stops - starts
    behind = np.cumsum(lengths)
    if not len(lengths):
        return behind
    if behind[-1] * 8 < len(block):  # mostly quoted: look at the rest alone
        places = np.repeat(starts - behind + lengths, lengths) + np.arange(behind[-1])
        return places[_separates(block[places])]
    places = np.flatnonzero(_separates(block))
    return places[(np.searchsorted(quotes, places) + inside) % 2 == 0] if len(quotes) else places


def _separates(some: Bytes) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = np.logical_or(some == COMMA, some == LF)
    return found


def _refusal(stream: BinaryIO, path: Path, fault: Fault, names: list[str]) -> DataError:
    """The fault with its line and column, counted from 1."""
    stream.seek(0)
    before = stream.read(fault.offset)
    line = before.count(b"\n") + 1
    if fault.column is None:
        return DataError(f"line {line}: {fault.what}", where=path, remedy=fault.remedy)
    character = len(before[before.rfind(b"\n") + 1 :].removeprefix(BOM).decode("utf-8", "replace")) + 1
    name = f"column {names[fault.column]!r}" if fault.column < len(names) else f"cell {fault.column + 1}"
    what = f"line {line}, character {character}, in {name}: {fault.what}"
    return DataError(what, where=path, remedy=fault.remedy)


def without_escapes(data: bytes, path: Path) -> tuple[bytes, dict[str, str]]:
    """The bytes of a CSV whose cells have backslashes before some characters, with one stand-in for each such pair.

    A stand-in is a character of two bytes that the file has not, so that every byte stays at its place.

    Returns:
        The bytes; `{stand-in: character}`.

    Raises:
        DataError: a backslash precedes a character that is not in `ESCAPABLE`: the writer did not escape backslashes,
            so two of them may mean two or one.
    """
    pairs = re.compile(rb"\\(.?)", re.DOTALL)
    allowed = {character.encode(): character for character in ESCAPABLE}
    for pair in pairs.finditer(data):
        if pair[1] not in allowed:
            before = data[: pair.start()]
            line, text = before.count(b"\n") + 1, before[before.rfind(b"\n") + 1 :]
            what = f"line {line}, character {len(text.decode('utf-8', 'replace')) + 1}: a backslash before "
            culprit = repr(data[pair.end(1) - len(pair[1]) : pair.end(1) + 3].decode("utf-8", "ignore")[:1])
            raise DataError(
                what + (culprit if pair[1] else "the end") + "; `escape: backslash` reads one before a quote, a "
                "backslash, a comma or a line break",
                where=path,
                remedy="leave `escape` out if the file doubles its quotes; otherwise write it with quotes doubled and "
                "no escapes, or as parquet",
            )
    free = (chr(code) for code in range(0x80, 0x800) if chr(code).encode() not in data)
    stand_ins = dict(zip(allowed, free, strict=False))
    if len(stand_ins) < len(allowed):
        remedy = "write the file with quotes doubled and no escapes, or as parquet"
        raise DataError("the file uses every character that could stand for an escape", where=path, remedy=remedy)
    unescaped = pairs.sub(lambda pair: stand_ins[pair[1]].encode(), data)
    return unescaped, {stand_in: allowed[character] for character, stand_in in stand_ins.items()}
