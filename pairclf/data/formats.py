"""Read .csv, .parquet and .jsonl files: globs to paths, files to chunks of raw columns, cells to turns.

A raw chunk has the file's own columns. A CSV's cells are all text. Parquet keeps its types, but for texts and lists of
texts, which are String and List(String) whatever Arrow type they had. JSONL's are text, lists of turns or, where that
is not enough, the struct `_MIXED`. Nothing here knows a task.
"""

from __future__ import annotations

import csv
import glob
import io
import json
import math
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from enum import IntFlag, auto
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from polars.exceptions import ComputeError, NoDataError, PanicException, PolarsError

from pairclf.console import counted
from pairclf.data.csv_syntax import Shape, check_csv, check_stream, without_escapes
from pairclf.data.messages import field_turns, is_messages
from pairclf.errors import DataError

CHUNK = 16_384
"""Rows per chunk."""

REPLACEMENT = "\ufffd"
"""The replacement for half a surrogate pair, which UTF-8 can't represent."""

CONTROL = r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]"
"""Control characters, but not tab, line feed and carriage return."""

TURNS = pl.List(pl.String)

Bits = NDArray[np.uint32]


class Flaw(IntFlag):
    """Flaws that only the reader of a file can detect, as bits of the column `flaws`; named like their rules."""

    MISSING_ID = auto()
    BAD_LABEL = auto()
    UNDECODABLE = auto()
    MISSING_CELL = auto()
    NULL_LITERAL = auto()
    NULL_LIST = auto()
    SURROGATE = auto()
    CONTROL_CHARACTER = auto()


SURROGATE = re.compile("[\ud800-\udfff]")
"""Half a surrogate pair."""

_MIXED = pl.Struct({"text": pl.String(), "turns": TURNS, "surrogate": pl.Boolean(), "kind": pl.String()})
"""A JSONL column whose cells are not all texts or all lists of turns. `kind`: what a cell that is neither is, in words.
"""

_BOOLEAN, _WHOLE_FLOAT, _FLOAT = "booleans", "whole floats", "floats with fractions, or too large to be exact"
_OBJECT, _OTHER_LIST = "objects", "lists of other things than texts"
_MESSAGES = "lists of messages with role and content"
_STRUCTURED = (_OBJECT, _OTHER_LIST, _MESSAGES)

WHOLE = {"Float64": 2**53, "Float32": 2**24, "Float16": 2**11}
"""From here on, a float type can't represent every whole number. Keys are names, as polars 1.35 has no Float16."""

_REMEDIES = {
    ".csv": "the file must be whole, in UTF-8, with as many cells in each row as the header has",
    ".jsonl": "the file must be whole, in UTF-8, with one object on a line, and each name once in an object",
    ".parquet": "the file must be whole, with one column a name; write it again with polars or pandas",
}

_MAGIC = {
    b"\x1f\x8b": "a gzip archive",
    b"\x78\x01": "compressed (zlib)",
    b"\x78\x9c": "compressed (zlib)",
    b"\x78\xda": "compressed (zlib)",
    b"\x28\xb5\x2f\xfd": "compressed (zstd)",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ": "an xz archive",
    b"PK\x03\x04": "a zip archive or a spreadsheet",
    b"PAR1": "a parquet file",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}
"""First bytes of files that are not UTF-8 text. polars would silently unpack some of them."""

