"""Submissions: write them in the sample's columns and order, and check them against the sample."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from pairclf.data.formats import as_ids, as_text, load, refuse
from pairclf.data.rows import _label_columns, _numbers
from pairclf.data.scores import _impossible, _repeated, _score_problems, class_matrix, scores_frame
from pairclf.errors import DataError
from pairclf.files import atomic_file
from pairclf.scores.metrics import Floats, likeliest
from pairclf.task import Task


def write_submission(path: Path, scores: pl.DataFrame, task: Task, sample: Path | None) -> None:
    """Write a submission, atomically: the sample's ids, order and columns, joined on id and never by position.

    The task's label column gets the name of the `likeliest` class; in a tie, the first one in class order. Without a
    sample, rows keep the order of the scores.

    Raises:
        DataError: ids are missing, unknown or repeated, or a row is not a distribution; nothing is written.
    """
    problems = _score_problems(scores["id"], class_matrix(scores, task), task)
    columns = ["id", *_label_columns(task)]
    if sample is not None:
        sample_rows = _load_sample(sample, task)
        columns = sample_rows.columns
        problems += _different_ids(scores["id"], sample_rows["id"], "the scores")
    refuse(problems, sample or path)
    if sample is not None:
        scores = sample_rows.select("id").join(scores, on="id", how="left", maintain_order="left")
    with atomic_file(path) as temporary:
        _filled(scores, task, columns).write_csv(temporary)


def _filled(scores: pl.DataFrame, task: Task, columns: Sequence[str]) -> pl.DataFrame:
    """A submission's columns from scores."""
    if task.label_column in columns:
        best = likeliest(class_matrix(scores, task))
        names = [task.classes[index] for index in best]
        scores = scores.select("id", pl.Series(task.label_column, names, dtype=pl.String))
    return scores.select(columns)


def answer(ids: pl.Series, probabilities: Floats, task: Task, sample: pl.DataFrame | None) -> pl.DataFrame:
    """The rows of a submission as a table: what `write_submission` writes, with ids of the type that they came in.

    Args:
        ids: `(N,)`.
        probabilities: `(N, C)`.
        task: columns and classes.
        sample: these rows of the sample submission, which give ids, order and columns; None: use `ids`.

    Raises:
        DataError: the sample has other ids, or columns that the task can't fill; or a row is no distribution.
    """
    numbers = [str(row) for row in range(len(ids))]  # ids are the caller's: they may be missing or stand twice
    scores = scores_frame(numbers, probabilities, task, orders=1, models=[])
    if sample is None:
        return _filled(scores, task, ["id", *_label_columns(task)]).with_columns(ids.alias("id"))
    if not can_fill(sample.columns, task):
        raise _unfillable(sample.columns, task, None)
    row_ids, sample_row_ids = as_text(ids).rename("id"), as_text(sample["id"])
    if row_ids.to_list() != sample_row_ids.to_list():
        refuse([*_repeated(row_ids, "the rows"), *_different_ids(row_ids, sample_row_ids, "the rows")], "batch")
        places = sample_row_ids.to_frame("id").join(
            row_ids.to_frame().with_row_index("at"), on="id", maintain_order="left"
        )
        scores = scores[places["at"]]
    return _filled(scores, task, sample.columns).with_columns(sample["id"])


def can_fill(columns: Sequence[str], task: Task) -> bool:
    """Whether these are a submission's columns, in any order."""
    return set(columns) in ({"id", *task.classes}, {"id", *_label_columns(task)})


def check_submission(path: Path, sample: Path, task: Task) -> dict[str, Any]:
    """Check a submission as Kaggle would: the sample's columns, ids and order, and valid numbers.

    Returns:
        `rows`, `columns`, `verdicts` (number of rows by likeliest class) and `means` (mean probability of each class;
        for a column of names, its share of the rows).

    Raises:
        DataError: one message lists all problems.
    """
    sample_rows, submission = _load_sample(sample, task), load(path)
    if submission.columns != sample_rows.columns:
        raise DataError(
            f"the submission has columns {submission.columns}, the sample {sample_rows.columns}",
            where=path,
            remedy="write it with write_submission and this sample",
        )
    ids = as_ids(submission["id"], path)
    problems = [*_repeated(ids, "the submission"), *_different_ids(ids, sample_rows["id"], "the submission")]
    if not problems and ids.to_list() != sample_rows["id"].to_list():
        problems.append(DataError("the ids are the sample's, in another order", remedy="keep the sample's order"))
    if task.label_column in submission.columns:
        names = as_text(submission[str(task.label_column)])
        values = np.stack([(names == name).fill_null(value=False).to_numpy() for name in task.classes], axis=1)
        wrong = _no_classes(ids, names, task)
    else:
        values = _numbers(submission, task.classes)
        wrong = _impossible(ids, values, task)
    refuse([*problems, *wrong], path)
    verdicts = np.bincount(likeliest(values), minlength=len(task.classes))
    return {
        "rows": len(ids),
        "columns": submission.columns,
        "verdicts": dict(zip(task.classes, verdicts.tolist(), strict=True)),
        "means": dict(zip(task.classes, values.mean(axis=0).tolist(), strict=True)),
    }


def _no_classes(ids: pl.Series, names: pl.Series, task: Task) -> list[DataError]:
    unknown = ~names.is_in(list(task.classes)).fill_null(value=False)
    if not unknown.any():
        return []
    examples = names.filter(unknown).unique(maintain_order=True).head(5).to_list()
    what = f"column {task.label_column!r} names {examples}, which are not among the classes {list(task.classes)}"
    return [DataError(what, rows=ids.filter(unknown).to_list(), remedy="write it with write_submission")]


def _load_sample(sample: Path, task: Task) -> pl.DataFrame:
    rows = load(sample)
    if not can_fill(rows.columns, task):
        raise _unfillable(rows.columns, task, sample)
    rows = rows.with_columns(as_ids(rows["id"], sample).fill_null("").alias("id"))
    refuse(_repeated(rows["id"], "the sample"), sample)
    return rows


def _unfillable(columns: Sequence[str], task: Task, sample: Path | None) -> DataError:
    allowed = [{"id", *task.classes}, {"id", *_label_columns(task)}]
    return DataError(
        f"the sample submission has columns {list(columns)}; task {task.name!r} can fill "
        + " or ".join(str(sorted(column_set)) for column_set in allowed[: 1 + (allowed[0] != allowed[1])]),
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
    """Refuse ids that can't become a submission, before anything is scored.

    Raises:
        DataError: ids are repeated, or differ from the sample's; the message lists them.
    """
    row_ids = pl.Series("id", list(ids), dtype=pl.String)
    problems = _repeated(row_ids, "the rows")
    if sample is not None:
        problems += _different_ids(row_ids, _load_sample(sample, task)["id"], "the rows")
    refuse(problems, sample)


def _different_ids(ids: pl.Series, ids_of_sample: pl.Series, holder: str) -> list[DataError]:
    problems = []
    missing = ids_of_sample.filter(~ids_of_sample.is_in(ids.to_list())).to_list()
    unknown = ids.filter(~ids.is_in(ids_of_sample.to_list())).to_list()
    if missing:
        what = f"{holder} lack {len(missing):,} ids of the sample submission"
        problems.append(DataError(what, rows=missing, remedy="score the test file that the sample belongs to"))
    if unknown:
        what = f"{holder} have {len(unknown):,} ids that the sample submission lacks"
        problems.append(DataError(what, rows=unknown, remedy="score the test file that the sample belongs to"))
    return problems
