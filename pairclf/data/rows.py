"""The canonical table of rows: read it from files, write it, and turn it into `Row` objects and targets.

The canonical table has one row a comparison, in file order:

    id              String         exactly as in the file; `row 7` where the seventh row of a file has none
    <each field>    List(String)   its turns; a null turn is kept apart from ""
    target          List(Float64)  probabilities in the task's class order; null where unlabelled, or no label
    group           String         the value of the column `folds.group`; null where there is none
    weight          Float64        the source's, times the file's where it has a column of weights
    train_only      Boolean        the source's: trained on in every fold and never held out
    file            String         the file's name, as it was given
    flaws           UInt32         bits of `formats.Flaw`: what was wrong with the row and can be seen no more

Reading refuses files, not rows: what is done about rows that have flaws is for `audit` to say.
"""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from pairclf.config import Source
from pairclf.console import console, counted
from pairclf.data.formats import (
    CHUNK,
    TURNS,
    Bits,
    Flaw,
    as_ids,
    as_text,
    expand,
    is_plain,
    mark,
    read_file,
    read_turns,
    refuse,
    with_plain_texts,
)
from pairclf.data.preferences import FORMATS, convert, recognise, why_not
from pairclf.errors import DataError, cut, quoted
from pairclf.files import atomic_file
from pairclf.scores.metrics import Floats
from pairclf.task import Row, Task

LABEL_TOLERANCE = 1e-6  # labels are written by people: one, or thirds with all their digits
TRUTH = {
    spell(word): value
    for word, value in (("true", "1"), ("false", "0"), ("yes", "1"), ("no", "0"))
    for spell in (str.lower, str.title, str.upper)
}
"""The spellings of booleans in JSON, parquet, Python, R and forms, and their values as labels."""


def read_rows(
    sources: Sequence[Path | Source],
    task: Task,
    *,
    labelled: bool,
    max_rows: int | None = None,
    group: str | None = None,
) -> pl.DataFrame:
    """Read files (.csv, .parquet or .jsonl), one after the other, into the canonical table.

    Args:
        sources: files or globs, and sources with other columns, read in this order.
        task: names the fields, the classes and where the label stands.
        labelled: training rows, whose unknown columns are refused. Otherwise test rows: labels and weights are not
            read, unknown columns make a note, and broken UTF-8 is mended.
        max_rows: read no more than the first so many rows of all files together.
        group: `folds.group`, a column that training files need and test files may have; a source's `columns` may map
            `group` to another one, or to null.

    Raises:
        DataError: a file can't be read, its columns are not those that are needed, a weight is not above 0, or a
            source contradicts the task.
    """
    return pl.concat(_tables(sources, task, labelled, max_rows, None, group))


def scan_rows(
    sources: Sequence[Path | Source],
    task: Task,
    *,
    labelled: bool,
    max_rows: int | None = None,
    group: str | None = None,
    size: int = CHUNK,
) -> Iterator[pl.DataFrame]:
    """The rows of `read_rows` in canonical chunks of up to `size` rows, for files that don't fit into memory.

    Raises:
        DataError: as `read_rows`, when the chunk is asked for that shows it.
    """
    return _tables(sources, task, labelled, max_rows, size, group)


def _tables(
    sources: Sequence[Path | Source],
    task: Task,
    labelled: bool,
    max_rows: int | None,
    size: int | None,
    group: str | None,
) -> Iterator[pl.DataFrame]:
    if not sources:
        raise DataError("no file of rows is named", remedy="give at least one .csv, .parquet or .jsonl file")
    left = max_rows
    for entry in sources:
        source = entry if isinstance(entry, Source) else Source(files=[entry])
        layout = _layout(source, task, labelled, group)
        before = 0  # rows of the source in files before this one
        for path in expand(source.files):
            number = 0
            for rows in _file_tables(path, layout, task, labelled, left, size, before):
                yield rows
                number += len(rows)
            before += number
            left = None if left is None else left - number
            if left == 0:
                return