# polars joins the cells of a column into one JSON document before it parses them. So `["a` and `"]` in two rows
# would merge into one, `["a"],["b"]` would become two, numbers become strings and half a surrogate pair a NUL.
# Only cells of this shape, a whole list of strings and nulls, go that way; Python's decoder judges the others. So it
# does with control characters, written out or as escapes: who looks for them anyway need not look at the rest again.
_SPACE = r"[ \t\r\n]*"
_PAIR = r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_LATIN = r"00(?:[2-689a-fA-F][0-9a-fA-F]|7[0-9a-eA-E])"
_CODE = rf"\\u(?:{_LATIN}|0[1-9a-fA-F][0-9a-fA-F]{{2}}|[1-9a-ce-fA-CE-F][0-9a-fA-F]{{3}}|[dD][0-7][0-9a-fA-F]{{2}})"
_TURN = rf'(?:null|"(?:[^"\\\x00-\x1f\x7f]|\\["\\/nrt]|{_CODE}|{_PAIR})*")'
_TURN_LIST = rf"^{_SPACE}\[{_SPACE}(?:{_TURN}{_SPACE}(?:,{_SPACE}{_TURN}{_SPACE})*)?\]{_SPACE}$"
_SIGNS_OF_MORE = [
    *("\\u", "\\b", "\\f", "\x7f"),
    *('",', '"],', '"\t', '"\n', '"\r', '"] ', '"]\t', '"]\n', '"]\r'),
    *('" ,', '" ]', '"  ', '" \t', '" \n', '" \r'),
]

# --- names to paths --------------------------------------------------------------------------------------------------


def expand(names: Iterable[Path]) -> list[Path]:
    """Names and globs as paths: a glob's matches sorted; a name that exists, or holds no `*?[`, as it is.

    Raises:
        DataError: a glob matches nothing.
    """
    paths: list[Path] = []
    for name in names:
        matches = [name]
        if not name.exists() and set("*?[") & set(str(name)):
            matches = [Path(match) for match in sorted(glob.glob(str(name), recursive=True))]
        if not matches:
            raise DataError(
                "no file matches this name",
                where=name,
                remedy="check the pattern; names in a config are relative to its data.folder",
            )
        paths += matches
    return paths


def existing(names: Sequence[Path]) -> list[Path]:
    """The existing files of a source's names; a name without a file is skipped."""
    return [path for name in names if name.exists() or glob.glob(str(name), recursive=True) for path in expand([name])]


# --- paths to chunks -------------------------------------------------------------------------------------------------


def read_file(
    path: Path, *, rows: int | None, lossy: bool, size: int | None = None, escape: bool = False
) -> Iterator[pl.DataFrame]:
    """The first `rows` rows of a file as raw chunks.

    Args:
        path: .csv, .parquet or .jsonl.
        rows: None: all.
        lossy: mend broken UTF-8 instead of refusing it.
        size: rows of a chunk; None: the whole file in one chunk (JSONL: in chunks of `CHUNK`).
        escape: a CSV whose quotes are escaped by backslashes.

    Raises:
        DataError: the file is not there, can't be read, holds no rows, or changed meanwhile.
    """
    reader = _reader(path, escape)
    before, empty = _stamp(path), True
    try:
        for chunk in reader(path, rows, lossy, size):
            if _stamp(path) != before:
                what = "the file was changed while it was read"
                raise DataError(what, where=path, remedy="run the command again when no program writes this file")
            if len(chunk):
                empty = False
                yield chunk
    except NoDataError as error:
        raise DataError("the file is empty", where=path, remedy="fetch or write it again") from error
    except (OSError, PolarsError, PanicException, ValueError, RecursionError, csv.Error) as error:
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"can't be read as {path.suffix.lower()[1:]}: {detail}", where=path, remedy=_REMEDIES[path.suffix.lower()]
        ) from error
    if empty:
        raise DataError("the file holds no rows", where=path, remedy="fetch or write it again")


_Reader = Callable[[Path, int | None, bool, int | None], Iterator[pl.DataFrame]]


def _reader(path: Path, escape: bool) -> _Reader:
    """The reader for a file of this name.

    Raises:
        DataError: there is none, or the first bytes are those of another kind of file.
    """
    check_is_file(path)
    readers = {".csv": _read_escaped if escape else _read_csv, ".parquet": _read_parquet, ".jsonl": _read_jsonl}
    kind = path.suffix.lower()
    if kind not in readers:
        raise DataError(
            f"file type {path.suffix!r} can't be read; it must be one of {', '.join(readers)}",
            where=path,
            remedy="convert the file, or correct its name",
        )
    if escape and kind != ".csv":
        what = f"the source says `escape: backslash`, which is for CSVs; this is {path.suffix!r}"
        raise DataError(what, where=path, remedy="name these files in a source of their own")
    if kind != ".parquet":
        check_text(path)
    return readers[kind]


