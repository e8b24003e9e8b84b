"""Submissions: write them in the sample's columns and order, and check them against the sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from pairclf.config import Submission
from pairclf.data.formats import as_ids, as_text, load, refuse
from pairclf.data.rows import TRUTH, as_numbers
from pairclf.data.scores import class_matrix, impossible_values, repeated_ids, score_problems, scores_frame
from pairclf.errors import DataError
from pairclf.files import atomic_file
from pairclf.scores.figures import METRICS
from pairclf.scores.metrics import Floats, likeliest
from pairclf.scores.thresholds import DEFAULT, apply_thresholds, thresholds_of
from pairclf.task import Task


@dataclass(frozen=True, slots=True)
class Form:
    """What the columns of a submission hold.

    Attributes:
        task: the classes.
        id: the column of ids.
        columns: all columns, in order.
        classes: column -> the class that it belongs to; all classes, or one of two.
        label: the column with the name of the likeliest class; None: there is none.
        hard: the columns of classes hold 1 and 0 instead of probabilities.
        thresholds: of several labels; `settings.thresholds`.
    """

    task: Task
    id: str
    columns: Sequence[str]
    classes: Mapping[str, str]
    label: str | None = None
    hard: bool = False
    thresholds: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        if self.label is not None:
            return f"column {self.label!r} holds the name of the likeliest class"
        rule = f"from a probability of {self._levels()}" if self.task.multi_label else "for the likeliest class"
        what = f"1 {rule}, or else 0" if self.hard else "probabilities"
        named = (column if column == name else f"{column} of {name}" for column, name in self.classes.items())
        return f"columns hold {what}: {', '.join(named)}"

    def _levels(self) -> str:
        """The thresholds in words: `0.5`, or `0.5 (software 0.3)`."""
        own = ", ".join(f"{name} {value:.4g}" for name, value in self.thresholds.items())
        return f"{DEFAULT:g}{f' ({own})' if own else ''}"

    def fill(self, scores: pl.DataFrame) -> pl.DataFrame:
        """The submission's table from the `id` and the class columns of scores."""
        values = class_matrix(scores, self.task)
        cells = {self.id: scores["id"]}
        if self.label is not None:
            names = [self.task.classes[index] for index in likeliest(values)]
            cells[self.label] = pl.Series(names, dtype=pl.String)
        if self.hard:
            chosen = (
                apply_thresholds(values, thresholds_of(self.task, self.thresholds))
                if self.task.multi_label
                else np.eye(len(self.task.classes), dtype=np.bool_)[likeliest(values)]
            )
            values = chosen.astype(np.int64)
        for column, name in self.classes.items():
            cells[column] = pl.Series(values[:, self.task.classes.index(name)])
        return pl.DataFrame([cells[column].alias(column) for column in self.columns])

    def read(self, submission: pl.DataFrame) -> Floats:
        """The values `(N, C)` of a submission with these columns; NaN if a cell is not a number."""
        if self.label is not None:
            names = as_text(submission[self.label])
            return np.stack([(names == name).fill_null(value=False).to_numpy() for name in self.task.classes], axis=1)
        values = as_numbers(submission, list(self.classes))
        if len(self.classes) == len(self.task.classes):
            order = [list(self.classes.values()).index(name) for name in self.task.classes]
            return values[:, order]
        first = self.task.classes[0] in self.classes.values()
        return np.concatenate([values, 1 - values] if first else [1 - values, values], axis=1)


