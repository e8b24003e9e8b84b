"""Files, columns and formats, known here and nowhere else: files -> canonical rows, scores -> submission.

The canonical table has one row a comparison, in file order:

    id              String         exactly as in the file
    <each field>    List(String)   its turns; a null turn is kept apart from ""
    target          List(Float64)  probabilities in the task's class order; null where unlabelled
    weight          Float64        1.0

Training rows are checked strictly, and all that is wrong with a file is said in one error. Test rows are never
dropped and never refused for what their texts hold: what can't be decoded becomes one turn, with a note.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray
from polars.exceptions import NoDataError, PolarsError

from pairclf.console import console
from pairclf.errors import DataError
from pairclf.files import atomic_file
from pairclf.task import Row, Task

Probabilities = NDArray[np.float64]

REPLACEMENT = "\ufffd"
"""What stands where a file had half a surrogate pair, which no UTF-8 text can hold."""

TURNS = pl.List(pl.String)
LABEL_TOLERANCE = 1e-6  # labels are written by people: one, or thirds with all their digits
SUM_TOLERANCE = 1e-4  # probabilities went through float32, or even through float16

_SURROGATE = re.compile("[\ud800-\udfff]")

# polars joins the cells of a column into one JSON document before it parses them. So `["a` and `"]` in two rows
# would merge into one, `["a"],["b"]` would become two, numbers become strings and half a surrogate pair a NUL.
# Only cells of this shape, a whole list of strings and nulls, go that way; Python's decoder judges the others.
_SPACE = r"[ \t\r\n]*"
_PAIR = r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_CODE = r"\\u(?:[0-9a-ce-fA-CE-F][0-9a-fA-F]{3}|[dD][0-7][0-9a-fA-F]{2})"
_TURN = rf'(?:null|"(?:[^"\\\x00-\x1f]|\\["\\/bfnrt]|{_CODE}|{_PAIR})*")'
_TURN_LIST = rf"^{_SPACE}\[{_SPACE}(?:{_TURN}{_SPACE}(?:,{_SPACE}{_TURN}{_SPACE})*)?\]{_SPACE}$"


def read_rows(
    paths: Sequence[Path],
    task: Task,
    *,
    labelled: bool,
    max_rows: int | None = None,
    ignore_columns: Sequence[str] = (),
) -> pl.DataFrame:
    """Read files (.csv, .parquet or .jsonl), one after the other, into the canonical table.

    Args:
        paths: files, read in this order.
        task: names the fields, the classes and where the label stands.
        labelled: training rows, checked strictly. Otherwise test rows: labels are not read, unknown columns and
            undecodable cells only make a note.
        max_rows: read no more than the first so many rows of all files together.
        ignore_columns: further columns of training files to accept and not read.

    Raises:
        DataError: a file can't be read, or columns, ids, labels or (training rows) turns break a rule.
    """
    frames: list[pl.DataFrame] = []
    seen = pl.Series("id", [], dtype=pl.String)
    for path in paths:
        left = None if max_rows is None else max_rows - len(seen)
        if left == 0:
            break
        raw = _load(path, left, lossy=not labelled)
        _check_columns(raw.columns, path, task, labelled, ignore_columns)
        frames.append(_canonical(raw, path, task, labelled, seen))
        seen = seen.append(frames[-1]["id"])
    if not frames:
        raise DataError("no file of rows is named", remedy="give at least one .csv, .parquet or .jsonl file")
    return pl.concat(frames)


def to_rows(frame: pl.DataFrame, task: Task) -> list[Row]:
    """The canonical table as `Row`s, in its order."""
    rows = []
    for row_id, target, weight, *fields in frame.select("id", "target", "weight", *task.fields).iter_rows():
        turns = {name: tuple(cell) for name, cell in zip(task.fields, fields, strict=True)}
        rows.append(Row(row_id, turns, None if target is None else tuple(target), weight))
    return rows


# --- files -----------------------------------------------------------------------------------------------------------


def _load(path: Path, rows: int | None, *, lossy: bool) -> pl.DataFrame:
    """The first `rows` rows of a file, as it has them; a CSV's cells are all text. `lossy` mends broken UTF-8."""
    readers = {".csv": _load_csv, ".parquet": _load_parquet, ".jsonl": _load_jsonl}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"file type {path.suffix!r} can't be read; it must be one of {', '.join(readers)}",
            where=path,
            remedy="convert the file, or correct its name",
        )
    if not path.is_file():
        raise DataError("there is no such file", where=path, remedy="check data.folder and the file's name")
    try:
        frame = reader(path, rows, lossy)
    except NoDataError as error:
        raise DataError("the file is empty", where=path, remedy="fetch or write it again") from error
    except (OSError, PolarsError, ValueError, RecursionError) as error:
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"can't be read as {path.suffix.lower()[1:]}: {detail}",
            where=path,
            remedy="the file must be whole, in UTF-8, with as many cells in each row as the header has",
        ) from error
    if frame.is_empty():
        raise DataError("the file holds no rows", where=path, remedy="fetch or write it again")
    return frame