def column_names(path: Path) -> list[str]:
    """The names of a file's columns, by its header, its schema or its first record; none if that can't be read.

    What is wrong with the file is for `read_file` to say.
    """
    kind = path.suffix.lower()
    with suppress(OSError, ValueError, RecursionError, csv.Error, pa.ArrowException):
        if kind == ".parquet":
            return list(pq.read_schema(path).names)
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as stream:
            if kind == ".jsonl":
                return list(json.loads(next((line for line in stream if line.strip()), "{}")))
            return next(csv.reader(stream), []) if kind == ".csv" else []
    return []


def check_is_file(path: Path) -> None:
    """Refuse a path without a regular file.

    Raises:
        DataError: the path does not exist, or is a folder, a pipe or a device.
    """
    if path.is_dir():
        raise DataError("this is a folder, not a file", where=path, remedy="name the file, or a glob for those in it")
    if path.exists() and not path.is_file():  # it could not be read twice, and may never end
        raise DataError("this is a pipe or a device, and no regular file", where=path, remedy="give a file of rows")
    if not path.exists():
        raise DataError(
            "there is no such file",
            where=path,
            remedy="check the path; names in a config are relative to its data.folder. data/README.md says where the "
            "competitions' files are",
        )


def check_text(path: Path) -> None:
    """Refuse a file with the name of a text file and the first bytes of another kind.

    Raises:
        DataError: it is such a file.
        OSError: the file can't be read.
    """
    with path.open("rb") as stream:
        start = stream.read(6)
    kind = next((what for magic, what in _MAGIC.items() if start.startswith(magic)), None)
    if kind is not None:
        remedy = "unpack it, save it as UTF-8, or correct its name"
        raise DataError(f"the file is named {path.suffix!r} and is {kind}", where=path, remedy=remedy)


def _stamp(path: Path) -> tuple[int, ...]:
    """A stamp that changes when a file is written or replaced."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def load(path: Path) -> pl.DataFrame:
    """A whole file's raw columns.

    Raises:
        DataError: as `read_file`.
    """
    at_once = sys.maxsize if path.suffix.lower() == ".jsonl" else None  # its chunks have types of their own
    return pl.concat(read_file(path, rows=None, lossy=False, size=at_once))


def _read_csv(path: Path, rows: int | None, lossy: bool, size: int | None) -> Iterator[pl.DataFrame]:
    shape = check_csv(path, lossy=lossy)
    encoding: Literal["utf8", "utf8-lossy"] = "utf8-lossy" if lossy else "utf8"
    if size is None:
        chunks: Iterable[pl.DataFrame] = [
            pl.read_csv(path, infer_schema=False, n_rows=rows, encoding=encoding, glob=False)
        ]
    else:
        scan = pl.scan_csv(path, infer_schema=False, n_rows=rows, encoding=encoding, glob=False)
        chunks = scan.collect_batches(chunk_size=size, maintain_order=True)
    return _without_blank_tail(_of_shape(chunks, shape, rows))


def _read_escaped(path: Path, rows: int | None, lossy: bool, size: int | None) -> Iterator[pl.DataFrame]:
    """A CSV with backslashes before quotes; read at once, whatever the size of a chunk."""
    data, stand_ins = without_escapes(path.read_bytes(), path)
    shape = check_stream(io.BytesIO(data), path, lossy=lossy)
    frame = pl.read_csv(data, infer_schema=False, n_rows=rows)
    (whole,) = _of_shape([frame], shape, rows)
    whole = whole.with_columns(pl.all().str.replace_many(stand_ins))
    named = pl.Series(whole.columns).str.replace_many(stand_ins)
    whole.columns = named.to_list()
    return _without_blank_tail(whole.iter_slices(size or max(1, len(whole))))


def _of_shape(chunks: Iterable[pl.DataFrame], shape: Shape, rows: int | None) -> Iterator[pl.DataFrame]:
    """The chunks, under the header's names (polars leaves quotes doubled in them), as many rows as there are lines."""
    left = shape.rows if rows is None else min(rows, shape.rows)
    for chunk in chunks:
        left -= len(chunk)
        chunk.columns = shape.names
        yield chunk
    if left:
        raise ValueError(f"{counted(abs(left), 'row')} {'lost' if left > 0 else 'too many'} in reading")