def _file_tables(
    path: Path, layout: _Layout, task: Task, labelled: bool, left: int | None, size: int | None, before: int
) -> Iterator[pl.DataFrame]:
    number, columns, told = 0, None, False
    for raw, flaws in _chunks(path, layout.source, task, labelled, left, size, before):
        if raw.columns != columns:
            columns = raw.columns
            file_layout = _found(layout, raw, task, labelled)
            _check_columns(columns, path, task, file_layout, labelled)
        rows = _canonical(raw, path, task, file_layout, number, before, flaws)
        told = told or _note_bad_labels(raw.filter(rows["target"].is_null()), file_layout, task, path)
        yield rows
        number += len(raw)


def _chunks(
    path: Path, source: Source, task: Task, labelled: bool, left: int | None, size: int | None, before: int
) -> Iterator[tuple[pl.DataFrame, Bits | None]]:
    """Raw chunks of a file; those of a preference set converted to the task's columns, with the flaws of their rows."""
    number, parts, unequal, unknown = before, Counter[str](), 0, set[str]()
    chunk = size or (CHUNK if source.format else None)  # a whole set may be too large, and few of its columns are kept
    for raw in read_file(path, rows=left, lossy=not labelled, size=chunk, escape=source.escape is not None):
        if source.format is None:
            yield raw, None
            continue
        converted = convert(raw, source, task, path, number)
        yield converted.frame, converted.flaws
        number += len(raw)
        parts += converted.parts
        unequal += converted.unequal
        unknown |= converted.unknown
    for kind, count in sorted(parts.items()):
        console.print(f"note: {path.name}: {counted(count, 'part')} of type {kind!r} in messages: read as [{kind}]")
    if unequal:
        console.print(
            f"note: {path.name}: the sides of {counted(unequal, 'row')} follow different questions; such rows are "
            "undecodable, and their prompt is that of the first side"
        )
    if unknown and source.format:
        known = ", ".join(FORMATS[source.format].labels or {})
        console.print(f"note: {path.name}: {cut(str(sorted(unknown)))} name no winner; the labels are {known}")


def in_memory(frame: Any, read: Collection[str] | None = None) -> pl.DataFrame:
    """A polars frame, or a pandas frame converted without its index, with categories as texts.

    Args:
        frame: either of them.
        read: the columns that will be read; others may be left out. None: all.

    Raises:
        DataError: it is neither, or a column that is read mixes types.
    """
    if isinstance(frame, pl.DataFrame):
        return with_plain_texts(frame)
    remedy = "hand over a polars or pandas DataFrame, one type a column"
    if not (hasattr(frame, "columns") and hasattr(frame, "items")):
        raise DataError(f"rows can't be taken from a {type(frame).__name__}", remedy=remedy)
    try:
        return with_plain_texts(pl.from_pandas(frame))
    except (TypeError, ValueError) as error:
        mixed = [name for name, cells in frame.items() if not _is_convertible(cells)]
        if mixed and read is not None and not {*mixed} & {*read}:
            return in_memory(frame.drop(columns=mixed))
        columns = f", for its columns {mixed}" if mixed else ""
        what = f"rows can't be taken from a {type(frame).__name__}{columns}: {str(error).splitlines()[0]}"
        raise DataError(what, remedy=remedy) from error


def _is_convertible(cells: Any) -> bool:
    """Whether a column of a pandas frame has one type."""
    try:
        pl.from_pandas(cells)
    except (TypeError, ValueError):
        return False
    return True


def rows_in_memory(raw: pl.DataFrame, task: Task, columns: Mapping[str, str | None] | None = None) -> pl.DataFrame:
    """The canonical table of test rows without a file.

    Args:
        raw: the rows.
        task: names the fields.
        columns: `data.test.columns`; without an `id`, or with null for it, the rows are numbered from 1.

    Raises:
        DataError: a column is missing.
    """
    where = Path("batch")
    layout = _layout(Source(files=[where], columns={"id": None, **(columns or {})}, ignore_columns="all"), task, False)
    _check_columns(raw.columns, where, task, layout, labelled=False)
    return _canonical(raw, where, task, layout, 0, 0)


