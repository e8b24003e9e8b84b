"""Columns, known here and nowhere else: files -> canonical rows, scores -> submission.

The canonical table has one row a comparison, in file order:

    id              String         exactly as in the file; `row 7` where the seventh row of a file has none
    <each field>    List(String)   its turns; a null turn is kept apart from ""
    target          List(Float64)  probabilities in the task's class order; null where unlabelled, or no label
    weight          Float64        the source's, times the file's where it has a column of weights
    train_only      Boolean        the source's: trained on in every fold and never held out
    file            String         the file's name, as it was given
    flaws           UInt32         bits of `formats.Flaw`: what was wrong with the row and can be seen no more

Reading refuses files, not rows: what is done about rows that have flaws is for `audit` to say.
"""

from __future__ import annotations

import difflib
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from polars.exceptions import PolarsError

from pairclf.config import Source
from pairclf.console import console
from pairclf.data.formats import (
    CHUNK,
    TURNS,
    Flaw,
    as_ids,
    as_text,
    expand,
    is_plain,
    load,
    mark,
    read_file,
    read_turns,
    with_plain_texts,
)
from pairclf.errors import DataError
from pairclf.files import atomic_file
from pairclf.scores.metrics import likeliest
from pairclf.task import Row, Task

Probabilities = NDArray[np.float64]

LABEL_TOLERANCE = 1e-6  # labels are written by people: one, or thirds with all their digits
HASHES = {"prompt": "prompt", "row_hash": "text"}
"""Columns of scores that tell which row was scored, and of what each is the hash; null: not known."""

SUM_TOLERANCE = 1e-4  # probabilities went through float32, or even through float16

_TRUTH = {"true": "1", "false": "0", "True": "1", "False": "0", "TRUE": "1", "FALSE": "0"}
"""How JSON and parquet, Python and R write booleans, and what these are as a label."""


def read_rows(
    sources: Sequence[Path | Source],
    task: Task,
    *,
    labelled: bool,
    max_rows: int | None = None,
) -> pl.DataFrame:
    """Read files (.csv, .parquet or .jsonl), one after the other, into the canonical table.

    Args:
        sources: files or globs, and sources with other columns, read in this order.
        task: names the fields, the classes and where the label stands.
        labelled: training rows, whose unknown columns are refused. Otherwise test rows: labels and weights are not
            read, unknown columns make a note, and broken UTF-8 is mended.
        max_rows: read no more than the first so many rows of all files together.

    Raises:
        DataError: a file can't be read, its columns are not those that are needed, a weight is not above 0, or a
            source contradicts the task.
    """
    return pl.concat(_tables(sources, task, labelled, max_rows, None))


def scan_rows(
    sources: Sequence[Path | Source],
    task: Task,
    *,
    labelled: bool,
    max_rows: int | None = None,
    size: int = CHUNK,
) -> Iterator[pl.DataFrame]:
    """The rows of `read_rows` in canonical chunks of up to `size` rows, for files that don't fit into memory.

    Raises:
        DataError: as `read_rows`, when the chunk is asked for that shows it.
    """
    return _tables(sources, task, labelled, max_rows, size)


def _tables(
    sources: Sequence[Path | Source],
    task: Task,
    labelled: bool,
    max_rows: int | None,
    size: int | None,
) -> Iterator[pl.DataFrame]:
    if not sources:
        raise DataError("no file of rows is named", remedy="give at least one .csv, .parquet or .jsonl file")
    left = max_rows
    for entry in sources:
        source = entry if isinstance(entry, Source) else Source(files=[entry])
        layout = _layout(source, task, labelled)
        before = 0  # rows of the source in files before this one
        for path in expand(source.files):
            number, columns = 0, None
            for raw in read_file(path, rows=left, lossy=not labelled, size=size, escape=source.escape is not None):
                if raw.columns != columns:
                    columns = raw.columns
                    found = _found(layout, raw, task)
                    _check_columns(columns, path, task, found, labelled)
                yield _canonical(raw, path, task, found, number, before)
                number += len(raw)
            before += number
            left = None if left is None else left - number
            if left == 0:
                return