def _without_blank_tail(chunks: Iterable[pl.DataFrame]) -> Iterator[pl.DataFrame]:
    """Blank lines at the end are no rows; one in the middle is a row that lost its id, and is said to be one."""
    held: list[pl.DataFrame] = []
    for chunk in chunks:
        whole = pl.concat([*held, chunk])
        filled = whole.select(~pl.all_horizontal(pl.all().is_null())).to_series().arg_true()
        end = int(filled[-1]) + 1 if len(filled) else 0
        held = [whole[end:]]
        yield whole[:end]


def _read_parquet(path: Path, rows: int | None, lossy: bool, size: int | None) -> Iterator[pl.DataFrame]:
    with suppress(OSError, pa.ArrowException):  # polars says below what is wrong with the file
        names = pq.read_schema(path).names
        if twice := sorted({name for name in names if names.count(name) > 1}):  # polars 1.35 would read one of them
            remedy = "rename or remove all but one of each"
            raise DataError(f"columns {twice} stand more than once", where=path, remedy=remedy)
    if size is None:
        yield with_plain_texts(pl.read_parquet(path, n_rows=rows, glob=False))
    else:
        scan = pl.scan_parquet(path, n_rows=rows, glob=False)
        yield from map(with_plain_texts, scan.collect_batches(chunk_size=size, maintain_order=True))


def with_plain_texts(frame: pl.DataFrame) -> pl.DataFrame:
    """With String for texts and List(String) for lists of them, whatever types they have.

    pandas and `datasets` write repeated texts as categories, and lists of one length as arrays.
    """
    coded = (pl.Categorical, pl.Enum)
    plain: dict[str, pl.DataType | type[pl.DataType]] = {}
    for name, kind in frame.schema.items():
        if isinstance(kind, coded):
            plain[name] = pl.String
        elif isinstance(kind, pl.List | pl.Array) and isinstance(kind.inner, (pl.String, pl.Null, *coded)):
            plain[name] = TURNS
    return frame.cast(plain) if plain else frame  # type: ignore[arg-type]


def _read_jsonl(path: Path, rows: int | None, lossy: bool, size: int | None) -> Iterator[pl.DataFrame]:
    """Chunks with every name that stood so far; a record without one has a null there."""
    names: dict[str, None] = {}
    with path.open(encoding="utf-8-sig", errors="replace" if lossy else "strict") as stream:
        lines = islice(((number, line) for number, line in enumerate(stream, 1) if line.strip()), rows)
        while records := [_record(number, line) for number, line in islice(lines, size or CHUNK)]:
            names |= dict.fromkeys(name for record in records for name in record)
            yield pl.DataFrame([_jsonl_column(name, [record.get(name) for record in records]) for name in names])


