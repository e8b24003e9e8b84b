"""A stand-in for the hidden test: the rows of the public test, repeated to the hidden test's size, no two alike."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from pairclf.data.csv_syntax import check_csv
from pairclf.errors import PackagingError
from pairclf.files import atomic_file, parsed


def read_raw(path: Path) -> pl.DataFrame:
    """Read a parquet file, or a CSV whose cells stay texts.

    Raises:
        PackagingError: it is neither, or can't be read.
        DataError: the CSV's quotes, or the number of cells on its lines, are not those of RFC 4180.
    """
    try:
        if path.suffix == ".csv":
            check_csv(path)
            return pl.read_csv(path, infer_schema=False)
        if path.suffix == ".parquet":
            return pl.read_parquet(path)
    except pl.exceptions.PolarsError as error:
        raise PackagingError(f"{path} can't be read: {error}", remedy="give the file as Kaggle mounts it") from error
    raise PackagingError(f"{path} is neither .csv nor .parquet", remedy="give the file as Kaggle mounts it")


def write_raw(path: Path, frame: pl.DataFrame) -> None:
    """Write a frame in the format that the suffix names."""
    with atomic_file(path) as temporary:
        if path.suffix == ".csv":
            frame.write_csv(temporary)
        else:
            frame.write_parquet(temporary)


def enlarge(
    test: Path, sample: Path, rows: int, folder: Path, fields: Sequence[str], ids: tuple[str, str] = ("id", "id")
) -> tuple[Path, Path]:
    """Write test and sample submission with `rows` rows into `folder`, in the formats that they have.

    Row `n` is row `n % N` of the file. Repetitions get new ids: numbers continue above the largest, other ids get a
    suffix. So does the first of `fields`, the task's columns of texts, as equal inputs are scored only once.
    `ids` names the columns of ids in test and sample.

    Raises:
        PackagingError: a file has no column of ids, or the two have different ids.
    """
    test_rows, sample_rows = read_raw(test), read_raw(sample)
    for path, frame, row_id in ((test, test_rows, ids[0]), (sample, sample_rows, ids[1])):
        if row_id not in frame.columns:
            raise PackagingError(f"{path} has no column {row_id!r}, but {frame.columns}", remedy="leave --rows out")
    test_ids, sample_ids = test_rows[ids[0]], sample_rows[ids[1]]
    if sorted(test_ids.cast(pl.String)) != sorted(sample_ids.cast(pl.String)):
        raise PackagingError(f"{test} and {sample} have different ids", remedy="give the sample of this very test")
    places = {str(row_id): place for place, row_id in enumerate(test_ids)}
    order = [places[str(row_id)] for row_id in sample_ids]
    files = ((test, test_rows, range(len(test_rows)), ids[0]), (sample, sample_rows, order, ids[1]))
    for path, frame, where, row_id in files:
        texts = [name for name in fields if name in frame.columns][:1]
        write_raw(folder / path.name, _repeated(frame, list(where), rows, texts, row_id))
    return folder / test.name, folder / sample.name


def _repeated(frame: pl.DataFrame, places: list[int], rows: int, texts: Sequence[str], row_id: str) -> pl.DataFrame:
    """The first `rows` rows of endless repetitions; no repetition has the same `texts` as another.

    `places`: of each row of the frame in the test file, so that both files leave out the same rows.
    """
    pieces = []
    for turn in range(-(-rows // len(frame))):
        kept = [at for at, place in enumerate(places) if turn * len(frame) + place < rows]
        changed_texts = [_with_suffixes(frame[name], turn) for name in texts]
        pieces.append(frame.with_columns(_ids(frame[row_id], turn), *changed_texts)[kept])
    return pl.concat(pieces)


def _ids(ids: pl.Series, turn: int) -> pl.Series:
    """New ids for a repetition."""
    if turn == 0:
        return ids
    texts, numbers = ids.cast(pl.String), ids.cast(pl.Int64, strict=False)
    if numbers.cast(pl.String).equals(texts):
        span = max(numbers.to_list()) - min(numbers.to_list()) + 1
        shifted: pl.Series = (numbers + turn * span).cast(ids.dtype)
        return shifted
    ending = "-again"
    while texts.str.contains(ending, literal=True).any():
        ending += "-"
    return texts + f"{ending}{turn}"


def _with_suffixes(cells: pl.Series, turn: int) -> pl.Series:
    """The texts of a repetition, with its number after the last turn."""
    if turn == 0:
        return cells
    ending = f" ({turn + 1})"
    changed = _with_suffix if isinstance(cells.dtype, pl.List) else _text_with_suffix
    return pl.Series(cells.name, [changed(cell, ending) for cell in cells.to_list()], dtype=cells.dtype)


def _with_suffix(turns: list[str | None] | None, ending: str) -> list[str | None]:
    *before, last = turns or [None]
    return [*before, (last or "") + ending]


def _text_with_suffix(cell: str | None, ending: str) -> str:
    """A JSON list of turns stays one; everything else, also broken JSON, is a text."""
    try:
        turns = parsed(cell or "")
    except ValueError:
        turns = None
    if isinstance(turns, list) and all(turn is None or isinstance(turn, str) for turn in turns):
        return json.dumps(_with_suffix(turns, ending))
    return (cell or "") + ending
