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
    test_rows, sample_rows = read_raw(test), read_raw(sample)
    for path, frame in ((test, test_rows), (sample, sample_rows)):
        if "id" not in frame.columns:
            raise PackagingError(f"{path} has no column 'id', but {frame.columns}", remedy="leave --rows out")
    if sorted(test_rows["id"].cast(pl.String)) != sorted(sample_rows["id"].cast(pl.String)):
        raise PackagingError(f"{test} and {sample} have different ids", remedy="give the sample of this very test")
    places = {str(row_id): place for place, row_id in enumerate(test_rows["id"])}
    order = [places[str(row_id)] for row_id in sample_rows["id"]]
    written = []
    for path, frame, where in ((test, test_rows, range(len(test_rows))), (sample, sample_rows, order)):
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
        changed_texts = [_with_suffixes(frame[name], turn) for name in texts]
        pieces.append(frame.with_columns(_ids(frame["id"], turn), *changed_texts)[kept])
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


def _with_suffixes(cells: pl.Series, turn: int) -> pl.Series:
    """The texts of a repetition, each with its number behind the last turn."""
    if turn == 0:
        return cells
    ending = f" ({turn + 1})"
    new_cells = [
        _with_suffix(cell, ending) if isinstance(cell, list) else _text_with_suffix(cell, ending)
        for cell in cells.to_list()
    ]
    return pl.Series(cells.name, new_cells, dtype=cells.dtype)


def _with_suffix(turns: list[str | None], ending: str) -> list[str | None]:
    *before, last = turns or [None]
    return [*before, (last or "") + ending]


def _text_with_suffix(cell: str | None, ending: str) -> str:
    """A list of turns in JSON stays one; what is none, a broken one too, is a text."""
    try:
        turns = parsed(cell or "")
    except ValueError:
        turns = None
    if isinstance(turns, list) and all(turn is None or isinstance(turn, str) for turn in turns):
        return json.dumps(_with_suffix(turns, ending))
    return (cell or "") + ending