def _record(number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line {number}: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"line {number} holds no object but a {type(record).__name__}")
    return record


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raises:
    ValueError: a name stands twice; Python would take the last.
    """
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"names {sorted({name for name in names if names.count(name) > 1})} stand twice in an object")
    return record


def _jsonl_column(name: str, cells: list[Any]) -> pl.Series:
    """Lists of turns as such, texts and whole numbers as text, the way a CSV has it; `_MIXED` if that is not enough."""
    turns = [cell if _is_turns(cell) else None for cell in cells]
    texts, kinds = map(list, zip(*(_json_text(cell) for cell in cells), strict=True))
    sound_turns = [None if cell is None else _encodable(cell) for cell in turns]
    sound_texts = _encodable(texts)
    broken = [turns[at] != sound_turns[at] or texts[at] != sound_texts[at] for at in range(len(cells))]
    listed, several = any(cell is not None for cell in turns), any(text is not None for text in texts)
    if any(broken) or any(kinds) or (listed and several):
        columns = {"text": sound_texts, "turns": sound_turns, "surrogate": broken, "kind": kinds}
        return pl.DataFrame(columns, schema=_MIXED.to_schema()).to_struct(name)
    if listed:
        return pl.Series(name, sound_turns, dtype=TURNS)
    return pl.Series(name, sound_texts, dtype=pl.String)


def _json_text(cell: Any) -> tuple[str | None, str | None]:
    """A cell's text, and what it is in words if it is neither a text nor a list of turns.

    >>> _json_text(7), _json_text(7.0), _json_text(True)
    (('7', None), ('7', 'whole floats'), ('true', 'booleans'))
    """
    if cell is None or isinstance(cell, str) or _is_turns(cell):
        return cell if isinstance(cell, str) else None, None
    if isinstance(cell, bool):
        return str(cell).lower(), _BOOLEAN
    if isinstance(cell, int):
        return str(cell), None
    if isinstance(cell, float):
        whole = cell.is_integer() and abs(cell) < WHOLE["Float64"]
        return (None, None) if math.isnan(cell) else (str(int(cell)), _WHOLE_FLOAT) if whole else (repr(cell), _FLOAT)
    if isinstance(cell, dict):
        return json.dumps(cell), _OBJECT
    messages = all(isinstance(turn, dict) and turn.keys() >= {"role", "content"} for turn in cell)
    return json.dumps(cell), _MESSAGES if messages else _OTHER_LIST


# --- cells -----------------------------------------------------------------------------------------------------------


def as_text(cells: pl.Series, where: object = None) -> pl.Series:
    """Texts, numbers and booleans as String. Whole floats lose their `.0` and NaN is a null: pandas makes both of a
    column of integers.

    Args:
        cells: a column.
        where: the file, for the error.

    Raises:
        DataError: they are of a type that has several ways of writing: lists, objects, bytes, times.

    >>> as_text(pl.Series([7.0, float("nan"), 0.5])).to_list()
    ['7', None, '0.5']
    """
    kind = cells.dtype
    if kind == pl.String:
        return cells
    if not is_plain(cells):
        what = f"column {cells.name!r} holds {_in_words(cells)}; it must hold texts or numbers"
        raise DataError(what, where=where, remedy="write it as text, or name another column")
    if kind == _MIXED:
        return cells.struct.field("text").rename(cells.name)
    if kind.is_float():
        cells = cells.fill_nan(None)
        whole = cells.cast(pl.Int64, strict=False)
        return whole.cast(pl.String).zip_with((whole == cells).fill_null(value=False), cells.cast(pl.String))
    return cells.cast(pl.String)


def is_plain(cells: pl.Series) -> bool:
    """Whether a column holds texts, numbers or booleans, and nothing else."""
    if cells.dtype == _MIXED:
        odd = cells.struct.field("kind").is_in(_STRUCTURED)
        return not (odd.any() or cells.struct.field("turns").is_not_null().any())
    whole_decimal = isinstance(cells.dtype, pl.Decimal) and cells.dtype.scale == 0
    numeric = cells.dtype.is_integer() or cells.dtype.is_float() or whole_decimal
    return numeric or cells.dtype in (pl.String, pl.Null, pl.Boolean)


def as_ids(cells: pl.Series, where: object) -> pl.Series:
    """`as_text` of ids, which must have the same text in every format.

    Raises:
        DataError: they are neither texts nor whole numbers.
    """
    texts = as_text(cells, where)
    if cells.dtype == _MIXED:
        kinds = cells.struct.field("kind")
        wrong = (kinds != _WHOLE_FLOAT).fill_null(value=False)
        kind = _FLOAT if (kinds == _FLOAT).any() else _BOOLEAN
    elif cells.dtype.is_float():
        wrong = ((cells != cells.floor()) | (cells.abs() >= WHOLE[str(cells.dtype)])) & cells.is_not_nan()
        wrong, kind = wrong.fill_null(value=False), _FLOAT
    else:
        wrong, kind = pl.repeat(cells.dtype == pl.Boolean, len(cells), eager=True) & cells.is_not_null(), _BOOLEAN
    if wrong.any():
        what = f"ids of {counted(int(wrong.sum()), 'row')} are {kind}"
        raise DataError(
            what, where=where, rows=texts.filter(wrong).to_list(), remedy="write ids as text or whole numbers"
        )
    return texts


def python_cells(cells: pl.Series) -> list[Any]:
    """The cells of a column as Python's own values: texts, lists, dicts; in JSONL, what the file has.

    Half a surrogate pair in a text is replaced already; in lists and objects of a JSONL file it is not.
    """
    if cells.dtype != _MIXED:
        return cells.to_list()
    rows = cells.struct.unnest().select("text", "turns", "kind").iter_rows()
    return [json.loads(text) if kind in _STRUCTURED else text if turns is None else turns for text, turns, kind in rows]


def mended_texts(cells: pl.Series) -> pl.Series:
    """The rows of a column whose text had half a surrogate pair, which the reader replaced."""
    if cells.dtype != _MIXED:
        return pl.repeat(value=False, n=len(cells), eager=True)
    return cells.struct.field("surrogate")


def _in_words(cells: pl.Series) -> str:
    if cells.dtype != _MIXED:
        inner = cells.dtype.inner if isinstance(cells.dtype, pl.List | pl.Array) else None
        messages = isinstance(inner, pl.Struct) and {"role", "content"} <= {field.name for field in inner.fields}
        return _MESSAGES if messages else str(cells.dtype)
    kinds = cells.struct.field("kind")
    odd = kinds.filter(kinds.is_in(_STRUCTURED)).first()
    return str(odd or "lists of texts")


def read_turns(
    raw: pl.DataFrame, fields: Sequence[str], multi_turn: bool, where: object = None
) -> tuple[list[pl.Series], Bits]:
    """The fields' cells as lists of turns, and the flaws of each row.

    A cell without any text (empty, null) is one null turn. One that is no list of turns, where there should be one,
    is one turn with the cell's text. So is a number or a boolean, which is no text either.

    Returns:
        a List(String) a field, without nulls; `(N,)` bits of `Flaw`.

    Raises:
        DataError: a column of the file `where` holds neither texts nor lists of texts, nor numbers.
    """
    _check_fields(raw, fields, where)
    flaws: Bits = np.zeros(len(raw), dtype=np.uint32)
    raw = raw.with_columns(_message_turns(raw[name], flaws) for name in fields if _holds_messages(raw[name]))
    turns = {name: raw[name].cast(TURNS) for name in fields if raw[name].dtype in (TURNS, pl.List(pl.Null))}
    texts = {name: as_text(raw[name]) for name in fields if name not in turns and _holds_text(raw[name].dtype)}
    mixed = [name for name in fields if raw[name].dtype == _MIXED]
    texts |= {name: raw[name].struct.field("text").rename(name) for name in mixed}
    turns |= _decode(pl.DataFrame(list(texts.values())), flaws) if multi_turn else _one_turn(texts)
    for name in mixed:
        listed = raw[name].struct.field("turns")
        turns[name] = listed.zip_with(listed.is_not_null(), turns[name])
        mark(flaws, raw[name].struct.field("surrogate"), Flaw.SURROGATE)
        mark(flaws, raw[name].struct.field("kind").is_not_null(), Flaw.UNDECODABLE)
    decoded = set(texts) - set(mixed) if multi_turn else set()
    for name in (name for name in fields if name not in turns):
        cells = as_text(raw[name])
        turns |= _one_turn({name: cells})
        mark(flaws, cells.is_not_null(), Flaw.UNDECODABLE)
    table = pl.DataFrame([turns[name].alias(name) for name in fields])
    control = table.select(pl.exclude(decoded).list.eval(pl.element().str.contains(CONTROL)).list.any())
    for column in control:
        mark(flaws, column, Flaw.CONTROL_CHARACTER)
    return _without_null_cells(table, texts, flaws), flaws


def _holds_messages(cells: pl.Series) -> bool:
    """Whether the cells are lists of messages, or nulls."""
    if cells.dtype == _MIXED:
        kinds = cells.struct.field("kind")
        others = cells.struct.field("text").is_not_null() | cells.struct.field("turns").list.len().gt(0)
        return bool((kinds == _MESSAGES).any()) and not ((kinds != _MESSAGES).fill_null(others)).any()
    return cells.dtype != TURNS and _in_words(cells) == _MESSAGES


def _message_turns(cells: pl.Series, flaws: Bits) -> pl.Series:
    """Cells of messages as turns; marks those with an unknown role, an odd content or half a surrogate pair."""
    turns: list[list[str | None] | None] = []
    for row, cell in enumerate(python_cells(cells)):
        texts, sound = field_turns(cell) if cell else (cell, True)
        mended = None if texts is None else _encodable(texts)
        flaws[row] |= 0 if sound else Flaw.UNDECODABLE
        flaws[row] |= 0 if mended == texts else Flaw.SURROGATE
        turns.append(mended)
    return pl.Series(cells.name, turns, dtype=TURNS)


def _check_fields(raw: pl.DataFrame, fields: Sequence[str], where: object) -> None:
    """Raises:
    DataError: a field holds other lists than such of texts, objects, bytes or times.
    """
    for name in fields:
        cells = raw[name]
        if cells.dtype in (TURNS, pl.List(pl.Null)) or _holds_messages(cells):
            continue
        if cells.dtype == _MIXED:
            wrong = bool(cells.struct.field("kind").is_in(_STRUCTURED).any())
        else:
            wrong = not is_plain(cells)
        if wrong:
            what = f"the column of {name!r} holds {_in_words(cells)}; it must hold texts, lists of texts, or messages"
            raise DataError(what, where=where, remedy="write each turn as a text, and a cell as a list of its turns")


def _holds_text(kind: pl.DataType) -> bool:
    return kind in (pl.String, pl.Null)


def mark(flaws: Bits, met: pl.Series, flaw: Flaw) -> None:
    """Set the flaw's bit, in place, in the rows that a mask `(N,)` names; a null in it names none."""
    flaws[met.fill_null(value=False).to_numpy()] |= np.uint32(flaw)