def to_rows(frame: pl.DataFrame, task: Task) -> list[Row]:
    """The canonical table as `Row`s, in its order."""
    rows = []
    for row_id, target, weight, *fields in frame.select("id", "target", "weight", *task.fields).iter_rows():
        turns = {name: tuple(cell) for name, cell in zip(task.fields, fields, strict=True)}
        rows.append(Row(row_id, turns, None if target is None else tuple(target), weight))
    return rows


def write_rows(path: Path, frame: pl.DataFrame, task: Task, group: str | None = None) -> None:
    """Write a canonical table in the task's own columns, atomically: .csv (lists of turns as JSON), .parquet or .jsonl.

    Labels that are shared by several classes are written as a column a class under every task; weights where one of
    them is not 1; the groups as the column `group`, unless it is a field's.

    Raises:
        DataError: the file type is another, or can't hold these rows; nothing is written.
    """
    kind = path.suffix.lower()
    if kind not in (".csv", ".parquet", ".jsonl"):
        remedy = "name a .csv, .parquet or .jsonl file"
        raise DataError(f"file type {path.suffix!r} can't be written", where=path, remedy=remedy)
    weights = ["weight"] if (frame["weight"] != 1).any() else []
    groups = [pl.col("group").alias(group)] if group is not None and group not in ("id", *task.fields) else []
    table = frame.select("id", *task.fields, *_label_cells(frame, task), *groups, *weights)
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
    """The columns of a source.

    Attributes:
        source: as the user wrote it.
        columns: our column (`id`, fields) -> the file's; None: rows are numbered.
        labels: the file's columns of labels, none for test rows: one with a name of a class, or one a class.
        named: the label is a name.
        weight: the file's column of weights; None: it has none.
        group: the file's column of groups; None: it has none.
    """

    source: Source
    columns: Mapping[str, str | None]
    labels: tuple[str, ...]
    named: bool
    weight: str | None
    group: str | None

    @property
    def wanted(self) -> list[str]:
        named = (*self.columns.values(), *self.labels, self.weight, self.group)
        return [name for name in named if name is not None]


def _layout(source: Source, task: Task, labelled: bool, group: str | None = None) -> _Layout:
    """Raises:
    DataError: the source names columns or classes that the task has not.
    """
    ours = ("id", *task.fields, *_label_columns(task), "weight", *(["group"] if group else []))
    file_names = ", ".join(map(str, source.files))
    problems = []
    for name, column in source.columns.items():
        if name not in ours:
            near = difflib.get_close_matches(name, ours, n=1, cutoff=0.0)[0]
            what = f"columns maps {name!r}, which task {task.name!r} has not; the nearest is {near!r}"
            problems.append(DataError(what, remedy=f"our columns stand on the left: {', '.join(ours)}"))
        elif column is None and name not in ("id", "group"):
            remedy = "name the files' column; only id (which numbers the rows) and group may be null"
            problems.append(DataError(f"columns maps {name!r} to null", remedy=remedy))
    if unknown := sorted(set(source.labels.values()) - set(task.classes)):
        remedy = "the classes stand on the right: {label as the files have it: class}"
        problems.append(DataError(f"labels maps to {unknown}; the classes are {list(task.classes)}", remedy=remedy))
    columns = {name: source.columns.get(name, name) for name in ("id", *task.fields)}
    if source.format and (reason := why_not(task)):
        remedy = "a format gives a prompt and two sides; convert the file and map its columns for another task"
        problems.append(DataError(f"format {source.format!r} can't be read: {reason}", remedy=remedy))
    if source.labels and not (source.label_column or task.label_column):
        problems.append(DataError("labels needs label_column", remedy="name the files' column that names the class"))
    refuse(problems, f"the source of {file_names}")
    label_column = source.label_column or source.columns.get(task.label_column or "", task.label_column)
    labels = (label_column,) if label_column else tuple(source.columns.get(name) or name for name in task.classes)
    weight, grouped = source.columns.get("weight"), source.columns.get("group", group)
    if source.format:  # `convert` gives these names to its columns
        source = source.model_copy(update={"columns": {**source.columns, "group": grouped}})
        columns = {name: name for name in columns}
        labels, weight, grouped = tuple(task.classes), weight and "weight", grouped and "group"
    return _Layout(
        source=source,
        columns=columns,
        labels=labels if labelled else (),
        named=label_column is not None and source.format is None,
        weight=weight if labelled else None,
        group=grouped,
    )