def _load_csv(path: Path, rows: int | None, lossy: bool) -> pl.DataFrame:
    encoding: Literal["utf8", "utf8-lossy"] = "utf8-lossy" if lossy else "utf8"
    frame = pl.read_csv(path, infer_schema=False, n_rows=rows, encoding=encoding, glob=False)
    # Blank lines at the end are no rows; one in the middle is a row that lost its id, and is said to be one.
    blank = frame.select(pl.all_horizontal(pl.all().is_null())).to_series()
    return frame.head(len(frame) - (~blank).reverse().to_list().index(True) if not blank.all() else 0)


def _load_parquet(path: Path, rows: int | None, lossy: bool) -> pl.DataFrame:
    categories = pl.col(pl.Categorical, pl.Enum)  # pandas writes repeated texts so
    return pl.read_parquet(path, n_rows=rows, glob=False).with_columns(categories.cast(pl.String))


def _load_jsonl(path: Path, rows: int | None, lossy: bool) -> pl.DataFrame:
    with path.open(encoding="utf-8-sig", errors="replace" if lossy else "strict") as stream:
        lines = ((number, line) for number, line in enumerate(stream, 1) if line.strip())
        records = [_record(number, line) for number, line in islice(lines, rows)]
    names = dict.fromkeys(name for record in records for name in record)
    return pl.DataFrame([_jsonl_column(name, [record.get(name) for record in records]) for name in names])


def _record(number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line {number}: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"line {number} holds no object but a {type(record).__name__}")
    return record


def _jsonl_column(name: str, cells: list[Any]) -> pl.Series:
    """Lists of turns as such; everything else as text, the way a CSV has it."""
    if any(isinstance(cell, list) for cell in cells) and all(cell is None or _is_turns(cell) for cell in cells):
        return pl.Series(name, [None if cell is None else _encodable(cell) for cell in cells], dtype=TURNS)
    texts = [cell if cell is None or isinstance(cell, str) else json.dumps(cell) for cell in cells]
    return pl.Series(name, _encodable(texts), dtype=pl.String)


# --- from a file's columns to the canonical ones ---------------------------------------------------------------------


def _refuse(problems: Sequence[DataError], where: object) -> None:
    """Raise what is wrong with one file, all of it at once; nothing if there is nothing."""
    if len(problems) == 1:
        only = problems[0]
        raise DataError(only.what, where=where, rows=only.rows, remedy=only.remedy)
    if problems:
        listed = textwrap.indent("\n".join(str(problem) for problem in problems), "  ")
        raise DataError(f"{len(problems)} things are wrong with one file:\n{listed}", where=where)


def _label_columns(task: Task) -> tuple[str, ...]:
    return (task.label_column,) if task.label_column else task.classes


def _note(text: str, path: Path) -> None:
    console.print(f"note: {path.name}: {text}", markup=False, soft_wrap=True)


def _check_columns(columns: list[str], path: Path, task: Task, labelled: bool, ignore: Sequence[str]) -> None:
    wanted = ("id", *task.fields, *(_label_columns(task) if labelled else ()))
    known = {*wanted, *_label_columns(task), *task.extra_columns, *ignore}
    missing = [name for name in wanted if name not in columns]
    unknown = [name for name in columns if name not in known]
    problems = []
    if missing:
        problems.append(
            DataError(
                f"columns {missing} are missing; the file has {columns}",
                remedy=f"task {task.name!r} needs the columns {list(wanted)}",
            )
        )
    if unknown and labelled:
        hint = " ('' is a column without a name: an index that was written along)" if "" in unknown else ""
        problems.append(
            DataError(
                f"columns {unknown} are not known to task {task.name!r}{hint}",
                remedy=f"remove them, or accept them unread with data.ignore_columns={json.dumps(unknown)}",
            )
        )
    _refuse(problems, path)
    if unknown:
        _note(f"columns {unknown} are not read", path)