def _one_turn(texts: dict[str, pl.Series]) -> dict[str, pl.Series]:
    lists = pl.DataFrame(list(texts.values())).with_columns(
        pl.when(pl.col(name).is_not_null()).then(pl.concat_list(name)).alias(name) for name in texts
    )
    return {column.name: column for column in lists}


def _without_null_cells(turns: pl.DataFrame, texts: dict[str, pl.Series], flaws: Bits) -> list[pl.Series]:
    """Null cells as one null turn. They are missing, unless they hold a text: `null`, which was marked before."""
    some = pl.element().is_not_null()
    sound = turns.select(pl.all().list.eval(some).list.any() | (pl.all().list.len() == 0))
    for column in turns:
        missing = column.is_null()
        if column.name in texts:
            missing &= texts[column.name].is_null()
        mark(flaws, missing, Flaw.MISSING_CELL)
        mark(flaws, ~sound[column.name], Flaw.NULL_LIST)
    no_text = pl.lit(pl.Series([[None]], dtype=TURNS))
    filled = (
        pl.when(pl.col(name).is_null()).then(no_text).otherwise(pl.col(name)).alias(name) for name in turns.columns
    )
    return turns.select(filled).get_columns()


def _decode(texts: pl.DataFrame, flaws: Bits) -> dict[str, pl.Series]:
    """JSON lists of turns decoded, null where a cell holds none; all columns at once, for polars to share out."""
    try:
        plain, turns = _decode_plain(texts, texts.select(_one_plain_turn(pl.all())))
    except ComputeError:  # a raw control character, or an escape that JSON does not know
        plain, turns = _decode_plain(texts, texts.select(pl.all().is_null()))
    columns = {}
    for name in texts.columns:
        columns[name] = turns[name]
        odd = (~plain[name]).arg_true().to_numpy()
        if len(odd):
            decoded = [_decode_cell(text) for text in texts[name].gather(odd)]
            flaws[odd] |= np.array([flaw for _, flaw in decoded], dtype=np.uint32)
            cells = pl.Series(name, [cell for cell, _ in decoded], dtype=TURNS)
            places = np.arange(len(texts))
            places[odd] = len(texts) + np.arange(len(odd))
            columns[name] = pl.concat([turns[name], cells]).gather(places)
    return columns