def in_memory(frame: Any) -> pl.DataFrame:
    """A polars frame, or a pandas one made one without its index, with texts where these were categories.

    Raises:
        DataError: it is neither, or a column mixes types.
    """
    try:
        given = frame if isinstance(frame, pl.DataFrame) else pl.from_pandas(frame)
    except (TypeError, ValueError) as error:
        what = f"rows can't be taken from a {type(frame).__name__}: {str(error).splitlines()[0]}"
        raise DataError(what, remedy="hand over a polars or pandas DataFrame, one type a column") from error
    return with_plain_texts(given)


def rows_in_memory(raw: pl.DataFrame, task: Task) -> pl.DataFrame:
    """The canonical table of test rows that stand in no file, numbered from 1 whatever their own ids are.

    Raises:
        DataError: a column of the task's fields is missing.
    """
    where = Path("batch")
    layout = _layout(Source(files=[where], columns={"id": None}, ignore_columns="all"), task, labelled=False)
    _check_columns(raw.columns, where, task, layout, labelled=False)
    return _canonical(raw, where, task, layout, 0, 0)


def to_rows(frame: pl.DataFrame, task: Task) -> list[Row]:
    """The canonical table as `Row`s, in its order."""
    rows = []
    for row_id, target, weight, *fields in frame.select("id", "target", "weight", *task.fields).iter_rows():
        turns = {name: tuple(cell) for name, cell in zip(task.fields, fields, strict=True)}
        rows.append(Row(row_id, turns, None if target is None else tuple(target), weight))
    return rows


def write_rows(path: Path, frame: pl.DataFrame, task: Task) -> None:
    """Write a canonical table in the task's own columns, atomically: .csv (lists of turns as JSON), .parquet or .jsonl.

    Labels that are shared by several classes are written as a column a class under every task; weights where one of
    them is not 1.

    Raises:
        DataError: the file type is another, or can't hold these rows; nothing is written.
    """
    kind = path.suffix.lower()
    if kind not in (".csv", ".parquet", ".jsonl"):
        remedy = "name a .csv, .parquet or .jsonl file"
        raise DataError(f"file type {path.suffix!r} can't be written", where=path, remedy=remedy)
    weights = ["weight"] if (frame["weight"] != 1).any() else []
    table = frame.select("id", *task.fields, *_label_cells(frame, task), *weights)
    if kind == ".csv":
        table = table.with_columns(_text_cells(path, frame, task))
    with atomic_file(path) as temporary:
        if kind == ".parquet":
            table.write_parquet(temporary)
        elif kind == ".csv":
            table.write_csv(temporary)
        else:
            table.write_ndjson(temporary)


def _label_cells(frame: pl.DataFrame, task: Task) -> list[pl.Expr]:
    """The columns of labels; none for unlabelled rows."""
    if frame["target"].null_count() == len(frame):
        return []
    if task.label_column is None or (frame["target"].list.max() != 1).any():
        return [pl.col("target").list.get(place).alias(name) for place, name in enumerate(task.classes)]
    named = pl.col("target").list.arg_max().replace_strict(range(len(task.classes)), task.classes, default=None)
    return [named.alias(task.label_column)]


def _text_cells(path: Path, frame: pl.DataFrame, task: Task) -> list[pl.Expr]:
    """The fields as text cells."""
    if task.multi_turn:
        coded = {name: pl.struct(pl.col(name).alias("")).struct.json_encode() for name in task.fields}
        return [cell.str.strip_prefix('{"":').str.strip_suffix("}").alias(name) for name, cell in coded.items()]
    listed = frame.filter(pl.any_horizontal(pl.col(name).list.len() != 1 for name in task.fields))
    if len(listed):
        remedy = "write .parquet or .jsonl, which hold lists under every task"
        what = f"the cells of task {task.name!r} are texts in a CSV; these rows have lists of turns"
        raise DataError(what, where=path, rows=listed["id"].to_list(), remedy=remedy)
    return [pl.col(name).list.first() for name in task.fields]