def _canonical(raw: pl.DataFrame, path: Path, task: Task, labelled: bool, seen: pl.Series) -> pl.DataFrame:
    """One file's canonical table; `seen` holds the ids of the files before it."""
    ids, problems = _read_ids(raw["id"], seen)
    columns = [ids]
    for name in task.fields:
        turns, bad = _read_turns(raw[name], task.multi_turn)
        columns.append(turns)
        rows = ids.filter(bad).to_list()
        if rows and labelled:
            remedy = "mend or remove these rows" + (", or set task.multi_turn=false" if task.multi_turn else "")
            expected = "JSON lists of strings and nulls" if task.multi_turn else "texts"
            problems.append(DataError(f"column {name!r} has cells that are no {expected}", rows=rows, remedy=remedy))
        elif rows:
            shown = ", ".join(rows[:5]) + (" …" if len(rows) > 5 else "")
            _note(f"{len(rows):,} undecodable cells of {name!r} are each read as one turn: {shown}", path)
    if labelled:
        targets, wrong = (_named_targets if task.label_column else _numeric_targets)(raw, ids, task)
        problems += wrong
    else:
        targets = pl.Series("target", [None] * len(ids), dtype=pl.List(pl.Float64))
    _refuse(problems, path)
    return pl.DataFrame([*columns, targets]).with_columns(weight=pl.lit(1.0))


def _read_ids(cells: pl.Series, seen: pl.Series) -> tuple[pl.Series, list[DataError]]:
    """Ids as text, those that are missing replaced by the number of their row, and what is wrong with them."""
    texts = _as_text(cells)
    missing = (texts.str.strip_chars() == "").fill_null(value=True)
    numbers = pl.select("row " + pl.int_range(1, len(texts) + 1).cast(pl.String)).to_series()
    ids = texts.zip_with(~missing, numbers).rename("id")
    repeated = ids.filter((ids.is_duplicated() | ids.is_in(seen.implode())) & ~missing).unique(maintain_order=True)
    problems = []
    if cells.dtype.is_nested() or cells.dtype == pl.Binary:
        problems.append(DataError(f"ids are {cells.dtype}", remedy="write them as text or whole numbers"))
    broken = texts.str.contains("\ufffd", literal=True).fill_null(value=False)
    if broken.any():
        what = f"{broken.sum():,} ids are not UTF-8, and could not be written back as they are"
        problems.append(DataError(what, rows=texts.filter(broken).to_list(), remedy="save the file as UTF-8"))
    if missing.any():
        what = f"{missing.sum():,} rows have no id (numbers count the rows below the header)"
        problems.append(DataError(what, rows=ids.filter(missing).to_list(), remedy="give every row an id"))
    if len(repeated):
        what = f"{len(repeated):,} ids stand in more than one row"
        remedy = "ids join scores to rows: make them unique over all files"
        problems.append(DataError(what, rows=repeated.to_list(), remedy=remedy))
    return ids, problems


def _as_text(cells: pl.Series) -> pl.Series:
    if cells.dtype == pl.String:
        return cells
    if cells.dtype.is_nested() or cells.dtype == pl.Binary:
        return pl.Series(cells.name, [None if c is None else str(c) for c in cells.to_list()], dtype=pl.String)
    return cells.cast(pl.String)


def _read_turns(cells: pl.Series, multi_turn: bool) -> tuple[pl.Series, pl.Series]:
    """A field's cells as lists of turns, and a mask of the undecodable ones, each repaired into one turn."""
    sound = pl.repeat(True, len(cells), dtype=pl.Boolean, eager=True)
    if cells.dtype in (pl.List(pl.String), pl.List(pl.Null)):
        turns = cells.cast(TURNS)
    elif cells.dtype not in (pl.String, pl.Null):
        turns, sound = _one_turn(_as_text(cells)), cells.is_null()
    elif multi_turn:
        turns, sound = _decode(cells.cast(pl.String))
    else:
        turns = _one_turn(cells.cast(pl.String))
    no_text = pl.lit(pl.Series([[None]], dtype=TURNS))
    filled = pl.select(pl.when(turns.is_null()).then(no_text).otherwise(turns).alias(cells.name))
    return filled.to_series(), ~sound


