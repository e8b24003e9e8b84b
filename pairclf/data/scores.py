"""Tables of scores and logits, joined on `id`: make, write, read and check them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
from polars.exceptions import PolarsError

from pairclf.console import counted
from pairclf.data.formats import TURNS, as_ids, as_text, is_plain, load, refuse
from pairclf.errors import DataError
from pairclf.files import atomic_file
from pairclf.scores.metrics import Floats
from pairclf.task import Task

HASHES = {"prompt": "prompt", "row_hash": "text"}
"""Columns of scores that identify the scored row, and what each one hashes; null: unknown."""

SUM_TOLERANCE = 1e-4  # probabilities may come from float32 or float16


def scores_frame(
    ids: Sequence[str],
    probabilities: Floats,
    task: Task,
    orders: int | Sequence[int],
    models: Sequence[str] | pl.Series,
    *,
    seen: int | pl.Series | None = None,
    hashes: pl.DataFrame | None = None,
) -> pl.DataFrame:
    """Scores as a table, with the orders and models of each row.

    The columns: `id`, one Float64 a class, `orders` Int32, `models` List(String), `seen` UInt16, `HASHES` UInt64.

    Args:
        ids: `N` ids.
        probabilities: `(N, C)`, columns in the task's class order, rows summing to one (1e-4).
        orders: number of averaged orders (1 or 2), for all rows or for each.
        models: names of the models, for all rows, or for each as a List(String) series.
        seen: how many of these models were trained on (nearly) this prompt; 0: the row is out of sample; null or None:
            unknown.
        hashes: `identity.row_hashes` of the rows, which detect scores of other rows with the same ids; None: unknown.

    Raises:
        DataError: shapes differ, an id stands twice, or a row is no distribution.
    """
    shape = (len(ids), len(task.classes))
    if probabilities.shape != shape:
        raise DataError(f"probabilities have shape {probabilities.shape}, ids and classes ask for {shape}")
    listed = pl.Series("id", list(ids), dtype=pl.String)
    refuse(score_problems(listed, probabilities, task), "scores")
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


def with_labels(
    scores: pl.DataFrame, task: Task, *, fold: int, targets: Floats, logits: Floats | None = None
) -> pl.DataFrame:
    """Out-of-fold scores with what a notebook would have to join: more columns, which `read_scores` leaves out.

    The columns: `fold` Int32, `target_CLASS` Float64 each, and `logit_ab_CLASS` and, where the model sees an order,
    `logit_ba_CLASS` Float64 each: an order's logits in its own columns, before any temperature.

    Args:
        scores: of `scores_frame`.
        task: names the classes.
        fold: the fold that held the rows out.
        targets: `(N, C)`.
        logits: `(N, O, C)`; None: an older pairclf kept none.
    """
    parts = {"target": targets}
    if logits is not None:
        parts |= {f"logit_{order}": logits[:, place] for place, order in enumerate(ORDERS[: logits.shape[1]])}
    return scores.with_columns(
        pl.lit(fold, dtype=pl.Int32).alias("fold"),
        *(
            pl.Series(f"{part}_{name}", values[:, column], dtype=pl.Float64)
            for part, values in parts.items()
            for column, name in enumerate(task.classes)
        ),
    )


ORDERS = ("ab", "ba")
"""The orders in the names of columns."""


def _without_labels(frame: pl.DataFrame, task: Task) -> pl.DataFrame:
    parts = ("target", *(f"logit_{order}" for order in ORDERS))
    return frame.drop("fold", *(f"{part}_{name}" for part in parts for name in task.classes), strict=False)


def read_scores(path: Path, task: Task, *, foreign: bool = False) -> pl.DataFrame:
    """Read what `write_scores` wrote, checked again. `seen` and `HASHES` are null where an older pairclf wrote none.

    The columns of `with_labels` are left out.

    Args:
        foreign: accept other people's files with `id` and a column per class; missing columns become null, and their
            `prompt` may be the prompt itself.

    Raises:
        DataError: the file can't be read, is no table of scores of this task, or breaks a rule of `scores_frame`.
    """
    frame, schema = _without_labels(load(path), task), _score_schema(task)
    missing = [name for name in ("id", *task.classes) if name not in frame.columns]
    if foreign and missing:
        what = f"columns {missing} are missing; the file has {frame.columns}"
        raise DataError(what, where=path, remedy=f"give a table of id and probabilities: {', '.join(task.classes)}")
    frame = _completed(frame, schema, ["orders", "models"] if foreign else [])
    if foreign:
        frame = _converted(frame, schema, path)
    if frame.schema != schema:
        raise DataError(
            f"the file has {_shown(frame.schema)}; scores of task {task.name!r} have {_shown(schema)}",
            where=path,
            remedy="give a scores.parquet that was written for this task",
        )
    refuse(score_problems(frame["id"], class_matrix(frame, task), task), path)
    return frame


def _completed(frame: pl.DataFrame, schema: pl.Schema, others: Sequence[str]) -> pl.DataFrame:
    """Add optional columns that are missing, as nulls."""
    absent = [name for name in (*others, "seen", *HASHES) if name not in frame.columns]
    return frame.with_columns(pl.lit(None, dtype=schema[name]).alias(name) for name in absent)


def _converted(frame: pl.DataFrame, schema: pl.Schema, path: Path) -> pl.DataFrame:
    """The columns of the schema, cast to its types."""
    try:
        plain = {name: frame[name].dtype == pl.Struct and is_plain(frame[name]) for name in frame.columns}
        cells = [as_text(frame[name]) if plain[name] else frame[name] for name in schema if name in plain]
        cells = [as_ids(cell, path) if cell.name == "id" else cell for cell in cells]
        cells = [_hashes(cell) if cell.name in HASHES else cell for cell in cells]
        return pl.DataFrame([cell.cast(schema[cell.name]) for cell in cells])
    except PolarsError as error:
        what = f"scores can't be read: {str(error).splitlines()[0]}"
        raise DataError(what, where=path, remedy="write ids as text and probabilities as floats") from error


def _hashes(cells: pl.Series) -> pl.Series:
    """A column of hashes; null if the column holds something else."""
    exact = cells.dtype == pl.String or cells.dtype.is_integer()
    hashes = cells.cast(pl.UInt64, strict=False) if exact else cells.clear(len(cells)).cast(pl.UInt64)
    return hashes if hashes.null_count() == cells.null_count() else hashes.clear(len(cells))


def _shown(schema: pl.Schema) -> str:
    return ", ".join(f"{name} {kind}" for name, kind in schema.items())


def write_logits(path: Path, ids: pl.Series, logits: Floats, hashes: pl.DataFrame) -> None:
    """Write logits, before any temperature, as parquet, atomically.

    The columns: `id`, `HASHES` UInt64, and `logits` List(List(Float64)), an order's classes in its own columns.

    Args:
        path: the file.
        ids: `(N,)`.
        logits: `(N, O, C)`, order AB and, where the model sees an order, order BA.
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
    schema = pl.Schema([("id", pl.String()), *((name, pl.UInt64()) for name in HASHES), ("logits", _LOGITS)])
    if frame.schema != schema:
        what = f"the file has {_shown(frame.schema)}; logits have {_shown(schema)}"
        raise DataError(what, where=path, remedy="run `pairclf cv` again, which writes it")
    shapes = {(len(orders), len(classes)) for orders in frame["logits"].to_list() for classes in orders}
    expected = {(orders, len(task.classes)) for orders in (1, 1 + task.swappable)}  # a reward model sees no order
    if shapes - expected or len(shapes) > 1:
        what = f"the logits have shapes {sorted(shapes)} a row; task {task.name!r} has {sorted(expected)}"
        raise DataError(what, where=path, remedy="give logits that were written for this task")
    refuse(repeated_ids(frame["id"], "the logits"), path)
    return frame