def _one_plain_turn(cells: pl.Expr) -> pl.Expr:
    """Marks most cells of one turn without a pattern's look at every character: `["`, text, `"]`, and no sign of more.

    A quote that ended a string further inside would have a comma or a bracket behind it, white space aside: cells that
    hold such a quote are left to the pattern, though most of them are escaped and harmless. So there is one string, if
    the cell is JSON at all, which the decoder will say; and it holds no half pair and no control character.
    """
    texts = cells.str
    framed = texts.starts_with('["') & texts.ends_with('"]') & ~texts.ends_with('\\"]')
    return framed & ~texts.contains_any(_SIGNS_OF_MORE)


def _decode_plain(texts: pl.DataFrame, sure: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Marks cells that `sure` or the pattern vouches for (null cells too), and these decoded."""
    unsure = (  # not null where sure: polars looks at what a null hides, too
        pl.when(~pl.lit(sure[name])).then(pl.col(name)).otherwise(pl.lit("[]")) for name in texts.columns
    )
    plain = texts.select(cell.str.contains(_TURN_LIST).fill_null(value=True) for cell in unsure)
    cells = (
        pl.col(name) if plain[name].all() else pl.when(pl.lit(plain[name])).then(pl.col(name)) for name in texts.columns
    )
    return plain, texts.select(cell.str.json_decode(TURNS) for cell in cells)


def _decode_cell(text: str) -> tuple[list[str | None] | None, Flaw]:
    """One cell by Python's decoder, which also takes raw line breaks; what is no list of turns becomes one turn.

    >>> _decode_cell('["half a pair: \\\\ud83d"]') == (["half a pair: " + REPLACEMENT], Flaw.SURROGATE)
    True
    >>> _decode_cell("not a list")
    (['not a list'], <Flaw.UNDECODABLE: 4>)
    """
    if not text.strip():
        return None, Flaw.MISSING_CELL
    try:
        value = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return [text], Flaw.UNDECODABLE | _control(text)
    if value is None:
        return None, Flaw.NULL_LITERAL
    sound = True
    if is_messages(value):
        value, sound = field_turns(value)
    if not _is_turns(value):
        return [text], Flaw.UNDECODABLE | _control(text)
    turns = _encodable(value)
    odd = (Flaw.SURROGATE if turns != value else Flaw(0)) | (Flaw(0) if sound else Flaw.UNDECODABLE)
    return turns, odd | _control(*turns)


def _control(*texts: str | None) -> Flaw:
    has_control = any(re.search(CONTROL, text) for text in texts if text is not None)
    return Flaw.CONTROL_CHARACTER if has_control else Flaw(0)


def _is_turns(value: Any) -> bool:
    return isinstance(value, list) and all(turn is None or isinstance(turn, str) for turn in value)


def _encodable(texts: Sequence[str | None]) -> list[str | None]:
    return [None if text is None else SURROGATE.sub(REPLACEMENT, text) for text in texts]


def refuse(problems: Sequence[DataError], where: object) -> None:
    """Raise one error that lists all problems, if there are any.

    Raises:
        DataError: there is a problem.
    """
    if len(problems) == 1:
        only = problems[0]
        raise DataError(only.what, where=where, rows=only.rows, remedy=only.remedy)
    if problems:
        listed = textwrap.indent("\n".join(str(problem) for problem in problems), "  ")
        raise DataError(f"{len(problems)} things are wrong:\n{listed}", where=where)