def form_of(task: Task, settings: Submission, sample: pl.DataFrame | None) -> Form:
    """The form of a submission, as the sample, `task.metric` and `data.submission` have it together.

    Raises:
        DataError: `settings` name what the task or the sample has not; or it stays unclear what a column is to hold.
    """
    _check_settings(task, settings)
    row_id = settings.id or "id"
    named = {settings.columns.get(name, name): name for name in task.classes}
    label = None if task.label_column is None else settings.columns.get(task.label_column, task.label_column)
    explicit = {column: name for name, column in settings.columns.items() if name in task.classes}
    hard = settings.values == "labels"
    if sample is None:
        if label is not None and not explicit and (hard or (settings.values == "auto" and _asks_for_labels(task))):
            return Form(task, row_id, [row_id, label], {}, label)
        classes = explicit if len(explicit) == 1 and task.kind == "binary" else named
        return Form(task, row_id, [row_id, *classes], classes, None, hard, settings.thresholds)
    others = [name for name in sample.columns if name != row_id]
    if row_id in sample.columns and len(others) == len(sample.columns) - 1:
        if set(others) == set(named):
            return Form(task, row_id, sample.columns, named, None, hard, settings.thresholds)
        if len(others) == 1 and others[0] in named and task.kind == "binary":
            return Form(task, row_id, sample.columns, {others[0]: named[others[0]]}, hard=hard)
        if others == [label]:
            return _form_of_one_column(task, settings, row_id, sample)
    raise _unfillable(task, row_id, sample.columns, [list(named), *([[label]] if label else [])])


def describe_form(task: Task, sample: Path | None, settings: Submission) -> str:
    """What a submission will hold, in words.

    Raises:
        DataError: as `open_sample`.
    """
    form = form_of(task, settings, None) if sample is None else open_sample(sample, task, settings)[0]
    return f"{form} (task.metric={task.metric})"


def possible_forms(task: Task, settings: Submission) -> list[Form]:
    """The forms of the samples that a task can fill, as far as they are clear without a sample."""
    forms = []
    for names in [task.classes, *([(task.label_column,)] if task.label_column else [])]:
        columns = [settings.id or "id", *(settings.columns.get(name, name) for name in names)]
        with suppress(DataError):
            forms.append(form_of(task, settings, pl.DataFrame(schema=dict.fromkeys(columns, pl.String))))
    return forms


def _check_settings(task: Task, settings: Submission) -> None:
    ours = [*task.classes, *([task.label_column] if task.label_column else [])]
    if settings.thresholds and not task.multi_label:
        what = f"data.submission.thresholds={settings.thresholds} are for several labels a row"
        raise DataError(f"{what}, and task {task.name!r} has one: the likeliest class", remedy="remove the setting")
    if unknown := [name for name in settings.thresholds if name not in task.classes]:
        what = f"data.submission.thresholds names {unknown}, which are no labels of task {task.name!r}"
        raise DataError(what, remedy=f"its labels are {', '.join(task.classes)}")
    if unknown := [name for name in settings.columns if name not in ours]:
        remedy = f"our names stand on the left: {', '.join(ours)}"
        raise DataError(f"data.submission.columns maps {unknown}, which task {task.name!r} has not", remedy=remedy)
    row_id = settings.id or "id"
    if taken := [name for name in ours if settings.columns.get(name, name) == row_id]:
        what = f"the column {row_id!r} of the submission is that of the ids, and that of {taken[0]!r} too"
        raise DataError(what, remedy="name another column: data.submission.id, or data.submission.columns")
    columns = [settings.columns.get(name, name) for name in task.classes]
    if twice := sorted({column for column in columns if columns.count(column) > 1}):
        what = f"data.submission.columns={settings.columns} gives several classes the columns {twice}"
        raise DataError(what, remedy=f"give each of the classes {list(task.classes)} a column of its own")


def _asks_for_labels(task: Task) -> bool:
    return task.metric in METRICS and METRICS[task.metric].submits == "labels"


def _form_of_one_column(task: Task, settings: Submission, row_id: str, sample: pl.DataFrame) -> Form:
    """The form of a sample with one column, named as the label column: a class's name, or a probability.

    Raises:
        DataError: probabilities are asked for, and it is unclear of which class.
    """
    (column,) = (name for name in sample.columns if name != row_id)
    numbers = as_text(sample[column]).cast(pl.Float64, strict=False)
    fractions = bool((numbers != numbers.floor()).any())
    if settings.values == "labels" or (settings.values == "auto" and _asks_for_labels(task) and not fractions):
        return Form(task, row_id, sample.columns, {}, column)
    if (positive := _positive(task)) is not None:
        return Form(task, row_id, sample.columns, {column: positive})
    last = task.classes[-1]
    of_last = f"data.submission.columns={{{last}: {column}}} writes the probability of {last!r}; "
    reason = "its cells are fractions" if fractions else f"task.metric={task.metric} is of probabilities"
    raise DataError(
        f"the sample submission has the one column {column!r}, and {reason}: it is unclear of which class",
        remedy=f"{of_last if task.kind == 'binary' else ''}data.submission.values=labels writes the likeliest class; "
        "and set task.metric to the metric of the leaderboard before the next training",
    )