def class_matrix(scores: pl.DataFrame, task: Task) -> Floats:
    """The class columns of scores as `(N, C)` float64, in the task's class order."""
    return scores.select(task.classes).to_numpy().astype(np.float64)


def repeated_ids(ids: pl.Series, holder: str) -> list[DataError]:
    """A problem if ids are missing or repeated."""
    rows = ids.filter(ids.is_duplicated() | ids.is_null() | (ids == "")).unique(maintain_order=True).to_list()
    if not rows:
        return []
    return [DataError(f"{holder} have ids that are empty or stand twice", rows=rows, remedy="one row an id")]


def score_problems(ids: pl.Series, values: Floats, task: Task) -> list[DataError]:
    """As `repeated_ids` and `impossible_values`."""
    return [*repeated_ids(ids, "the scores"), *impossible_values(ids, values, task)]


def impossible_values(ids: pl.Series, values: Floats, task: Task) -> list[DataError]:
    """Problems of an `(N, C)` array whose rows must be distributions."""
    finite = np.isfinite(values).all(axis=1)
    outside = finite & ((values < 0) | (values > 1)).any(axis=1)
    off = finite & (np.abs(values.sum(axis=1) - 1) > SUM_TOLERANCE) & (not task.multi_label)
    rules = {"are no finite numbers": ~finite, "are outside [0, 1]": outside, "do not sum to one": off}
    return [
        DataError(
            f"probabilities of {counted(int(broken.sum()), 'row')} {rule}",
            rows=ids.filter(pl.Series(broken)).to_list(),
            remedy="find the model that gave these rows their scores; pairclf does not repair them",
        )
        for rule, broken in rules.items()
        if broken.any()
    ]