# --- from a file's columns to the canonical ones ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where a source has what.

    Attributes:
        source: as the user wrote it.
        columns: our column (`id`, fields) -> the file's; None: rows are numbered.
        labels: the file's columns of labels, none for test rows: one with a name of a class, or one a class.
        named: the label is a name.
        weight: the file's column of weights; None: it has none.
    """

    source: Source
    columns: Mapping[str, str | None]
    labels: tuple[str, ...]
    named: bool
    weight: str | None

    @property
    def wanted(self) -> list[str]:
        return [name for name in (*self.columns.values(), *self.labels, self.weight) if name is not None]


def _layout(source: Source, task: Task, labelled: bool) -> _Layout:
    """Raises:
    DataError: the source names columns or classes that the task has not.
    """
    ours = ("id", *task.fields, *_label_columns(task), "weight")
    shown = ", ".join(map(str, source.files))
    problems = []
    for name, column in source.columns.items():
        if name not in ours:
            near = difflib.get_close_matches(name, ours, n=1, cutoff=0.0)[0]
            what = f"columns maps {name!r}, which task {task.name!r} has not; the nearest is {near!r}"
            problems.append(DataError(what, remedy=f"our columns stand on the left: {', '.join(ours)}"))
        elif column is None and name != "id":
            remedy = "name the files' column; only id may be null, which numbers the rows"
            problems.append(DataError(f"columns maps {name!r} to null", remedy=remedy))
    if unknown := sorted(set(source.labels.values()) - set(task.classes)):
        remedy = "the classes stand on the right: {label as the files have it: class}"
        problems.append(DataError(f"labels maps to {unknown}; the classes are {list(task.classes)}", remedy=remedy))
    columns = {name: source.columns.get(name, name) for name in ("id", *task.fields)}
    if source.labels and not (source.label_column or task.label_column):
        problems.append(DataError("labels needs label_column", remedy="name the files' column that names the class"))
    refuse(problems, f"the source of {shown}")
    label_column = source.label_column or source.columns.get(task.label_column or "", task.label_column)
    labels = (label_column,) if label_column else tuple(source.columns.get(name) or name for name in task.classes)
    weight = source.columns.get("weight")
    return _Layout(source, columns, labels if labelled else (), label_column is not None, weight if labelled else None)


def _found(layout: _Layout, raw: pl.DataFrame, task: Task) -> _Layout:
    """The layout as a file has it: probabilities where it names no class, and weights where it has that column."""
    ignored, labels = layout.source.ignore_columns, layout.labels
    if labels and layout.named and layout.source.label_column is None and labels[0] not in raw.columns:
        plain = [name for name in task.classes if name in raw.columns and is_plain(raw[name])]
        # A column that is named as a class may hold other things: in the WSDM files, the names of models.
        if len(plain) == len(task.classes) and np.isfinite(_numbers(raw, plain, _TRUTH)).any(axis=0).all():
            layout = replace(layout, labels=task.classes, named=False)
    if labels and layout.weight is None and "weight" in set(raw.columns) - set(layout.wanted):
        layout = replace(layout, weight="weight" if ignored != "all" and "weight" not in ignored else None)
    return layout


def refuse(problems: Sequence[DataError], where: object) -> None:
    """Raise all that is wrong in one error; nothing if there is nothing.

    Raises:
        DataError: there is a problem.
    """
    if len(problems) == 1:
        only = problems[0]
        raise DataError(only.what, where=where, rows=only.rows, remedy=only.remedy)
    if problems:
        listed = textwrap.indent("\n".join(str(problem) for problem in problems), "  ")
        raise DataError(f"{len(problems)} things are wrong:\n{listed}", where=where)


def _label_columns(task: Task) -> tuple[str, ...]:
    return (task.label_column,) if task.label_column else task.classes


def _check_columns(columns: list[str], path: Path, task: Task, layout: _Layout, labelled: bool) -> None:
    ignored = layout.source.ignore_columns
    known = {*layout.wanted, *_label_columns(task), *task.extra_columns, *(ignored if ignored != "all" else columns)}
    if layout.columns["id"] is None:
        known.add("id")
    missing = [name for name in layout.wanted if name not in columns]
    unknown = [name for name in columns if name not in known]
    problems = []
    if missing and (shape := _known_shape(columns)):
        problems.append(shape)
    elif missing:
        problems.append(
            DataError(
                f"columns {missing} are missing; the file has {columns}",
                remedy=f"task {task.name!r} needs the columns {layout.wanted}; give another task or map them "
                "(columns of a source, docs/data.md); test files have no labels (`check --unlabelled`)",
            )
        )
    if unknown and labelled and not (missing and _known_shape(columns)):
        hint = " ('' is a column without a name: an index that was written along)" if "" in unknown else ""
        problems.append(
            DataError(
                f"columns {unknown} are not known to task {task.name!r}{hint}",
                remedy=f"remove them, or accept them unread with data.ignore_columns={json.dumps(unknown)}",
            )
        )
    refuse(problems, path)
    if unknown:
        console.print(f"note: {path.name}: columns {unknown} are not read")


def _known_shape(columns: Sequence[str]) -> DataError | None:
    """What a file is that has the columns of a public set of another shape."""
    if {"conversation_a", "conversation_b"} <= set(columns):
        return DataError(
            "the file holds whole conversations (`conversation_a`, `conversation_b`: lists of messages with role and "
            "content, as LMSYS's releases of 33,000 and 140,000 conversations have them), which are not read",
            remedy="write a file with the users' messages as `prompt`, the assistants' as `response_a` and "
            "`response_b`, each a list of texts; `both_bad` and `tie (bothbad)` are ties: map them in `labels`",
        )
    if {"chosen", "rejected"} <= set(columns):
        return DataError(
            "the file holds a preferred and a rejected response (`chosen`, `rejected`, as UltraFeedback and most sets "
            "for reward models have them), which are not read",
            remedy="write a file that has `chosen` as `response_a` in half of the rows, drawn by id, and as "
            "`response_b` in the others, with the label that follows; one side for all would teach the side",
        )
    return None


def _canonical(raw: pl.DataFrame, path: Path, task: Task, layout: _Layout, number: int, before: int) -> pl.DataFrame:
    """A chunk's canonical table.

    Args:
        number: rows of the file before this chunk.
        before: rows of the source before this file.
    """
    picked = pl.DataFrame([raw[column].alias(name) for name, column in layout.columns.items() if column is not None])
    turns, flaws = read_turns(picked, task.fields, task.multi_turn, path)
    rows = pl.int_range(number + 1, number + len(raw) + 1, eager=True)
    if layout.columns["id"] is None:
        ids = (rows + before).cast(pl.String)
    else:
        ids, missing = _read_ids(picked["id"], rows, path)
        mark(flaws, missing, Flaw.MISSING_ID)
    if layout.labels:
        read_targets = _named_targets if layout.named else _numeric_targets
        targets = read_targets(raw.select(layout.labels), layout.source, task, path)
        mark(flaws, targets.is_null(), Flaw.BAD_LABEL)
    else:
        targets = pl.repeat(None, len(raw), dtype=pl.List(pl.Float64), eager=True)
    ids = (layout.source.id_prefix + ids).alias("id")
    return pl.DataFrame([ids, *turns, targets.alias("target"), _weights(raw, path, layout, ids)]).with_columns(
        train_only=pl.lit(layout.source.train_only),
        file=pl.lit(str(path)),
        flaws=pl.Series(flaws, dtype=pl.UInt32),
    )


def _weights(raw: pl.DataFrame, path: Path, layout: _Layout, ids: pl.Series) -> pl.Series:
    """Weights of the rows: the source's, times the file's own.

    Raises:
        DataError: one is missing, no finite number, or not above 0.
    """
    weights = np.full(len(raw), layout.source.weight)
    if layout.weight is not None:
        weights = weights * _numbers(raw, [layout.weight])[:, 0]
    wrong = ~(np.isfinite(weights) & (weights > 0))
    if wrong.any():
        raise DataError(
            f"column {layout.weight!r} has {int(wrong.sum()):,} weights that are missing, no finite numbers, or not "
            "above 0",
            where=path,
            rows=ids.filter(pl.Series(wrong)).to_list(),
            remedy="mend them or take these rows out; or leave the column unread with data.ignore_columns=[weight]",
        )
    return pl.Series("weight", weights)


def _read_ids(cells: pl.Series, rows: pl.Series, path: Path) -> tuple[pl.Series, pl.Series]:
    """Ids as text, with `row N` for a missing one, and a mask of the missing."""
    texts = as_ids(cells, path)
    broken = texts.str.contains("\ufffd", literal=True).fill_null(value=False)
    if broken.any():
        what = f"{broken.sum():,} ids are not UTF-8, and could not be written back as they are"
        raise DataError(what, where=path, rows=texts.filter(broken).to_list(), remedy="save the file as UTF-8")
    missing = (texts.str.strip_chars() == "").fill_null(value=True)
    return (texts.zip_with(~missing, "row " + rows.cast(pl.String)) if missing.any() else texts), missing


def _named_targets(raw: pl.DataFrame, source: Source, task: Task, path: Path) -> pl.Series:
    """One-hot targets from a column that names the class; null where it names none."""
    given = as_text(raw.to_series(), path)
    names = given.replace(_spellings([*source.labels, *task.classes])).replace(source.labels)
    one_hot = pl.concat_list((pl.lit(names) == name).cast(pl.Float64) for name in task.classes)
    return pl.select(pl.when(pl.lit(names).is_in(list(task.classes))).then(one_hot)).to_series()


def _spellings(known: Sequence[str]) -> dict[str, str]:
    """What stands for true and false in some format: the one of the known names that it is, whatever its case.

    >>> _spellings(["True", "False"])["false"]
    'False'
    """
    made = {}
    for word in _TRUTH:
        alike = {name for name in known if name.lower() == word.lower()}
        if len(alike) == 1:
            made[word] = alike.pop()
    return made


def _numeric_targets(raw: pl.DataFrame, source: Source, task: Task, path: Path) -> pl.Series:
    """Targets from one column of probabilities or booleans a class; null where they are none."""
    values = _numbers(raw, raw.columns, _TRUTH, path)
    sound = np.isfinite(values).all(axis=1) & (values >= 0).all(axis=1)
    sound &= (values <= 1).all(axis=1) if task.multi_label else np.abs(values.sum(axis=1) - 1) <= LABEL_TOLERANCE
    targets = pl.Series(values, dtype=pl.Array(pl.Float64, values.shape[1])).cast(pl.List(pl.Float64))
    return targets.zip_with(pl.Series(sound), pl.Series([None], dtype=targets.dtype))


def _numbers(
    frame: pl.DataFrame, columns: Sequence[str], words: Mapping[str, str] | None = None, path: Path | None = None
) -> Probabilities:
    """Columns as float64 `(N, C)`; NaN where a cell is no number. `words`: texts that stand for one."""
    cells = (as_text(frame[name], path).str.strip_chars() for name in columns)
    numbers = [(cell.replace(words) if words else cell).cast(pl.Float64, strict=False) for cell in cells]
    return np.stack([column.fill_null(np.nan).to_numpy() for column in numbers], axis=1).astype(np.float64)


# --- scores and submissions ------------------------------------------------------------------------------------------


def scores_frame(
    ids: Sequence[str],
    probabilities: Probabilities,
    task: Task,
    orders: int | Sequence[int],
    models: Sequence[str] | pl.Series,
    *,
    seen: int | pl.Series | None = None,
    hashes: pl.DataFrame | None = None,
) -> pl.DataFrame:
    """Scores as a table, with what stands behind each row.

    The columns: `id`, one Float64 a class, `orders` Int32, `models` List(String), `seen` UInt16, `HASHES` UInt64.

    Args:
        ids: `N` ids.
        probabilities: `(N, C)`, columns in the task's class order, rows summing to one (1e-4).
        orders: how many orders (1 or 2) stand behind every row, or behind each.
        models: names of the models behind every row, or a List(String) series with those behind each.
        seen: how many of these models were trained on a row with (nearly) this prompt; 0: the row is out of sample;
            null or None: nobody knows.
        hashes: `identity.row_hashes` of the rows, so that scores of other rows with the same ids show; None: unknown.

    Raises:
        DataError: shapes differ, an id stands twice, or a row is no distribution.
    """
    shape = (len(ids), len(task.classes))
    if probabilities.shape != shape:
        raise DataError(f"probabilities have shape {probabilities.shape}, ids and classes ask for {shape}")
    listed = pl.Series("id", list(ids), dtype=pl.String)
    refuse(_score_problems(listed, probabilities, task), "scores")
    named = models if isinstance(models, pl.Series) else pl.Series([list(models)] * len(ids), dtype=TURNS)
    counts = [orders] * len(ids) if isinstance(orders, int) else list(orders)
    if hashes is None:
        hashes = pl.select(pl.repeat(None, len(ids), dtype=pl.UInt64).alias(name) for name in HASHES)
    seen = seen if isinstance(seen, pl.Series) else pl.repeat(seen, len(ids), dtype=pl.UInt16, eager=True)
    return pl.DataFrame(
        [
            listed,
            *(pl.Series(name, probabilities[:, column], dtype=pl.Float64) for column, name in enumerate(task.classes)),
            pl.Series("orders", counts, dtype=pl.Int32),
            named.rename("models"),
            seen.cast(pl.UInt16).rename("seen"),
            *hashes.select(*HASHES),
        ]
    )


_LOGITS = pl.List(pl.List(pl.Float64()))


def _score_schema(task: Task) -> pl.Schema:
    classes = ((name, pl.Float64()) for name in task.classes)
    behind = [("orders", pl.Int32()), ("models", TURNS), ("seen", pl.UInt16())]
    return pl.Schema([("id", pl.String()), *classes, *behind, *((name, pl.UInt64()) for name in HASHES)])


def write_scores(path: Path, scores: pl.DataFrame) -> None:
    """Write a table that `scores_frame` made as parquet, atomically."""
    with atomic_file(path) as temporary:
        scores.write_parquet(temporary)


def read_scores(path: Path, task: Task, *, foreign: bool = False) -> pl.DataFrame:
    """Read what `write_scores` wrote, checked again. `seen` and `HASHES` are null where an older pairclf wrote none.

    Args:
        foreign: accept a file of other people's: `id` and a column a class, further ones unread, the rest null. Their
            `prompt` may be the prompt itself.

    Raises:
        DataError: the file can't be read, is no table of scores of this task, or breaks a rule of `scores_frame`.
    """
    frame, wanted = load(path), _score_schema(task)
    missing = [name for name in ("id", *task.classes) if name not in frame.columns]
    if foreign and missing:
        what = f"columns {missing} are missing; the file has {frame.columns}"
        raise DataError(what, where=path, remedy=f"give a table of id and probabilities: {', '.join(task.classes)}")
    frame = _completed(frame, wanted, ["orders", "models"] if foreign else [])
    if foreign:
        frame = _converted(frame, wanted, path)
    if frame.schema != wanted:
        raise DataError(
            f"the file has {_shown(frame.schema)}; scores of task {task.name!r} have {_shown(wanted)}",
            where=path,
            remedy="give a scores.parquet that was written for this task",
        )
    refuse(_score_problems(frame["id"], class_matrix(frame, task), task), path)
    return frame


def _completed(frame: pl.DataFrame, wanted: pl.Schema, others: Sequence[str]) -> pl.DataFrame:
    """With nulls in the columns that may be missing."""
    absent = [name for name in (*others, "seen", *HASHES) if name not in frame.columns]
    return frame.with_columns(pl.lit(None, dtype=wanted[name]).alias(name) for name in absent)


def _converted(frame: pl.DataFrame, wanted: pl.Schema, path: Path) -> pl.DataFrame:
    """The wanted columns that are there, in the wanted types."""
    try:
        plain = {name: frame[name].dtype == pl.Struct and is_plain(frame[name]) for name in frame.columns}
        cells = [as_text(frame[name]) if plain[name] else frame[name] for name in wanted if name in plain]
        cells = [as_ids(cell, path) if cell.name == "id" else cell for cell in cells]
        cells = [_hashes(cell) if cell.name in HASHES else cell for cell in cells]
        return pl.DataFrame([cell.cast(wanted[cell.name]) for cell in cells])
    except PolarsError as error:
        what = f"scores can't be read: {str(error).splitlines()[0]}"
        raise DataError(what, where=path, remedy="write ids as text and probabilities as floats") from error


def _hashes(cells: pl.Series) -> pl.Series:
    """A column of `HASHES`, null where a column of that name holds something else."""
    exact = cells.dtype == pl.String or cells.dtype.is_integer()
    made = cells.cast(pl.UInt64, strict=False) if exact else cells.clear(len(cells)).cast(pl.UInt64)
    return made if made.null_count() == cells.null_count() else made.clear(len(cells))


def _shown(schema: pl.Schema) -> str:
    return ", ".join(f"{name} {kind}" for name, kind in schema.items())


def write_logits(path: Path, ids: pl.Series, logits: Probabilities, hashes: pl.DataFrame) -> None:
    """Write the logits that scores were made of as parquet, atomically: they know no temperature yet.

    The columns: `id`, `HASHES` UInt64, and `logits` List(List(Float64)), an order's classes in its own columns.

    Args:
        path: the file.
        ids: `(N,)`.
        logits: `(N, O, C)`, order AB and, where the task can swap, order BA.
        hashes: `identity.row_hashes` of the rows.
    """
    cells = pl.Series("logits", logits.tolist(), dtype=_LOGITS)
    with atomic_file(path) as temporary:
        pl.DataFrame([ids, *hashes.select(*HASHES), cells]).write_parquet(temporary)


def read_logits(path: Path, task: Task) -> pl.DataFrame:
    """Read what `write_logits` wrote.

    Raises:
        DataError: the file can't be read, is no table of logits of this task, or its ids stand twice.
    """
    frame = load(path)
    wanted = pl.Schema([("id", pl.String()), *((name, pl.UInt64()) for name in HASHES), ("logits", _LOGITS)])
    if frame.schema != wanted:
        what = f"the file has {_shown(frame.schema)}; logits have {_shown(wanted)}"
        raise DataError(what, where=path, remedy="run `pairclf cv` again, which writes it")
    shapes = {(len(orders), len(classes)) for orders in frame["logits"].to_list() for classes in orders}
    expected = {(1 + task.swappable, len(task.classes))}
    if shapes - expected:
        what = f"the logits have shapes {sorted(shapes)} a row; task {task.name!r} has {sorted(expected)}"
        raise DataError(what, where=path, remedy="give logits that were written for this task")
    refuse(_repeated(frame["id"], "the logits"), path)
    return frame


def class_matrix(scores: pl.DataFrame, task: Task) -> Probabilities:
    """The class columns of scores as `(N, C)` float64, in the task's class order."""
    return scores.select(task.classes).to_numpy().astype(np.float64)


