"""Folds that tell the truth: rows with the same or nearly the same prompt share a fold, and no leak goes unseen.

Two ways lead there. Stratified folds (the default) see all rows at once: prompts that are near to each other, over
however many steps, are one group, and the groups are dealt so that classes are balanced. Stable folds see a row and
those before it: a row's fold never changes when rows are appended.

What equal and nearly equal mean stands in `duplicates`. Rows without any prompt text have nothing in common: each is a
group of its own.
"""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from polars.exceptions import PolarsError
from rich.console import Group
from rich.table import Table

from pairclf.console import table
from pairclf.data.csv_syntax import check_csv
from pairclf.data.duplicates import NearIndex, Places, clusters, near_overlap, normalised_prompts, normalised_texts
from pairclf.errors import DataError, LeakError
from pairclf.files import atomic_file
from pairclf.task import Task

_COLUMNS = ["id", "fold", "group"]
_SET_ASIDE = -1
_FEWER = "lower folds.n, or read more rows (data.max_rows)"
_REMAKE = "make the folds anew with `pairclf folds`; for a trial with other rows (data.max_rows), set output=FOLDER"


def prompt_groups(frame: pl.DataFrame, task: Task, near: float | None = None) -> pl.Series:
    """Group keys `(N,)`: a hash of the group's first normalised prompt, or `row:ID` for a row without prompt text.

    Args:
        frame: canonical table.
        task: names the fields that make a prompt.
        near: groups are joined over prompts that are at least so alike; None: over equal ones alone.
    """
    prompts = normalised_prompts(frame, task)
    distinct = _distinct(prompts)
    return _of_rows(frame["id"], prompts, distinct, _keys(distinct)[clusters(distinct, near)])


def _distinct(prompts: pl.Series) -> list[str]:
    return prompts.filter(prompts != "").unique(maintain_order=True).to_list()


def _keys(distinct: list[str]) -> NDArray[np.object_]:
    return np.array([hashlib.sha256(prompt.encode()).hexdigest()[:16] for prompt in distinct], dtype=np.object_)


def _of_rows(ids: pl.Series, prompts: pl.Series, distinct: list[str], groups: NDArray[np.object_]) -> pl.Series:
    """The group of each row `(N,)`, from that of each different prompt."""
    found = prompts.replace_strict(distinct, groups.tolist(), default=None, return_dtype=pl.String)
    return found.fill_null("row:" + ids).alias("group")


def prompt_hashes(frame: pl.DataFrame, task: Task) -> pl.Series:
    """Hashes `(N,)` of the normalised prompts, UInt64, named `prompt`: the same on every machine and in every run.

    A row without prompt text goes by all its texts, in any order, as such rows have nothing else in common.
    """
    prompts = normalised_prompts(frame, task)
    blank = prompts == ""
    if blank.any():
        joined = [frame[name].filter(blank).list.join("\n").fill_null("") for name in task.fields]
        texts = [normalised_texts(one).to_list() for one in joined]
        whole = ["\0".join(["", *sorted(row)]) for row in zip(*texts, strict=True)]  # \0: no prompt holds one
        prompts = prompts.scatter(blank.arg_true(), whole)
    return pl.Series("prompt", [text_hash(prompt) for prompt in prompts], dtype=pl.UInt64)