def _positive(task: Task) -> str | None:
    """The class that a column of 0 and 1, or of true and false, is about."""
    values = {TRUTH.get(name, name): name for name in task.classes}
    return values["1"] if values.keys() == {"0", "1"} else None


def write_submission(
    path: Path, scores: pl.DataFrame, task: Task, sample: Path | None, settings: Submission | None = None
) -> None:
    """Write a submission, atomically: the sample's ids, order and columns, joined on id and never by position.

    A column of names gets the `likeliest` class; in a tie, the first one in class order. Without a sample, rows keep
    the order of the scores.

    Raises:
        DataError: as `form_of`; ids are missing, unknown or repeated, or a row is not a distribution; nothing is
            written.
    """
    problems = score_problems(scores["id"], class_matrix(scores, task), task)
    if sample is None:
        form = form_of(task, settings or Submission(), None)
    else:
        form, sample_rows = open_sample(sample, task, settings)
        problems += _different_ids(scores["id"], sample_rows[form.id], "the scores")
    refuse(problems, sample or path)
    if sample is not None:
        ids = sample_rows.select(pl.col(form.id).alias("id"))
        scores = ids.join(scores, on="id", how="left", maintain_order="left")
    with atomic_file(path) as temporary:
        form.fill(scores).write_csv(temporary)


def answer(
    ids: pl.Series, probabilities: Floats, task: Task, sample: pl.DataFrame | None, settings: Submission | None = None
) -> pl.DataFrame:
    """The rows of a submission as a table: what `write_submission` writes, with ids of the type that they came in.

    Args:
        ids: `(N,)`.
        probabilities: `(N, C)`.
        task: columns and classes.
        sample: these rows of the sample submission, which give ids, order and columns; None: use `ids`.
        settings: `data.submission`.

    Raises:
        DataError: the sample has other ids, or columns that the task can't fill; or a row is no distribution.
    """
    numbers = [str(row) for row in range(len(ids))]  # ids are the caller's: they may be missing or stand twice
    scores = scores_frame(numbers, probabilities, task, orders=1, models=[])
    form = form_of(task, settings or Submission(), sample)
    if sample is None:
        return form.fill(scores).with_columns(ids.alias(form.id))
    row_ids, sample_row_ids = as_text(ids).rename("id"), as_text(sample[form.id])
    if row_ids.to_list() != sample_row_ids.to_list():
        refuse([*repeated_ids(row_ids, "the rows"), *_different_ids(row_ids, sample_row_ids, "the rows")], "batch")
        places = sample_row_ids.to_frame("id").join(
            row_ids.to_frame().with_row_index("at"), on="id", maintain_order="left"
        )
        scores = scores[places["at"]]
    return form.fill(scores).with_columns(sample[form.id])


def can_fill(columns: Sequence[str], task: Task, settings: Submission | None = None) -> bool:
    """Whether these are a submission's columns, in any order."""
    names = (settings or Submission()).model_copy(
        update={"values": "labels"}
    )  # what they are to hold is another matter
    try:
        form_of(task, names, pl.DataFrame(schema=dict.fromkeys(columns, pl.String)))
    except DataError:
        return False
    return True


