"""Folds that tell the truth: rows with the same prompt share a fold, classes are balanced, and no leak goes unseen.

A prompt is compared after normalisation (NFKC, case folded, white space collapsed). Rows without any prompt text
have nothing in common: each is a group of its own.
"""

from __future__ import annotations

import hashlib
import unicodedata
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from polars.exceptions import PolarsError
from rich.table import Table
from sklearn.model_selection import StratifiedGroupKFold

from pairclf.console import table
from pairclf.errors import DataError, LeakError
from pairclf.files import atomic_file
from pairclf.task import Task

_COLUMNS = ["id", "fold", "group"]
_FEWER = "lower folds.n, or read more rows (data.max_rows)"
_REMAKE = "make the folds anew with `pairclf folds`"


def normalise(text: str) -> str:
    """The form in which prompts are compared.

    >>> normalise("  Ｗhat\\n IS  it？ ")
    'what is it?'
    """
    return " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).split())


def prompt_groups(frame: pl.DataFrame, task: Task) -> pl.Series:
    """Group keys `(N,)`: a hash of the normalised text of the fields that a swap leaves in place.

    Where a swap moves every field, their sorted texts are hashed, so that a pair and its mirror share a group.
    """
    staying = [name for name in task.fields if name not in (task.swap_fields or ())] or list(task.fields)
    columns = (frame[name].list.drop_nulls().list.join("\n") for name in staying)
    keys = map(_group_key, frame["id"], zip(*columns, strict=True))
    return pl.Series("group", list(keys), dtype=pl.String)


def _group_key(row_id: str, texts: tuple[str, ...]) -> str:
    text = "\n".join(sorted(normalise(text) for text in texts)).strip()
    return hashlib.sha256(text.encode()).hexdigest()[:16] if text else f"row:{row_id}"


def make_folds(frame: pl.DataFrame, task: Task, *, n: int, seed: int) -> pl.DataFrame:
    """Assign every row to one of `n` folds: no prompt in two folds, classes balanced as far as that allows.

    Args:
        frame: canonical table, labelled.
        task: what is judged; a soft label counts as its likeliest class.
        n: number of folds, from 2 up.
        seed: the same rows in the same order with the same seed give the same folds.

    Returns:
        `id` (String), `fold` (Int64, from 0) and `group` (String), in the frame's order.

    Raises:
        DataError: rows have no label, or there are too few different prompts, or rows of a class, for `n` folds.
    """
    unlabelled = frame.filter(pl.col("target").is_null())["id"].to_list()
    if unlabelled:
        raise DataError("folds need labels", rows=unlabelled, remedy="make folds of the training files (data.train)")
    groups = prompt_groups(frame, task)
    if groups.n_unique() < n:
        raise DataError(
            f"{groups.n_unique():,} different prompts can't fill {n} folds; rows with the same prompt stay together",
            remedy=_FEWER,
        )
    fold = _stratify(frame["target"].list.arg_max().to_numpy(), groups.to_numpy(), n, seed)
    empty = sorted(set(range(n)) - set(fold.tolist()))
    if empty:
        raise DataError(f"folds {empty} of {n} stay empty", remedy=_FEWER)
    return pl.DataFrame([frame["id"], pl.Series("fold", fold, dtype=pl.Int64), groups])


def _stratify(classes: NDArray[Any], groups: NDArray[Any], n: int, seed: int) -> NDArray[np.int64]:
    """The fold of each row, `(N,)`, by scikit-learn's greedy rule: the most uneven groups are placed first."""
    folds = np.empty(len(classes), dtype=np.int64)
    splitter = StratifiedGroupKFold(n_splits=n, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class")  # `report` shows the balance
        try:
            for fold, (_, held_out) in enumerate(splitter.split(classes, classes, groups)):
                folds[held_out] = fold
        except ValueError as error:  # no class has n rows
            raise DataError(f"{len(classes):,} rows can't fill {n} folds: {error}", remedy=_FEWER) from error
    return folds


def write_folds(path: Path, folds: pl.DataFrame) -> None:
    """Write `id,fold,group` as CSV, atomically."""
    with atomic_file(path) as temporary:
        folds.select(_COLUMNS).write_csv(temporary)


def read_folds(path: Path, frame: pl.DataFrame, *, n: int) -> pl.DataFrame:
    """Read `n` folds that cover exactly the rows of `frame`; returned as `make_folds` does, in the frame's order.

    Raises:
        DataError: the file is no folds file, its folds are not 0 to n - 1, or ids are missing, unknown or repeated.
    """
    try:
        folds = pl.read_csv(path, infer_schema=False, glob=False)
    except (OSError, PolarsError) as error:
        raise DataError(f"folds can't be read: {error}", where=path, remedy=_REMAKE) from error
    if folds.columns != _COLUMNS:
        raise DataError(f"columns are {folds.columns}, folds have {_COLUMNS}", where=path, remedy=_REMAKE)
    folds = folds.with_columns(pl.col("fold").cast(pl.Int64, strict=False))
    ids = folds["id"]
    for what, rows in (
        (f"folds must be whole numbers from 0 to {n - 1}", ids.filter(~folds["fold"].is_in(range(n)).fill_null(False))),
        ("ids stand twice", ids.filter(ids.is_duplicated()).unique(maintain_order=True)),
        ("rows of the data have no fold", frame["id"].filter(~frame["id"].is_in(ids.implode()))),
        ("ids are not in the data", ids.filter(~ids.is_in(frame["id"].implode()))),
    ):
        if len(rows):
            raise DataError(what, where=path, rows=rows.to_list(), remedy=_REMAKE)
    if folds["fold"].n_unique() != n:
        raise DataError(f"the file has {folds['fold'].n_unique()} folds, not {n}", where=path, remedy=_REMAKE)
    return frame.select("id").join(folds, on="id", how="left", maintain_order="left")


def assert_no_leak(train: pl.DataFrame, held_out: pl.DataFrame, task: Task) -> None:
    """Do nothing if no held-out row shares its id or its normalised prompt with a row that is trained on.

    Raises:
        LeakError: with the ids of the held-out rows that do.
    """
    known = prompt_groups(train, task)
    prompts = prompt_groups(held_out, task)
    seen = held_out["id"].is_in(train["id"].implode()) | prompts.is_in(known.implode())
    if seen.any():
        raise LeakError(
            f"{seen.sum():,} of {len(held_out):,} held-out rows share their id or prompt with a training row",
            rows=held_out["id"].filter(seen).to_list(),
            remedy="make the folds anew with `pairclf folds`, or take these rows out of the training files",
        )


def report(folds: pl.DataFrame, frame: pl.DataFrame, task: Task) -> Table:
    """A line a fold: rows, different prompts, rows of the largest prompt, and each class's share of the labels."""
    made = table("Folds", "fold", "rows", "prompts", "largest", *task.classes)
    labelled = folds.join(frame.select("id", "target"), on="id", how="left", maintain_order="left")
    parts = [(str(key[0]), part) for key, part in labelled.sort("fold").group_by("fold", maintain_order=True)]
    for name, part in [*parts, ("all", labelled)]:
        rows = part["group"].value_counts()["count"].to_list()
        shares = np.mean(part["target"].to_list(), axis=0)
        cells = (f"{len(part):,}", f"{len(rows):,}", f"{max(rows):,}")
        made.add_row(name, *cells, *(f"{share:.1%}" for share in shares))
    return made
