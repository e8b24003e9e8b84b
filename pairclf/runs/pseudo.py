"""Pseudo-labels: turn scores of unlabelled rows into weighted training rows that share no prompt with held-out rows.

The file that it writes is for `data.train: [train.csv, {files: pseudo.parquet, train_only: true}]`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray
from rich.table import Table

from pairclf.config import Config
from pairclf.console import counted, table
from pairclf.data.audit import clean, note_changes
from pairclf.data.duplicates import near_overlap
from pairclf.data.folds import prompt_hashes, same_group
from pairclf.data.rows import read_rows, write_rows
from pairclf.data.teachers import out_of_sample
from pairclf.errors import ConfigError, DataError
from pairclf.files import check_file_target
from pairclf.scores.metrics import likeliest
from pairclf.scores.probabilities import apply_temperature
from pairclf.task import Task

PREFIX = "pseudo-"


@dataclass(frozen=True, slots=True)
class Pseudo:
    """Numbers of rows: read, left out by reason (the first one that applies), written."""

    read: int
    validation: int
    test: int
    repeated: int
    unsure: int
    written: int


def pseudo(
    config: Config,
    data: Path,
    scores: Path,
    out: Path,
    *,
    weight: float = 0.5,
    min_confidence: float = 0.0,
    temperature: float = 1.0,
    hard: bool = False,
) -> Pseudo:
    """Label unlabelled rows with their scores, and write those that may be trained on.

    Args:
        config: its `data` names the rows that stay unseen: all of `data.train` that are not train_only, whatever
            `data.rules` and `data.max_rows` leave of them, and `data.test`; `folds.near_duplicate_threshold` says what
            nearly equal is, and rows of one `folds.group` stay together.
        data: unlabelled file.
        scores: their scores; every row that is kept needs one, out of sample unless
            `train.distill.allow_unknown_provenance`.
        out: the file to write; ids get the prefix `pseudo-`.
        weight: of each row in the loss.
        min_confidence: probability of the likeliest class, after the temperature, below which a row is left out.
        temperature: as `apply_temperature`.
        hard: the likeliest class alone, instead of probabilities.

    Raises:
        ConfigError: the settings or paths contradict each other, or the rows that must stay unseen are not there.
        DataError, LeakError: as `read_rows` and `out_of_sample`; a row has no score; or no row is left.
    """
    task = config.task
    _check(config, data, scores, out, weight)
    rows = read_rows([config.data.unlabelled(data)], task, labelled=False, group=config.folds.group)
    frame, findings = clean(rows, task, config.data.rules, labelled=False)
    note_changes(findings)
    kept, near_validation, near_test = _without_unseen(config, frame)
    fresh = kept.filter(_first_of_pairs(kept, task))
    labels = apply_temperature(_all_scored(config, scores, fresh), temperature, task)
    sure = labels.max(axis=1, initial=0) >= min_confidence
    if not sure.any():
        raise DataError(
            f"none of the {len(frame):,} rows is left: {near_validation:,} share a prompt with data.train, "
            f"{near_test:,} with data.test, {len(kept) - len(fresh):,} are repeated, {len(fresh):,} are unsure",
            where=data,
            remedy="give other rows, or lower --min-confidence; to label the test rows themselves, set data.test=null",
        )
    targets = np.eye(len(task.classes))[likeliest(labels)] if hard else labels
    write_rows(out, _training_rows(fresh, targets, weight).filter(pl.Series(sure)), task, config.folds.group)
    counts = (len(kept) - len(fresh), int((~sure).sum()), int(sure.sum()))
    return Pseudo(len(frame), near_validation, near_test, *counts)


def _check(config: Config, data: Path, scores: Path, out: Path, weight: float) -> None:
    if not (math.isfinite(weight) and weight > 0):
        raise ConfigError(f"--weight {weight} must be a finite number above 0")
    if config.task.multi_label:
        raise ConfigError("pseudo-labels are probabilities that sum to 1, and this task has several labels a row")
    check_file_target(out)
    test = config.data.test_file
    if test is not None and not test.is_file():
        raise ConfigError(
            f"data.test is {test}, which is not there: its rows can't be left out",
            remedy="fetch it; or set data.test=null if there is no test file to protect",
        )
    read = [data, scores, *(path for source in config.data.sources if not source.train_only for path in source.files)]
    if out.resolve() in {path.resolve() for path in [*read, *([test] if test else [])]}:
        raise ConfigError(f"--out {out} is one of the files that are read", remedy="give it a path of its own")


def _without_unseen(config: Config, frame: pl.DataFrame) -> tuple[pl.DataFrame, int, int]:
    """The rows that share no prompt with held-out or test rows, and how many share one with each."""
    folded = [source for source in config.data.sources if not source.train_only]
    if not folded:
        raise ConfigError(
            "data.train names no file whose rows may be held out", remedy="name the labelled files, e.g. [train.csv]"
        )
    unseen = [read_rows(folded, config.task, labelled=True, group=config.folds.group)]
    if (test := config.data.test_file) is not None:
        source = config.data.unlabelled(test)
        unseen.append(read_rows([source], config.task, labelled=False, group=config.folds.group))
    gone = []
    for rows in unseen:
        apart = ~_overlap(frame, rows, config)
        gone.append(int((~apart).sum()))
        frame = frame.filter(apart)
    return frame, gone[0], sum(gone[1:])


def _overlap(frame: pl.DataFrame, unseen: pl.DataFrame, config: Config) -> pl.Series:
    """Mask of the rows with the group or (nearly) the prompt of an unseen row; rows without a prompt are compared by
    texts."""
    equal = prompt_hashes(frame, config.task).is_in(prompt_hashes(unseen, config.task).implode())
    return (
        equal
        | same_group(frame, unseen)
        | near_overlap(frame, unseen, config.task, config.folds.near_duplicate_threshold)
    )


def _first_of_pairs(frame: pl.DataFrame, task: Task) -> pl.Series:
    """Mask of the first row among rows with the same texts, in either order."""
    hashes = frame.select(pl.col(task.fields).list.eval(pl.element().hash())).select(pl.all().hash())
    sides = list(task.swap_fields or ())
    staying = [name for name in task.fields if name not in sides]
    ordered = [pl.min_horizontal(sides).alias("low"), pl.max_horizontal(sides).alias("high")] if sides else []
    return hashes.select(pl.struct(*staying, *ordered).is_first_distinct()).to_series()


def _all_scored(config: Config, scores: Path, frame: pl.DataFrame) -> NDArray[np.float64]:
    values = out_of_sample(scores, frame, config.task, unproven=config.train.distill.allow_unknown_provenance)
    missing = np.isnan(values).any(axis=1)
    if missing.any():
        raise DataError(
            f"{counted(int(missing.sum()), 'row has', 'rows have')} no score",
            where=scores,
            rows=frame["id"].filter(pl.Series(missing)).to_list(),
            remedy="score the whole file: `pairclf predict BUNDLE ... --data FILE --scores scores.parquet`",
        )
    return values


def _training_rows(frame: pl.DataFrame, targets: NDArray[np.float64], weight: float) -> pl.DataFrame:
    labels = pl.Series("target", targets, dtype=pl.Array(pl.Float64, targets.shape[1])).cast(pl.List(pl.Float64))
    return frame.with_columns((PREFIX + pl.col("id")).alias("id"), labels, weight=pl.lit(weight))


def render(counts: Pseudo, out: Path) -> Table:
    """The counts as a table."""
    counts_table = table("Pseudo-labels", "", "rows")
    counts_table.add_row("read", f"{counts.read:,}")
    counts_table.add_row("left out: (nearly) a prompt, or a folds.group, of data.train", f"{counts.validation:,}")
    counts_table.add_row("left out: (nearly) a prompt, or a folds.group, of data.test", f"{counts.test:,}")
    counts_table.add_row("left out: the same texts as a row before", f"{counts.repeated:,}")
    counts_table.add_row("left out: below --min-confidence", f"{counts.unsure:,}")
    counts_table.add_row(f"written to {out}", f"{counts.written:,}", style="bold")
    return counts_table
