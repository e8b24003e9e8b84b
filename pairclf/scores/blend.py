"""Averages over models, joined on id, never by position."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add

import numpy as np
import polars as pl

from pairclf.data.tables import HASHES, class_matrix, scores_frame
from pairclf.errors import DataError
from pairclf.scores.metrics import checked_weights
from pairclf.task import Task


def blend(frames: Sequence[pl.DataFrame], task: Task, weights: Sequence[float] | None = None) -> pl.DataFrame:
    """Weighted mean of several models' scores of the same rows, in the order of the first table.

    Args:
        frames: tables of scores, as `scores_frame` makes them.
        task: whose classes the columns are.
        weights: one a table, from 0 up; None: alike.

    Returns:
        Scores whose `models` are those of all tables, and whose `orders` are the fewest that any of them has for the
        row: 2 says that every model behind it saw both orders. `seen` is added up: null where a table does not know.

    Raises:
        DataError: there is no table, the tables hold different ids, or other prompts under the same ids, or the weights
            can't be used.
    """
    if not frames:
        raise DataError("there is nothing to blend", remedy="give at least one table of scores")
    shares = np.ones(len(frames)) if weights is None else checked_weights(weights, len(frames))
    ids = frames[0].select("id")
    aligned = []
    for number, frame in enumerate(frames, start=1):
        odd = set(frame["id"]) ^ set(ids["id"])
        if odd or len(frame) != len(ids):
            raise DataError(
                f"table {number} of {len(frames)} holds other ids than the first",
                rows=sorted(odd) or frame["id"].filter(frame["id"].is_duplicated()).to_list(),
                remedy="blend scores of the same test file",
            )
        aligned.append(ids.join(frame, on="id", how="left", maintain_order="left"))
    mean = np.average([class_matrix(frame, task) for frame in aligned], axis=0, weights=shares)
    orders = np.min([frame["orders"].to_numpy() for frame in aligned], axis=0)
    models = pl.select(pl.concat_list([frame["models"] for frame in aligned])).to_series()
    seen = reduce(add, (frame["seen"] for frame in aligned))
    hashes = reduce(_same_rows, aligned).select(*HASHES)
    return scores_frame(
        ids["id"].to_list(), mean, task, orders=orders.tolist(), models=models, seen=seen, hashes=hashes
    )


def _same_rows(first: pl.DataFrame, other: pl.DataFrame) -> pl.DataFrame:
    """`first` with the hashes that `other` knows, too; both tables hold the same ids in the same order."""
    for name, what in HASHES.items():
        unlike = (first[name] != other[name]).fill_null(value=False)
        if unlike.any():
            raise DataError(
                f"{unlike.sum():,} rows have the same id in two tables, and different {what}s",
                rows=first["id"].filter(unlike).to_list(),
                remedy="blend scores of the same test file",
            )
    return first.with_columns(first[name].zip_with(first[name].is_not_null(), other[name]) for name in HASHES)