def _one_turn(texts: pl.Series) -> pl.Series:
    return pl.select(pl.concat_list(texts)).to_series()


def _decode(texts: pl.Series) -> tuple[pl.Series, pl.Series]:
    """JSON lists of turns decoded, and a mask of the cells that are such lists (or missing)."""
    plain = texts.str.contains(_TURN_LIST).fill_null(value=True)
    nothing = pl.Series([None], dtype=pl.String)
    turns = texts.zip_with(plain, nothing).str.json_decode(TURNS)
    if plain.all():
        return turns, plain
    decoded = [(None, True) if whole else _decode_cell(text) for text, whole in zip(texts, plain, strict=True)]
    turns = turns.zip_with(plain, pl.Series([cell for cell, _ in decoded], dtype=TURNS))
    return turns, pl.Series([sound for _, sound in decoded], dtype=pl.Boolean)


def _decode_cell(text: str) -> tuple[list[str | None] | None, bool]:
    """One cell by Python's decoder, which also takes raw line breaks; what is no list of turns becomes one turn.

    >>> _decode_cell('["half a pair: \\\\ud83d"]') == (["half a pair: " + REPLACEMENT], True)
    True
    >>> _decode_cell("not a list")
    (['not a list'], False)
    """
    if not text.strip():
        return None, True
    try:
        value = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return [text], False
    if value is None:
        return None, True
    return (_encodable(value), True) if _is_turns(value) else ([text], False)


def _is_turns(value: Any) -> bool:
    return isinstance(value, list) and all(turn is None or isinstance(turn, str) for turn in value)


def _encodable(texts: Sequence[str | None]) -> list[str | None]:
    return [None if text is None else _SURROGATE.sub(REPLACEMENT, text) for text in texts]


def _named_targets(raw: pl.DataFrame, ids: pl.Series, task: Task) -> tuple[pl.Series, list[DataError]]:
    """One-hot targets from a column that names the class."""
    names = _as_text(raw[_label_columns(task)[0]])
    unknown = ~names.is_in(list(task.classes)).fill_null(value=False)
    problems = []
    if unknown.any():
        shown = names.filter(unknown).unique(maintain_order=True).head(5).to_list()
        what = f"column {task.label_column!r} names {shown}, which are not among the classes {list(task.classes)}"
        remedy = "correct these labels or remove the rows; test files go in data.test"
        problems.append(DataError(what, rows=ids.filter(unknown).to_list(), remedy=remedy))
    one_hot = [(names == name).cast(pl.Float64) for name in task.classes]
    return pl.select(pl.concat_list(one_hot).alias("target")).to_series(), problems


def _numeric_targets(raw: pl.DataFrame, ids: pl.Series, task: Task) -> tuple[pl.Series, list[DataError]]:
    """Targets from one column of probabilities a class."""
    values = _numbers(raw, task.classes)
    rules = {"are no numbers": ~np.isfinite(values).all(axis=1), "are negative": (values < 0).any(axis=1)}
    if task.multi_label:
        rules["are above one"] = (values > 1).any(axis=1)
    else:
        rules["do not sum to one"] = np.abs(values.sum(axis=1) - 1) > LABEL_TOLERANCE
    problems = [
        DataError(
            f"labels in {list(task.classes)} {rule}",
            rows=ids.filter(pl.Series(broken)).to_list(),
            remedy="correct these labels or remove the rows",
        )
        for rule, broken in rules.items()
        if broken.any()
    ]
    return pl.Series("target", values, dtype=pl.Array(pl.Float64, values.shape[1])).cast(pl.List(pl.Float64)), problems


def _numbers(frame: pl.DataFrame, columns: Sequence[str]) -> Probabilities:
    """Columns as float64 `(N, C)`; NaN where a cell is no number."""
    numbers = [_as_text(frame[name]).str.strip_chars().cast(pl.Float64, strict=False) for name in columns]
    return np.stack([column.fill_null(np.nan).to_numpy() for column in numbers], axis=1).astype(np.float64)


