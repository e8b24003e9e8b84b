"""Teachers' scores for distillation, soft labels, and the check that no teacher was trained on the rows that it scored.

A teacher that was trained on a row repeats its label: the student then learns the labels twice, and validation looks
better than the leaderboard. So scores record, for each row, how many of their models were trained on its prompt
(`seen`), and hashes of the row; both are checked here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from pairclf.config import Config
from pairclf.console import console, counted
from pairclf.data.identity import refuse_other_rows
from pairclf.data.scores import class_matrix, read_scores
from pairclf.errors import ConfigError, DataError, LeakError
from pairclf.scores.metrics import Floats
from pairclf.scores.probabilities import mean_of_models
from pairclf.task import Task


def teachers_of(config: Config, training: pl.DataFrame) -> Floats | None:
    """The mean of the teachers' probabilities for each training row; None without `train.distill.scores`.

    Args:
        config: its task and `train.distill`.
        training: canonical table of the training rows.

    Returns:
        `(N, C)` in the order of `training`; all files have equal weights; NaN if no teacher scored the row.

    Raises:
        ConfigError: a file is named twice.
        DataError: as `out_of_sample`; or no training row is scored.
        LeakError: as `out_of_sample`.
    """
    settings = config.train.distill
    if not settings.scores:
        return None
    return mean_of_teachers(settings.scores, training, config.task, unproven=settings.allow_unknown_provenance)


def mean_of_teachers(paths: Sequence[Path], training: pl.DataFrame, task: Task, *, unproven: bool = False) -> Floats:
    """As `teachers_of`, of files of scores that `pairclf distill` names."""
    if len({path.resolve() for path in paths}) != len(paths):
        raise ConfigError("the list of teachers' scores names a file twice, which would count twice in the mean")
    by_teacher = []
    for path in paths:
        values = out_of_sample(path, training, task, unproven=unproven)
        by_teacher.append(values)
        scored = np.isfinite(values).all(axis=1)
        console.print(f"note: {path}: a teacher for {int(scored.sum()):,} of {counted(len(training), 'training row')}")
    mean = mean_of_models(by_teacher)
    if np.isnan(mean).all():
        raise DataError(
            f"teachers' scores: none of the {len(training):,} training rows is scored",
            where=", ".join(map(str, paths)),
            rows=training["id"].to_list(),
            remedy="give scores of the training rows, joined on id: `pairclf cv` writes oof.parquet",
        )
    return mean


def with_soft_labels(rows: pl.DataFrame, config: Config) -> pl.DataFrame:
    """The canonical table of training rows, with the labels of `data.soft_labels` where the file has the row.

    Raises:
        DataError: as `out_of_sample`; or the file has none of the rows.
        LeakError: as `out_of_sample`: its column `seen` must say that no label comes from a model that knew the row.
    """
    path = config.data.soft_label_file
    if path is None:
        return rows
    values = out_of_sample(path, rows, config.task, unproven=False)
    covered = np.isfinite(values).all(axis=1)
    if not covered.any():
        raise DataError(
            f"data.soft_labels: none of the {len(rows):,} training rows is in the file",
            where=path,
            rows=rows["id"].to_list(),
            remedy="give the labels of these rows, joined on id: `pairclf suspects` writes them",
        )
    if not config.task.multi_label:
        values = values / values.sum(axis=1, keepdims=True)  # scores sum to one less strictly than labels
    labels = pl.Series(values, dtype=pl.Array(pl.Float64, values.shape[1])).cast(pl.List(pl.Float64))
    return rows.with_columns(labels.zip_with(pl.Series(covered), rows["target"]).alias("target"))


def out_of_sample(path: Path, rows: pl.DataFrame, task: Task, *, unproven: bool) -> Floats:
    """Probabilities for `rows` from a file of scores, joined on id, from models that were not trained on these rows.

    Args:
        path: scores, of any rows.
        rows: canonical table.
        task: whose classes the columns are.
        unproven: accept scores of unknown provenance.

    Returns:
        `(N, C)`, in the order of `rows`; NaN without a score, or with one that no model gave (`orders` 0).

    Raises:
        DataError: the file can't be read, has other classes, an id twice or a row that is no distribution, or its
            scores are those of other rows with the same ids, mirrored ones included.
        LeakError: a model of a row's score was trained on (nearly) the same prompt, or the provenance is unknown.
    """
    scores = read_scores(path, task, foreign=True)
    refuse_other_rows(scores, rows, task, path)
    by_models = scores.filter((pl.col("orders") > 0).fill_null(value=True))  # 0: the prior, because time ran out
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
            "sample, write a column seen of zeros, or set train.distill.allow_unknown_provenance=true for teachers",
        )