def text_hash(text: str) -> int:
    """64 bits of a text's SHA-256."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def make_folds(frame: pl.DataFrame, task: Task, *, n: int, seed: int, near: float | None, stable: bool) -> pl.DataFrame:
    """Assign every row to one of `n` folds, no prompt in two.

    Args:
        frame: canonical table, labelled.
        task: what is judged; a soft label counts as its likeliest class.
        n: number of folds, from 2 up.
        seed: the same rows in the same order with the same seed give the same folds.
        near: prompts at least so alike (Jaccard index of their character 5-grams) share a fold; None: equal ones.
        stable: a row's fold hangs on the seed, its prompt and the rows before it. A prompt that is near to none before
            founds a group, in the fold that a hash names; one that is near to groups of one fold alone joins it. One
            that is near to groups of several folds would leak wherever it stood: its rows are set aside, as fold -1.
            Otherwise classes are balanced over the folds, as far as the groups allow, and no row is set aside.

    Returns:
        `id` (String), `fold` (Int64, from 0; -1: neither trained on nor held out) and `group` (String), in the
        frame's order.

    Raises:
        DataError: rows have no label, or there are too few different prompts, or rows of a class, for `n` folds.
    """
    unlabelled = frame.filter(pl.col("target").is_null())["id"].to_list()
    if unlabelled:
        raise DataError("folds need labels", rows=unlabelled, remedy="make folds of the training files (data.train)")
    if stable:
        groups, fold = _stable(frame, task, n, seed, near)
    else:
        groups = prompt_groups(frame, task, near)
        _check_enough(groups, n)
        fold = _stratify(frame["target"].list.arg_max().to_numpy(), groups.to_numpy(), n, seed)
    empty = sorted(set(range(n)) - set(fold.tolist()))
    if empty:
        raise DataError(f"folds {empty} of {n} stay empty", remedy=_FEWER)
    return pl.DataFrame([frame["id"], pl.Series("fold", fold, dtype=pl.Int64), groups])


def _check_enough(groups: pl.Series, n: int) -> None:
    if groups.n_unique() < n:
        raise DataError(
            f"{groups.n_unique():,} different prompts can't fill {n} folds; rows with (nearly) the same prompt stay "
            "together",
            remedy=_FEWER,
        )


def _stable(frame: pl.DataFrame, task: Task, n: int, seed: int, near: float | None) -> tuple[pl.Series, Places]:
    """Groups and folds of the rows, `(N,)` each, as `make_folds` defines them."""
    prompts = normalised_prompts(frame, task)
    distinct = _distinct(prompts)
    folds, firsts = np.full(len(distinct), _SET_ASIDE), np.arange(len(distinct))
    for place, met in NearIndex.of(distinct, near).walk(folds):  # met: one a fold; none that was set aside
        if len(met) == 0:
            folds[place] = _draw(seed, distinct[place], n)
        elif len(met) == 1:
            folds[place], firsts[place] = folds[met[0]], firsts[met[0]]
    groups = _of_rows(frame["id"], prompts, distinct, _keys(distinct)[firsts])
    _check_enough(groups, n)
    fold_of = dict(zip(distinct, folds.tolist(), strict=True))
    rows = zip(prompts, groups, strict=True)
    return groups, np.array([fold_of[prompt] if prompt else _draw(seed, group, n) for prompt, group in rows])


def _draw(seed: int, text: str, n: int) -> int:
    """A fold from 0 to n - 1, the same on every machine (Python's own hash is not)."""
    return text_hash(f"{seed}\n{text}") % n


def _stratify(classes: NDArray[Any], groups: NDArray[Any], n: int, seed: int) -> NDArray[np.int64]:
    """The fold of each row, `(N,)`, by scikit-learn's greedy rule: the most uneven groups are placed first."""
    from sklearn.model_selection import StratifiedGroupKFold  # a second, which most commands need not wait for

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
        DataError: the file is no folds file, its folds are not -1 (set aside) or 0 to n - 1, or ids are missing,
            unknown or repeated.
    """
    try:
        check_csv(path)
        folds = pl.read_csv(path, infer_schema=False, glob=False)
    except (OSError, PolarsError) as error:
        raise DataError(f"folds can't be read: {error}", where=path, remedy=_REMAKE) from error
    if folds.columns != _COLUMNS:
        raise DataError(f"columns are {folds.columns}, folds have {_COLUMNS}", where=path, remedy=_REMAKE)
    folds = folds.with_columns(pl.col("fold").cast(pl.Int64, strict=False))
    ids, legal = folds["id"], folds["fold"].is_in([_SET_ASIDE, *range(n)]).fill_null(False)
    for what, rows in (
        (f"folds must be whole numbers from 0 to {n - 1}, or -1 for a row that is set aside", ids.filter(~legal)),
        ("ids stand twice", ids.filter(ids.is_duplicated()).unique(maintain_order=True)),
        ("rows of the data have no fold", frame["id"].filter(~frame["id"].is_in(ids.to_list()))),
        ("ids are not in the data", ids.filter(~ids.is_in(frame["id"].to_list()))),
    ):
        if len(rows):
            raise DataError(what, where=path, rows=rows.to_list(), remedy=_REMAKE)
    count = folds["fold"].filter(folds["fold"] != _SET_ASIDE).n_unique()
    if count != n:
        raise DataError(f"the file has {count} folds, not {n}", where=path, remedy=_REMAKE)
    return frame.select("id").join(folds, on="id", how="left", maintain_order="left")


def assert_no_leak(train: pl.DataFrame, held_out: pl.DataFrame, task: Task, near: float | None) -> None:
    """Do nothing if no held-out row shares its id with a row that is trained on, nor has (nearly) the same prompt.

    Args:
        train: canonical table of the rows that are trained on.
        held_out: canonical table of the rows that must stay unseen.
        task: names the fields that make a prompt.
        near: prompts at least so alike are a leak; None: equal ones alone.

    Raises:
        LeakError: with the ids of the held-out rows that do.
    """
    known = held_out["id"].is_in(train["id"].to_list())
    seen = known | near_overlap(held_out, train, task, near)
    if seen.any():
        nearly = "" if near is None else f", or have nearly the same prompt (folds.near={near})"
        raise LeakError(
            f"{seen.sum():,} of {len(held_out):,} held-out rows share their id or prompt with a training row{nearly}",
            rows=held_out["id"].filter(seen).to_list(),
            remedy=f"{_REMAKE}, or take these rows out of the training files",
        )


def assert_apart(train_only: pl.DataFrame, folded: pl.DataFrame, task: Task, near: float | None) -> None:
    """Do nothing if rows that are trained on in every fold share no id and no (near) prompt with rows of any fold.

    Raises:
        LeakError: with the ids of the train-only rows that do.
    """
    known = train_only["id"].is_in(folded["id"].to_list())
    seen = known | near_overlap(train_only, folded, task, near)
    if seen.any():
        nearly = "" if near is None else f", or have nearly the same prompt (folds.near={near})"
        raise LeakError(
            f"{seen.sum():,} of {len(train_only):,} rows that are train_only share their id or prompt with a row that "
            f"a fold holds out{nearly}",
            rows=train_only["id"].filter(seen).to_list(),
            remedy="give their source exclude_overlap: [the other files of data.train], and an id_prefix where ids are "
            "equal; `pairclf pseudo` leaves such rows out by itself",
        )


def report(folds: pl.DataFrame, frame: pl.DataFrame, task: Task) -> Group:
    """Two tables: a line a fold, with its rows, prompts, groups and share of each class; and how large groups are.

    Rows of the frame that the folds don't hold are those that are trained on in every fold.
    """
    rows = frame.select("id", "target", normalised_prompts(frame, task))
    others = rows.join(folds, on="id", how="anti").with_columns(group="id")
    rows = folds.join(rows, on="id", how="left", maintain_order="left")
    made = table("Folds", "fold", "rows", "prompts", "groups", "largest group", *task.classes)
    parts = [(key[0], part) for key, part in rows.sort("fold").group_by("fold", maintain_order=True)]
    for name, part in [*parts, ("all", rows), *([("train only", others)] if len(others) else [])]:
        shares = np.mean(part["target"].to_list(), axis=0)
        label = "set aside" if name == _SET_ASIDE else str(name)
        made.add_row(label, *_counts(part), *(f"{share:.1%}" for share in shares))
    return Group(made, "", _group_sizes(rows))


def _counts(rows: pl.DataFrame) -> list[str]:
    prompts = rows["prompt"].filter(rows["prompt"] != "").n_unique()
    largest = max(rows["group"].value_counts()["count"])
    return [f"{count:,}" for count in (len(rows), prompts, rows["group"].n_unique(), largest)]


def _group_sizes(rows: pl.DataFrame) -> Table:
    groups = rows.group_by("group").agg(rows=pl.len(), prompts=pl.col("prompt").n_unique())
    joined = groups.filter(pl.col("prompts") > 1)
    made = table("Groups of (nearly) equal prompts", "", "")
    made.show_header = False
    for name, count in (
        ("groups of one row", (groups["rows"] == 1).sum()),
        ("groups of several rows", (groups["rows"] > 1).sum()),
        ("groups of several prompts that are nearly the same", len(joined)),
        ("prompts in these groups", joined["prompts"].sum()),
        ("rows without prompt text", (rows["prompt"] == "").sum()),
        ("rows set aside, near to prompts of several folds", (rows["fold"] == _SET_ASIDE).sum()),
    ):
        made.add_row(name, f"{count:,}")
    return made