def check_submission(path: Path, sample: Path, task: Task, settings: Submission | None = None) -> dict[str, Any]:
    """Check a submission as Kaggle would: the sample's columns, ids and order, and valid numbers.

    Returns:
        `rows`, `columns`, `verdicts` (number of rows by likeliest class; of several labels, rows by label) and `means`
        (mean probability of each class; for a column of names, its share of the rows).

    Raises:
        DataError: one message lists all problems.
    """
    form, sample_rows = open_sample(sample, task, settings)
    submission = load(path)
    if submission.columns != sample_rows.columns:
        raise DataError(
            f"the submission has columns {submission.columns}, the sample {sample_rows.columns}",
            where=path,
            remedy="write it with write_submission and this sample",
        )
    ids, sample_row_ids = as_ids(submission[form.id], path), sample_rows[form.id]
    problems = [*repeated_ids(ids, "the submission"), *_different_ids(ids, sample_row_ids, "the submission")]
    if not problems and ids.to_list() != sample_row_ids.to_list():
        problems.append(DataError("the ids are the sample's, in another order", remedy="keep the sample's order"))
    values = form.read(submission)
    wrong = (
        impossible_values(ids, values, task) if form.label is None else _no_classes(ids, submission[form.label], task)
    )
    refuse([*problems, *wrong], path)
    chosen = values >= 0.5 if task.multi_label else np.eye(len(task.classes), dtype=np.int64)[likeliest(values)]
    return {
        "rows": len(ids),
        "columns": submission.columns,
        "verdicts": dict(zip(task.classes, chosen.sum(axis=0).tolist(), strict=True)),
        "means": dict(zip(task.classes, values.mean(axis=0).tolist(), strict=True)),
    }


def _no_classes(ids: pl.Series, cells: pl.Series, task: Task) -> list[DataError]:
    names = as_text(cells)
    unknown = ~names.is_in(list(task.classes)).fill_null(value=False)
    if not unknown.any():
        return []
    examples = names.filter(unknown).unique(maintain_order=True).head(5).to_list()
    what = f"column {cells.name!r} names {examples}, which are not among the classes {list(task.classes)}"
    return [DataError(what, rows=ids.filter(unknown).to_list(), remedy="write it with write_submission")]


def open_sample(sample: Path, task: Task, settings: Submission | None = None) -> tuple[Form, pl.DataFrame]:
    """The form of a submission, and the rows of its sample, with ids as texts.

    Raises:
        DataError: as `form_of`; or ids are empty or stand twice.
    """
    rows = load(sample)
    try:
        form = form_of(task, settings or Submission(), rows)
    except DataError as error:
        raise DataError(error.what, where=sample, remedy=error.remedy) from error
    rows = rows.with_columns(as_ids(rows[form.id], sample).fill_null("").alias(form.id))
    refuse(repeated_ids(rows[form.id], "the sample"), sample)
    return form, rows


def _unfillable(task: Task, row_id: str, columns: Sequence[str], allowed: Sequence[Sequence[str]]) -> DataError:
    form = " or ".join(str([row_id, *names]) for names in allowed)
    return DataError(
        f"the sample submission has columns {list(columns)}; task {task.name!r} can fill {form}",
        remedy="give the competition's sample_submission.csv, or the task that it belongs to; or say what its columns "
        f"are: data.submission.id=COLUMN, data.submission.columns={{{task.classes[-1]}: COLUMN}}",
    )


def sample_ids(sample: Path, task: Task, settings: Submission | None = None) -> list[str]:
    """The ids of a sample submission, in its order.

    Raises:
        DataError: as `open_sample`.
    """
    form, rows = open_sample(sample, task, settings)
    return rows[form.id].to_list()


def check_ids(ids: Sequence[str], task: Task, sample: Path | None, settings: Submission | None = None) -> None:
    """Refuse ids that can't become a submission, before anything is scored.

    Raises:
        DataError: ids are repeated, or differ from the sample's; the message lists them.
    """
    row_ids = pl.Series("id", list(ids), dtype=pl.String)
    problems = repeated_ids(row_ids, "the rows")
    if sample is not None:
        of_sample = pl.Series(sample_ids(sample, task, settings), dtype=pl.String)
        problems += _different_ids(row_ids, of_sample, "the rows")
    refuse(problems, sample)


def ids_by_position(count: int, task: Task, sample: Path, settings: Submission | None = None) -> list[str]:
    """The ids of the sample submission for the rows of a test file that has none.

    Raises:
        DataError: the sample has another number of rows; or as `open_sample`.
    """
    ids = sample_ids(sample, task, settings)
    if len(ids) != count:
        raise DataError(
            f"the test file has {count:,} rows without ids, and the sample submission {len(ids):,}",
            where=sample,
            remedy="give the sample of this very test; data.test.columns says where the ids are: {id: COLUMN}",
        )
    return ids


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