def _found(layout: _Layout, raw: pl.DataFrame, task: Task, labelled: bool) -> _Layout:
    """The layout of one file: probabilities if it has no label column, and weights if it has that column.

    A test file needs no column of groups.
    """
    if not labelled and layout.group not in raw.columns:
        layout = replace(layout, group=None)
    ignored, labels = layout.source.ignore_columns, layout.labels
    if labels and layout.named and layout.source.label_column is None and labels[0] not in raw.columns:
        plain = [name for name in task.classes if name in raw.columns and is_plain(raw[name])]
        # A column that is named as a class may hold other things: in the WSDM files, the names of models.
        if len(plain) == len(task.classes) and np.isfinite(as_numbers(raw, plain, TRUTH)).any(axis=0).all():
            layout = replace(layout, labels=task.classes, named=False)
    if labels and layout.weight is None and "weight" in set(raw.columns) - set(layout.wanted):
        layout = replace(layout, weight="weight" if ignored != "all" and "weight" not in ignored else None)
    return layout


def _label_columns(task: Task) -> tuple[str, ...]:
    return (task.label_column,) if task.label_column else task.classes


def _check_columns(columns: list[str], path: Path, task: Task, layout: _Layout, labelled: bool) -> None:
    ignored = layout.source.ignore_columns
    expected = {*layout.wanted, *_label_columns(task), *task.extra_columns, *(ignored if ignored != "all" else columns)}
    if layout.columns["id"] is None:
        expected.add("id")
    missing = [name for name in layout.wanted if name not in columns]
    unknown = [name for name in columns if name not in expected]
    meant = _meant(missing, unknown)
    problems = []
    shape = _known_shape(columns, task) if missing else None
    if shape:
        problems.append(shape)
    elif missing:
        remedy = "; ".join(_ways(missing, meant, task, layout))
        problems.append(DataError(f"columns {missing} are missing; the file has {columns}", remedy=remedy))
    odd = [name for name in unknown if name not in meant.values()]
    if odd and labelled and not shape:
        hint = " ('' is a column without a name: an index that was written along)" if "" in odd else ""
        problems.append(
            DataError(
                f"columns {odd} are not known to task {task.name!r}{hint}",
                remedy=f"remove them, or accept them unread with data.ignore_columns={json.dumps(odd)}",
            )
        )
    refuse(problems, path)
    if unknown:
        console.print(f"note: {path.name}: columns {unknown} are not read")


def _meant(missing: Sequence[str], unknown: Sequence[str]) -> dict[str, str]:
    """`{missing column: column of the file}` where the two differ by case, blanks, `_` or a slip.

    >>> _meant(["answer_1", "id", "text"], [" Answer 1", "ID", "date"])
    {'answer_1': ' Answer 1', 'id': 'ID'}
    """
    plain = {re.sub(r"[\W_]", "", name).lower(): name for name in unknown}
    near = {name: difflib.get_close_matches(re.sub(r"[\W_]", "", name).lower(), plain, 1, 0.8) for name in missing}
    return {name: plain[match[0]] for name, match in near.items() if match}