# --- scores and submissions ------------------------------------------------------------------------------------------


def scores_frame(
    ids: Sequence[str],
    probabilities: Probabilities,
    task: Task,
    orders: int | Sequence[int],
    models: Sequence[str] | pl.Series,
) -> pl.DataFrame:
    """Scores as a table: `id`, one Float64 column a class, `orders` Int32, `models` List(String).

    Args:
        ids: `N` ids.
        probabilities: `(N, C)`, columns in the task's class order, rows summing to one (1e-4).
        orders: how many orders (1 or 2) stand behind every row, or behind each.
        models: names of the models behind every row, or a List(String) series with those behind each.

    Raises:
        DataError: shapes differ, an id stands twice, or a row is no distribution.
    """
    shape = (len(ids), len(task.classes))
    if probabilities.shape != shape:
        raise DataError(f"probabilities have shape {probabilities.shape}, ids and classes ask for {shape}")
    listed = pl.Series("id", list(ids), dtype=pl.String)
    _refuse(_score_problems(listed, probabilities, task), "scores")
    named = models if isinstance(models, pl.Series) else pl.Series([list(models)] * len(ids), dtype=TURNS)
    counts = [orders] * len(ids) if isinstance(orders, int) else list(orders)
    return pl.DataFrame(
        [
            listed,
            *(pl.Series(name, probabilities[:, column], dtype=pl.Float64) for column, name in enumerate(task.classes)),
            pl.Series("orders", counts, dtype=pl.Int32),
            named.rename("models"),
        ]
    )


def write_scores(path: Path, scores: pl.DataFrame) -> None:
    """Write a table that `scores_frame` made as parquet, atomically."""
    with atomic_file(path) as temporary:
        scores.write_parquet(temporary)


def read_scores(path: Path, task: Task) -> pl.DataFrame:
    """Read what `write_scores` wrote, checked again.

    Raises:
        DataError: the file can't be read, is no table of scores of this task, or breaks a rule of `scores_frame`.
    """
    frame = _load(path, None, lossy=False)
    classes = ((name, pl.Float64()) for name in task.classes)
    wanted = pl.Schema([("id", pl.String()), *classes, ("orders", pl.Int32()), ("models", TURNS)])
    if frame.schema != wanted:
        raise DataError(
            f"the file has {_shown(frame.schema)}; scores of task {task.name!r} have {_shown(wanted)}",
            where=path,
            remedy="give a scores.parquet that was written for this task",
        )
    _refuse(_score_problems(frame["id"], class_matrix(frame, task), task), path)
    return frame


def _shown(schema: pl.Schema) -> str:
    return ", ".join(f"{name} {kind}" for name, kind in schema.items())


def class_matrix(scores: pl.DataFrame, task: Task) -> Probabilities:
    """The class columns of scores as `(N, C)` float64, in the task's class order."""
    return scores.select(task.classes).to_numpy().astype(np.float64)


def write_submission(path: Path, scores: pl.DataFrame, task: Task, sample: Path | None) -> None:
    """Write a submission, atomically: the sample's ids, order and columns, joined on id and never by position.

    A column named as the task's label column gets the name of the likeliest class; of equally likely ones, the
    first in the task's class order. Without a sample, ids stand in the order of the scores.

    Raises:
        DataError: ids are missing, unknown or repeated, or a row is no distribution; nothing is written.
    """
    problems = _score_problems(scores["id"], class_matrix(scores, task), task)
    columns = ["id", *_label_columns(task)]
    if sample is not None:
        wanted = _load_sample(sample, task)
        columns = wanted.columns
        problems += _different_ids(scores["id"], wanted["id"], "the scores")
    _refuse(problems, sample or path)
    if sample is not None:
        scores = wanted.select("id").join(scores, on="id", how="left", maintain_order="left")
    if task.label_column in columns:
        best = np.argmax(class_matrix(scores, task), axis=1)
        scores = scores.select("id", pl.Series(task.label_column, [task.classes[index] for index in best]))
    with atomic_file(path) as temporary:
        scores.select(columns).write_csv(temporary)


