"""Teachers' scores for the rows that a student is trained on, and the proof that no teacher was trained on them.

A teacher that was trained on a row repeats its label: the student then learns the labels twice, and validation looks
better than the leaderboard. So scores carry, for each row, how many models behind it were trained on its prompt
(`seen`), and hashes of the row that was scored; both are checked here.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from pairclf.config import Config
from pairclf.console import console
from pairclf.data.identity import refuse_other_rows
from pairclf.data.tables import class_matrix, read_scores
from pairclf.errors import ConfigError, DataError, LeakError
from pairclf.task import Task

Floats = NDArray[np.float64]


def teachers_of(config: Config, training: pl.DataFrame) -> Floats | None:
    """The mean of the teachers' probabilities for each training row; None where `train.distill` names no scores.

    Args:
        config: its task and `train.distill`; the files' paths are taken as they are.
        training: canonical table of the rows that are trained on.

    Returns:
        `(N, C)` in the order of `training` and of the task's classes, each file counting once; NaN where no teacher
        scored the row.

    Raises:
        ConfigError: a file is named twice.
        DataError: as `out_of_sample`; or no training row is scored.
        LeakError: as `out_of_sample`.
    """
    settings, task = config.train.distill, config.task
    if not settings.scores:
        return None
    if len({path.resolve() for path in settings.scores}) != len(settings.scores):
        raise ConfigError("train.distill.scores names a file twice, which would count twice in the mean")
    total, count = np.zeros((len(training), len(task.classes))), np.zeros((len(training), 1))
    for path in settings.scores:
        values = out_of_sample(path, training, task, unproven=settings.unproven)
        known = np.isfinite(values[:, :1])
        total, count = total + np.where(known, values, 0), count + known
        console.print(f"note: {path}: a teacher for {int(known.sum()):,} of {len(training):,} training rows")
    if not count.any():
        raise DataError(
            f"train.distill.scores: none of the {len(training):,} training rows is scored",
            where=", ".join(map(str, settings.scores)),
            rows=training["id"].to_list(),
            remedy="give scores of the training rows, joined on id: `pairclf cv` writes oof.parquet",
        )
    mean: Floats = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
    return mean


def out_of_sample(path: Path, rows: pl.DataFrame, task: Task, *, unproven: bool) -> Floats:
    """The probabilities that a file of scores has for `rows`, joined on id, made by models that never saw these rows.

    Args:
        path: scores, of any rows.
        rows: canonical table.
        task: whose classes the columns are.
        unproven: accept scores that don't say whether their models were trained on the row.

    Returns:
        `(N, C)`, in the order of `rows`; NaN where the file has no score, or one that no model made (`orders` 0).

    Raises:
        DataError: the file can't be read, has other classes, an id twice or a row that is no distribution, or its
            scores are those of other rows with the same ids, mirrored ones included.
        LeakError: a model behind a row's score was trained on a row with (nearly) the same prompt; or nobody knows.
    """
    scores = read_scores(path, task, foreign=True)
    refuse_other_rows(scores, rows, task, path)
    by_models = scores.filter((pl.col("orders") > 0).fill_null(value=True))  # 0: the prior, where time ran out
    joined = rows.select("id").join(by_models, on="id", how="left", maintain_order="left")
    scored = joined[task.classes[0]].is_not_null()
    _refuse_in_sample(path, joined)
    if not unproven:
        _refuse_unknown(path, joined.filter(scored))
    return class_matrix(joined, task)


def _refuse_in_sample(path: Path, joined: pl.DataFrame) -> None:
    inside = (joined["seen"] > 0).fill_null(value=False)
    if inside.any():
        raise LeakError(
            f"{inside.sum():,} of these scores come from models that were trained on the very row, or on (nearly) its "
            "prompt: they repeat the labels",
            where=path,
            rows=joined["id"].filter(inside).to_list(),
            remedy="score these rows out of fold: `pairclf cv` writes oof.parquet, or predict with bundles that never "
            "saw them",
        )


def _refuse_unknown(path: Path, scored: pl.DataFrame) -> None:
    unknown = scored["seen"].is_null()
    if unknown.any():
        raise LeakError(
            f"{unknown.sum():,} of these scores do not say whether their models were trained on the row (column seen)",
            where=path,
            rows=scored["id"].filter(unknown).to_list(),
            remedy="write them with `pairclf cv` or `pairclf predict --scores`; or, if you know that they are out of "
            "sample, set train.distill.unproven=true",
        )