def write_submission(path: Path, scores: pl.DataFrame, task: Task, sample: Path | None) -> None:
    """Write a submission, atomically: the sample's ids, order and columns, joined on id and never by position.

    A column named as the task's label column gets the name of the `likeliest` class; of equally likely ones, the
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
    refuse(problems, sample or path)
    if sample is not None:
        scores = wanted.select("id").join(scores, on="id", how="left", maintain_order="left")
    with atomic_file(path) as temporary:
        _filled(scores, task, columns).write_csv(temporary)


def _filled(scores: pl.DataFrame, task: Task, columns: Sequence[str]) -> pl.DataFrame:
    """A submission's columns from scores."""
    if task.label_column in columns:
        best = likeliest(class_matrix(scores, task))
        names = [task.classes[index] for index in best]
        scores = scores.select("id", pl.Series(task.label_column, names, dtype=pl.String))
    return scores.select(columns)


def answer(ids: pl.Series, probabilities: Probabilities, task: Task, sample: pl.DataFrame | None) -> pl.DataFrame:
    """The rows of a submission as a table: what `write_submission` writes, with ids of the type that they came in.

    Args:
        ids: `(N,)` of the rows.
        probabilities: `(N, C)`.
        task: columns and classes.
        sample: these rows of the sample submission, whose ids, order and columns the answer has; None: those of `ids`.

    Raises:
        DataError: the sample has other ids, or columns that the task can't fill; or a row is no distribution.
    """
    numbers = [str(row) for row in range(len(ids))]  # ids are the caller's: they may be missing or stand twice
    scores = scores_frame(numbers, probabilities, task, orders=1, models=[])
    if sample is None:
        return _filled(scores, task, ["id", *_label_columns(task)]).with_columns(ids.alias("id"))
    if not can_fill(sample.columns, task):
        raise _unfillable(sample.columns, task, None)
    given, wanted = as_text(ids).rename("id"), as_text(sample["id"])
    if given.to_list() != wanted.to_list():
        refuse([*_repeated(given, "the rows"), *_different_ids(given, wanted, "the rows")], "batch")
        places = wanted.to_frame("id").join(given.to_frame().with_row_index("at"), on="id", maintain_order="left")
        scores = scores[places["at"]]
    return _filled(scores, task, sample.columns).with_columns(sample["id"])


