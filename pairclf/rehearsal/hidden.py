"""A stand-in for the hidden test: the rows of the public one, as many as there will be, each an input of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from pairclf.data.csv_syntax import check_csv
from pairclf.errors import PackagingError
from pairclf.files import atomic_file, parsed


def read_raw(path: Path) -> pl.DataFrame:
    """A CSV's cells as the texts that they are, or a parquet file.

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
    """In the format that the suffix names."""
    with atomic_file(path) as temporary:
        if path.suffix == ".csv":
            frame.write_csv(temporary)
        else:
            frame.write_parquet(temporary)


def enlarge(test: Path, sample: Path, rows: int, folder: Path, fields: Sequence[str]) -> tuple[Path, Path]:
    """Write test and sample submission with `rows` rows into `folder`, in the formats that they have.

    Row `n` is row `n % N` of the file; from the second time on its id is a new one: numbers go on above the largest,
    other ids get an ending, and so does the text, as equal inputs are scored but once.

    Args:
        test, sample: the public ones.
        rows: of the hidden test.
        folder: for the two.
        fields: the task's columns of texts; the first one is told apart.

    Returns:
        The two files.

    Raises:
        PackagingError: a file has no column `id`, or the two have different ids.
    """
    shown, wanted = read_raw(test), read_raw(sample)
    for path, frame in ((test, shown), (sample, wanted)):
        if "id" not in frame.columns:
            raise PackagingError(f"{path} has no column 'id', but {frame.columns}", remedy="leave --rows out")
    if sorted(shown["id"].cast(pl.String)) != sorted(wanted["id"].cast(pl.String)):
        raise PackagingError(f"{test} and {sample} have different ids", remedy="give the sample of this very test")
    places = {str(one): place for place, one in enumerate(shown["id"])}
    order = [places[str(one)] for one in wanted["id"]]
    written = []
    for path, frame, where in ((test, shown, range(len(shown))), (sample, wanted, order)):
        target = folder / path.name
        write_raw(target, _repeated(frame, list(where), rows, [name for name in fields if name in frame.columns][:1]))
        written.append(target)
    return written[0], written[1]


def _repeated(frame: pl.DataFrame, places: list[int], rows: int, texts: Sequence[str]) -> pl.DataFrame:
    """`rows` rows, of which no repetition has the `texts` of another one.

    `places`: of each row of the frame in the test file, so that both files leave out the same rows.
    """
    pieces = []
    for turn in range(-(-rows // len(frame))):
        kept = [at for at, place in enumerate(places) if turn * len(frame) + place < rows]
        told = [_told_apart(frame[name], turn) for name in texts]
        pieces.append(frame.with_columns(_ids(frame["id"], turn), *told)[kept])
    return pl.concat(pieces)


def _ids(ids: pl.Series, turn: int) -> pl.Series:
    """The ids of a repetition: none is one of another."""
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


def _told_apart(cells: pl.Series, turn: int) -> pl.Series:
    """The texts of a repetition, each with its number behind the last turn."""
    if turn == 0:
        return cells
    ending = f" ({turn + 1})"
    made = [_ended(cell, ending) if isinstance(cell, list) else _ended_text(cell, ending) for cell in cells.to_list()]
    return pl.Series(cells.name, made, dtype=cells.dtype)


def _ended(turns: list[str | None], ending: str) -> list[str | None]:
    *before, last = turns or [None]
    return [*before, (last or "") + ending]


def _ended_text(cell: str | None, ending: str) -> str:
    """A list of turns in JSON stays one; what is none, a broken one too, is a text."""
    try:
        turns = parsed(cell or "")
    except ValueError:
        turns = None
    if isinstance(turns, list) and all(one is None or isinstance(one, str) for one in turns):
        return json.dumps(_ended(turns, ending))
    return (cell or "") + ending