def check_submission(path: Path, sample: Path, task: Task) -> dict[str, Any]:
    """Judge a submission as Kaggle would: the sample's columns, ids and order, and numbers that can be scored.

    Returns:
        `rows`, `columns`, `verdicts` (rows in which each class is the likeliest) and `means` (mean probability of
        each class; for a column of names, its share of the rows).

    Raises:
        DataError: with everything that is wrong.
    """
    wanted, given = _load_sample(sample, task), _load(path, None, lossy=False)
    if given.columns != wanted.columns:
        raise DataError(
            f"the submission has columns {given.columns}, the sample {wanted.columns}",
            where=path,
            remedy="write it with write_submission and this sample",
        )
    ids = _as_text(given["id"])
    problems = [*_repeated(ids, "the submission"), *_different_ids(ids, wanted["id"], "the submission")]
    if not problems and ids.to_list() != wanted["id"].to_list():
        problems.append(DataError("the ids are the sample's, in another order", remedy="keep the sample's order"))
    if task.label_column in given.columns:
        targets, wrong = _named_targets(given, ids, task)
        values = np.array(targets.to_list(), dtype=np.float64)
    else:
        values = _numbers(given, task.classes)
        wrong = _impossible(ids, values, task)
    _refuse([*problems, *wrong], path)
    verdicts = np.bincount(values.argmax(axis=1), minlength=len(task.classes))
    return {
        "rows": len(ids),
        "columns": given.columns,
        "verdicts": dict(zip(task.classes, verdicts.tolist(), strict=True)),
        "means": dict(zip(task.classes, values.mean(axis=0).tolist(), strict=True)),
    }


def _load_sample(sample: Path, task: Task) -> pl.DataFrame:
    wanted = _load(sample, None, lossy=False)
    allowed = [{"id", *task.classes}, {"id", *_label_columns(task)}]
    if set(wanted.columns) not in allowed:
        raise DataError(
            f"the sample submission has columns {wanted.columns}; task {task.name!r} can fill "
            + " or ".join(str(sorted(columns)) for columns in allowed[: 1 + (allowed[0] != allowed[1])]),
            where=sample,
            remedy="give the competition's sample_submission.csv, or the task that it belongs to",
        )
    wanted = wanted.with_columns(_as_text(wanted["id"]).fill_null("").alias("id"))
    _refuse(_repeated(wanted["id"], "the sample"), sample)
    return wanted


def _repeated(ids: pl.Series, holder: str) -> list[DataError]:
    """A problem where ids are missing or stand twice."""
    rows = ids.filter(ids.is_duplicated() | ids.is_null() | (ids == "")).unique(maintain_order=True).to_list()
    if not rows:
        return []
    return [DataError(f"{holder} have ids that are empty or stand twice", rows=rows, remedy="one row an id")]


def _score_problems(ids: pl.Series, values: Probabilities, task: Task) -> list[DataError]:
    return [*_repeated(ids, "the scores"), *_impossible(ids, values, task)]


def _different_ids(given: pl.Series, wanted: pl.Series, holder: str) -> list[DataError]:
    problems = []
    missing = wanted.filter(~wanted.is_in(given.implode())).to_list()
    unknown = given.filter(~given.is_in(wanted.implode())).to_list()
    if missing:
        what = f"{holder} lack {len(missing):,} ids of the sample submission"
        problems.append(DataError(what, rows=missing, remedy="score the test file that the sample belongs to"))
    if unknown:
        what = f"{holder} have {len(unknown):,} ids that the sample submission lacks"
        problems.append(DataError(what, rows=unknown, remedy="score the test file that the sample belongs to"))
    return problems


def _impossible(ids: pl.Series, values: Probabilities, task: Task) -> list[DataError]:
    """Problems of an `(N, C)` array that should hold a distribution a row."""
    finite = np.isfinite(values).all(axis=1)
    outside = finite & ((values < 0) | (values > 1)).any(axis=1)
    off = finite & (np.abs(values.sum(axis=1) - 1) > SUM_TOLERANCE) & (not task.multi_label)
    rules = {"are no finite numbers": ~finite, "are outside [0, 1]": outside, "do not sum to one": off}
    return [
        DataError(
            f"probabilities of {int(broken.sum()):,} rows {rule}",
            rows=ids.filter(pl.Series(broken)).to_list(),
            remedy="find out which model scored these rows; nothing was mended here",
        )
        for rule, broken in rules.items()
        if broken.any()
    ]