def can_fill(columns: Sequence[str], task: Task) -> bool:
    """Whether these are a submission's columns, in any order."""
    return set(columns) in ({"id", *task.classes}, {"id", *_label_columns(task)})


def check_submission(path: Path, sample: Path, task: Task) -> dict[str, Any]:
    """Judge a submission as Kaggle would: the sample's columns, ids and order, and numbers that can be scored.

    Returns:
        `rows`, `columns`, `verdicts` (rows in which each class is the likeliest) and `means` (mean probability of
        each class; for a column of names, its share of the rows).

    Raises:
        DataError: with everything that is wrong.
    """
    wanted, given = _load_sample(sample, task), load(path)
    if given.columns != wanted.columns:
        raise DataError(
            f"the submission has columns {given.columns}, the sample {wanted.columns}",
            where=path,
            remedy="write it with write_submission and this sample",
        )
    ids = as_ids(given["id"], path)
    problems = [*_repeated(ids, "the submission"), *_different_ids(ids, wanted["id"], "the submission")]
    if not problems and ids.to_list() != wanted["id"].to_list():
        problems.append(DataError("the ids are the sample's, in another order", remedy="keep the sample's order"))
    if task.label_column in given.columns:
        names = as_text(given[str(task.label_column)])
        values = np.stack([(names == name).fill_null(value=False).to_numpy() for name in task.classes], axis=1)
        wrong = _no_classes(ids, names, task)
    else:
        values = _numbers(given, task.classes)
        wrong = _impossible(ids, values, task)
    refuse([*problems, *wrong], path)
    verdicts = np.bincount(likeliest(values), minlength=len(task.classes))
    return {
        "rows": len(ids),
        "columns": given.columns,
        "verdicts": dict(zip(task.classes, verdicts.tolist(), strict=True)),
        "means": dict(zip(task.classes, values.mean(axis=0).tolist(), strict=True)),
    }