def _ways(missing: Sequence[str], meant: Mapping[str, str], task: Task, layout: _Layout) -> Iterator[str]:
    """What can be done about missing columns."""
    ours = {column: name for name, column in layout.columns.items()}
    if meant:
        pairs = ", ".join(f"{ours.get(name, name)}: {json.dumps(column)}" for name, column in meant.items())
        yield f"correct the names, or map them with columns: {{{pairs}}} of the source or of data.test (docs/data.md)"
    if meant.keys() == {*missing}:
        return
    more = "" if meant else " or map them (columns of a source or of data.test, docs/data.md)"
    yield f"task {task.name!r} needs the columns {layout.wanted}; give another task{more}"
    if layout.columns["id"] in missing and layout.columns["id"] not in meant:
        yield "a file without ids says columns: {id: null}"
    if {*missing} & {*layout.labels}:
        yield "test files have no labels (`check --unlabelled`)"
    if layout.group in missing:
        yield "a source without folds.group says columns: {group: null}"


def _known_shape(columns: Sequence[str], task: Task) -> DataError | None:
    """The problem of a file with the columns of a public set, or with other separators than commas."""
    if why_not(task) is None and (name := recognise(columns)):
        return DataError(
            f"the file has columns of a preference set, {name} ({FORMATS[name].page}), and not of the task",
            remedy=f"say format: {name} in its entry of data.train, which `pairclf check FILE` prints; or write a file "
            "with the task's columns (pairclf convert FILE --to NEW.parquet)",
        )
    if len(columns) == 1 and (separator := next((sign for sign in ";\t|" if sign in columns[0]), None)):
        return DataError(
            f"the file has one column, {quoted(columns[0])}, as if {separator!r} stood between the cells",
            remedy="write the file with commas between the cells",
        )
    return None


def _canonical(
    raw: pl.DataFrame, path: Path, task: Task, layout: _Layout, number: int, before: int, known: Bits | None = None
) -> pl.DataFrame:
    """A chunk's canonical table.

    Args:
        number: rows of the file before this chunk.
        before: rows of the source before this file.
        known: flaws that were found before, `(N,)`.
    """
    picked = pl.DataFrame([raw[column].alias(name) for name, column in layout.columns.items() if column is not None])
    turns, flaws = read_turns(picked, task.fields, task.multi_turn, path)
    if known is not None:
        flaws |= known
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
    groups = _groups(raw, path, layout)
    return pl.DataFrame([ids, *turns, targets.alias("target"), groups, _weights(raw, path, layout, ids)]).with_columns(
        train_only=pl.lit(layout.source.train_only), file=pl.lit(str(path)), flaws=pl.Series(flaws, dtype=pl.UInt32)
    )


def _groups(raw: pl.DataFrame, path: Path, layout: _Layout) -> pl.Series:
    """The rows' values of the column `folds.group`, without white space around them; null where a cell is empty.

    `1.0` is `1`: pandas writes whole numbers so where another row of the column has none.
    """
    if layout.group is None:
        return pl.repeat(None, len(raw), dtype=pl.String, eager=True).alias("group")
    texts = as_text(raw[layout.group], path).cast(pl.String).str.strip_chars().alias("group")
    return texts.replace("", None).str.replace(r"^(-?\d+)\.0+$", "$1")


def _weights(raw: pl.DataFrame, path: Path, layout: _Layout, ids: pl.Series) -> pl.Series:
    """Weights of the rows: the source's, times the file's own.

    Raises:
        DataError: one is missing, no finite number, or not above 0.
    """
    weights = np.full(len(raw), layout.source.weight)
    if layout.weight is not None:
        weights = weights * as_numbers(raw, [layout.weight])[:, 0]
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
    """One-hot targets from a column that names the class; null where it names none.

    A list of names, one a rater, is their mean; null where one of them is no class.
    """
    labels = raw.to_series()
    if labels.dtype == TURNS:
        held = pl.DataFrame({"row": np.arange(len(raw)), "name": labels})
        some = pl.when(pl.col("name").list.len() > 0).then(pl.col("name"))  # polars 2 drops rows of empty lists
        raters = held.with_columns(some).explode("name")
        votes = _named_targets(raters.select("name"), source, task, path)
        means = (pl.col("vote").list.get(place).mean() for place in range(len(task.classes)))
        voted = raters.select("row", vote=votes).group_by("row", maintain_order=True)
        sound = pl.col("vote").is_not_null().all()
        return voted.agg(pl.when(sound).then(pl.concat_list(*means)))["vote"]
    labels = as_text(labels, path)
    names = labels.replace(_spellings([*source.labels, *task.classes])).replace(source.labels)
    one_hot = pl.concat_list((pl.lit(names) == name).cast(pl.Float64) for name in task.classes)
    return pl.select(pl.when(pl.lit(names).is_in(list(task.classes))).then(one_hot)).to_series()


def _note_bad_labels(flawed: pl.DataFrame, layout: _Layout, task: Task, path: Path) -> bool:
    """Say what the labels of flawed rows are, and what would be one: the audit tells the ids alone."""
    if flawed.is_empty() or not layout.labels:
        return False
    cells = flawed.select(layout.labels).unique(maintain_order=True).head(5)
    shown = ", ".join(quoted(row[0] if len(row) == 1 else row) for row in cells.rows())
    rule = "probabilities: each is from 0 to 1" + ("" if task.multi_label else ", and a row's add up to 1")
    if layout.named:
        classes = cut(", ".join(map(repr, task.classes)))
        rule = f"classes, which are {classes}: correct the cells, or map them in `labels` of the source (docs/data.md)"
    console.print(f"note: {path.name}: column {cut(', '.join(cells.columns))}: {shown} are no {rule}")
    return True


def _spellings(names: Sequence[str]) -> dict[str, str]:
    """Map the spellings of true and false, yes and no, to the name that equals them up to case, or to 1 and 0.

    And a whole number with `.0`, as pandas writes a column that lacks a label, to the name without.

    >>> _spellings(["True", "False"])["false"], _spellings(["0", "1"])["True"], _spellings(["0", "1"])["1.0"]
    ('False', '1', '1')
    """
    spellings = {f"{name}.0": name for name in names if re.fullmatch(r"-?\d+", name) and f"{name}.0" not in names}
    for word in TRUTH:
        alike = {name for name in names if name.lower() == word.lower()} or {TRUTH[word]} & {*names}
        if len(alike) == 1:
            spellings[word] = alike.pop()
    return spellings


def _numeric_targets(raw: pl.DataFrame, source: Source, task: Task, path: Path) -> pl.Series:
    """Targets from one column of probabilities or booleans per class; null if they are invalid."""
    values = as_numbers(raw, raw.columns, TRUTH, path)
    sound = np.isfinite(values).all(axis=1) & (values >= 0).all(axis=1)
    sound &= (values <= 1).all(axis=1) if task.multi_label else np.abs(values.sum(axis=1) - 1) <= LABEL_TOLERANCE
    targets = pl.Series(values, dtype=pl.Array(pl.Float64, values.shape[1])).cast(pl.List(pl.Float64))
    return targets.zip_with(pl.Series(sound), pl.Series([None], dtype=targets.dtype))


def as_numbers(
    frame: pl.DataFrame, columns: Sequence[str], words: Mapping[str, str] | None = None, path: Path | None = None
) -> Floats:
    """Columns as float64 `(N, C)`; NaN if a cell is not a number. `words` maps texts to numbers."""
    cells = (as_text(frame[name], path).str.strip_chars() for name in columns)
    numbers = [(cell.replace(words) if words else cell).cast(pl.Float64, strict=False) for cell in cells]
    return np.stack([column.fill_null(np.nan).to_numpy() for column in numbers], axis=1).astype(np.float64)


# --- targets ------------------------------------------------------------------------------------------


def targets_of(frame: pl.DataFrame) -> Floats:
    """The rows' targets, `(N, C)`."""
    return np.array(frame["target"].to_list())