def _no_classes(ids: pl.Series, names: pl.Series, task: Task) -> list[DataError]:
    unknown = ~names.is_in(list(task.classes)).fill_null(value=False)
    if not unknown.any():
        return []
    shown = names.filter(unknown).unique(maintain_order=True).head(5).to_list()
    what = f"column {task.label_column!r} names {shown}, which are not among the classes {list(task.classes)}"
    return [DataError(what, rows=ids.filter(unknown).to_list(), remedy="write it with write_submission")]


def _load_sample(sample: Path, task: Task) -> pl.DataFrame:
    wanted = load(sample)
    if not can_fill(wanted.columns, task):
        raise _unfillable(wanted.columns, task, sample)
    wanted = wanted.with_columns(as_ids(wanted["id"], sample).fill_null("").alias("id"))
    refuse(_repeated(wanted["id"], "the sample"), sample)
    return wanted


def _unfillable(columns: Sequence[str], task: Task, sample: Path | None) -> DataError:
    allowed = [{"id", *task.classes}, {"id", *_label_columns(task)}]
    return DataError(
        f"the sample submission has columns {list(columns)}; task {task.name!r} can fill "
        + " or ".join(str(sorted(one)) for one in allowed[: 1 + (allowed[0] != allowed[1])]),
        where=sample,
        remedy="give the competition's sample_submission.csv, or the task that it belongs to",
    )


def sample_ids(sample: Path, task: Task) -> list[str]:
    """The ids of a sample submission, in its order.

    Raises:
        DataError: it has other columns than the task can fill, or ids that are empty or stand twice.
    """
    return _load_sample(sample, task)["id"].to_list()


def check_ids(ids: Sequence[str], task: Task, sample: Path | None) -> None:
    """Refuse data whose ids can't become a submission, before hours are spent on it.

    Raises:
        DataError: ids stand twice, or they are not the sample's; names those that either lacks.
    """
    given = pl.Series("id", list(ids), dtype=pl.String)
    problems = _repeated(given, "the rows")
    if sample is not None:
        problems += _different_ids(given, _load_sample(sample, task)["id"], "the rows")
    refuse(problems, sample)


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
    missing = wanted.filter(~wanted.is_in(given.to_list())).to_list()
    unknown = given.filter(~given.is_in(wanted.to_list())).to_list()
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
