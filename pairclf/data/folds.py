"""Folds: group rows with equal or near prompts, stratify, read and write folds.csv, and assert that no prompt leaks.

Two ways lead there. Stratified folds (the default) see all rows at once: prompts that are near to each other, over
however many steps, are one group, and the groups are dealt so that classes are balanced. Stable folds see a row and
those before it: a row's fold never changes when rows are appended.

What equal and nearly equal mean stands in `duplicates`. Rows without any prompt text have nothing in common: each is a
group of its own.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from polars.exceptions import PolarsError
from rich.console import Group
from rich.table import Table

from pairclf.console import counted, table
from pairclf.data.csv_syntax import check_csv
from pairclf.data.duplicates import NearIndex, Places, clusters, near_overlap, normalised_prompts, normalised_texts
from pairclf.data.rows import targets_of
from pairclf.errors import DataError, LeakError
from pairclf.files import atomic_file
from pairclf.task import Task

_COLUMNS = ["id", "fold", "group"]
_SET_ASIDE = -1
_FEWER = "lower folds.n_splits, or read more rows (data.max_rows)"
_REMAKE = "make the folds anew with `pairclf folds`; for a trial with other rows (data.max_rows), set output_dir=FOLDER"


def prompt_groups(frame: pl.DataFrame, task: Task, near: float | None = None) -> pl.Series:
    """Group keys `(N,)`: a hash of the group's first normalised prompt, or `row:ID` for a row without prompt text.

    Args:
        frame: canonical table; rows with the same value of its column `group` are in one group.
        task: names the fields that make a prompt.
        near: groups are joined over prompts that are at least so alike; None: over equal ones alone.
    """
    prompts = normalised_prompts(frame, task)
    distinct = _distinct(prompts)
    groups = _of_rows(frame["id"], prompts, distinct, _keys(distinct)[clusters(distinct, near)])
    return groups if frame["group"].is_null().all() else _joined(groups, frame["group"])


def _joined(groups: pl.Series, others: pl.Series) -> pl.Series:
    """Groups `(N,)`, joined where rows share a value of `others`; a joined group has the key of its first row."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    rows = others.is_not_null().arg_true()
    names, own = np.unique(groups.to_numpy(), return_inverse=True)
    values, other = np.unique(others.gather(rows).to_numpy(), return_inverse=True)
    edges = np.ones(len(rows)), (own[rows.to_numpy()], len(names) + other)
    nodes = len(names) + len(values)
    _, component = connected_components(coo_array(edges, shape=(nodes, nodes)), directed=False)
    frame = pl.DataFrame([groups, pl.Series("component", component[own])])
    return frame.select(pl.col("group").first().over("component")).to_series()


def _distinct(prompts: pl.Series) -> list[str]:
    return prompts.filter(prompts != "").unique(maintain_order=True).to_list()


def _keys(distinct: list[str]) -> NDArray[np.object_]:
    return np.array([hashlib.sha256(prompt.encode()).hexdigest()[:16] for prompt in distinct], dtype=np.object_)


def _of_rows(ids: pl.Series, prompts: pl.Series, distinct: list[str], groups: NDArray[np.object_]) -> pl.Series:
    """The group of each row `(N,)`, from the groups of the distinct prompts."""
    by_row = prompts.replace_strict(distinct, groups.tolist(), default=None, return_dtype=pl.String)
    return by_row.fill_null("row:" + ids).alias("group")


def prompt_hashes(frame: pl.DataFrame, task: Task) -> pl.Series:
    """Hashes `(N,)` of the normalised prompts, UInt64, named `prompt`: the same on every machine and in every run.

    A row without prompt text is hashed by all its texts, in any order.
    """
    prompts = normalised_prompts(frame, task)
    blank = prompts == ""
    if blank.any():
        joined = [frame[name].filter(blank).list.join("\n").fill_null("") for name in task.fields]
        texts = [normalised_texts(column).to_list() for column in joined]
        whole = ["\0".join(["", *sorted(row)]) for row in zip(*texts, strict=True)]  # \0: no prompt holds one
        prompts = prompts.scatter(blank.arg_true(), whole)
    return pl.Series("prompt", [text_hash(prompt) for prompt in prompts], dtype=pl.UInt64)


def folds_of_groups(groups: pl.Series, n: int) -> NDArray[np.int64]:
    """`(N,)`: one of `n` folds for each row, by the hash of its group alone."""
    of_group = {group: text_hash(group) % n for group in groups.unique()}
    return np.array([of_group[group] for group in groups], dtype=np.int64)


def text_hash(text: str) -> int:
    """64 bits of a text's SHA-256."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def make_folds(frame: pl.DataFrame, task: Task, *, n: int, seed: int, near: float | None, stable: bool) -> pl.DataFrame:
    """Assign every row to one of `n` folds, no prompt in two.

    Args:
        frame: canonical table, labelled.
        task: what is judged; `strata` are balanced.
        n: number of folds, from 2 up.
        seed: the same rows in the same order with the same seed give the same folds.
        near: prompts at least so alike (Jaccard index of their character 5-grams) share a fold; None: equal ones. So do
            rows with the same value of the column `group`, which stable folds do not look at.
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
        fold = _stratify(strata(frame, task), groups.to_numpy(), n, seed)
    empty = sorted(set(range(n)) - set(fold.tolist()))
    if empty:
        raise DataError(f"folds {empty} of {n} stay empty", remedy=_FEWER)
    return pl.DataFrame([frame["id"], pl.Series("fold", fold, dtype=pl.Int64), groups])


def _check_enough(groups: pl.Series, n: int) -> None:
    if groups.n_unique() < n:
        raise DataError(
            f"{counted(groups.n_unique(), 'different prompt')} can't fill {n} folds; rows with (nearly) the "
            "same prompt, or the same folds.group, stay together",
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


def strata(frame: pl.DataFrame, task: Task) -> Places:
    """The class `(N,)` by which rows are balanced: the likeliest; of several labels the row's rarest, -1 for none."""
    targets = targets_of(frame)
    if not task.multi_label:
        return np.asarray(targets.argmax(axis=1))
    held = targets > 0.5
    rarest_first = held.sum(axis=0).argsort(kind="stable")
    return np.where(held.any(axis=1), rarest_first[held[:, rarest_first].argmax(axis=1)], -1)


def draw_rows(frame: pl.DataFrame, task: Task, count: int, seed: int) -> pl.DataFrame:
    """A sample of `count` rows, in their order, with the shares of the `strata`, apart for train_only rows.

    A larger sample with the same seed contains a smaller one.
    """
    keys = pl.DataFrame({"stratum": strata(frame, task), "train_only": frame["train_only"]})
    order = np.random.default_rng(seed).permutation(len(frame))
    rank = pl.int_range(pl.len()).over("stratum", "train_only")
    share = pl.len().over("stratum", "train_only")
    at = keys[order].select(((rank + 0.5) / share).alias("at"), pl.Series("row", order)).sort("at", maintain_order=True)
    return frame[at["row"].head(count).sort()]


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
            raise DataError(f"{counted(len(classes), 'row')} can't fill {n} folds: {error}", remedy=_FEWER) from error
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


def assert_no_leak(
    frame: pl.DataFrame, folds: pl.DataFrame, held_out: Sequence[int], task: Task, near: float | None
) -> None:
    """Do nothing if no row of these folds shares its id with a row outside of its fold, nor has (nearly) its prompt.

    All folds are proven in one pass over the prompts; one that is not asked about may share with others.

    Args:
        frame: canonical table; rows without a fold (train_only) and those set aside (fold -1) are left out.
        folds: `id`, `fold`.
        held_out: the folds asked about.
        task: names the fields that make a prompt.
        near: prompts at least so alike are a leak; None: equal ones alone. So are equal values of the column `group`.

    Raises:
        LeakError: with the ids of rows of these folds that do.
    """
    rows = frame.filter(~pl.col("train_only")).join(folds.select("id", "fold"), on="id", how="left")
    rows = rows.filter(pl.col("fold") >= 0)
    sides = rows.select(
        "id",
        "group",
        normalised_prompts(rows, task).alias("prompt"),
        side=pl.when(pl.col("fold").is_in(list(held_out))).then("fold").otherwise(-1),
    )
    shares = pl.col("side").n_unique() > 1
    alike = (shares.over("prompt") & (pl.col("prompt") != "")) | (shares.over("group") & pl.col("group").is_not_null())
    seen = sides.select(shares.over("id") | alike).to_series()
    if near is not None:
        seen = seen | sides["prompt"].is_in(_near_other_sides(sides, near))
    seen = seen & (sides["side"] >= 0)
    if seen.any():
        raise LeakError(
            f"{seen.sum():,} of {(sides['side'] >= 0).sum():,} held-out rows share their {_shared(rows)} with a "
            f"training row{_nearly(near)}",
            rows=sides["id"].filter(seen).to_list(),
            remedy=f"{_REMAKE}, or take these rows out of the training files",
        )


def _shared(rows: pl.DataFrame) -> str:
    """What two sides may not share, in words."""
    return "id or prompt" if rows["group"].is_null().all() else "id, prompt or folds.group"


def _nearly(near: float | None) -> str:
    return "" if near is None else f", or have nearly the same prompt (folds.near_duplicate_threshold={near})"


def _near_other_sides(sides: pl.DataFrame, near: float) -> list[str]:
    """Prompts that are near to an earlier prompt of another side; sides that need no check come first."""
    prompts = (
        sides.filter(pl.col("prompt") != "").sort("side", maintain_order=True).unique("prompt", maintain_order=True)
    )
    own = prompts["side"].to_numpy() + 1  # labels below 0 would not be considered
    neighbours = NearIndex.of(prompts["prompt"].to_list(), near).walk(own)
    return [prompts["prompt"][place] for place, met in neighbours if (own[met] != own[place]).any()]


def assert_apart(train_only: pl.DataFrame, folded: pl.DataFrame, task: Task, near: float | None) -> None:
    """Refuse train-only rows that share an id, a (near) prompt or a group with a row of any fold.

    Raises:
        LeakError: with the ids of these train-only rows.
    """
    same_id = train_only["id"].is_in(folded["id"].to_list())
    seen = same_id | same_group(train_only, folded) | near_overlap(train_only, folded, task, near)
    if seen.any():
        raise LeakError(
            f"{seen.sum():,} of {len(train_only):,} rows that are train_only share their {_shared(folded)} with a row "
            f"that a fold holds out{_nearly(near)}",
            rows=train_only["id"].filter(seen).to_list(),
            remedy="give their source exclude_overlap: [the other files of data.train], and an id_prefix where ids are "
            "equal; `pairclf pseudo` leaves such rows out by itself",
        )


def same_group(rows: pl.DataFrame, others: pl.DataFrame) -> pl.Series:
    """Mask `(N,)` of the rows whose value of the column `group` is also that of one of `others`."""
    return rows["group"].is_in(others["group"].drop_nulls().to_list()).fill_null(value=False)


def report(folds: pl.DataFrame, frame: pl.DataFrame, task: Task) -> Group:
    """Three tables: the rows, prompts and groups of each fold; its class shares; and the sizes of groups.

    Rows of the frame that are not in the folds are train-only rows.
    """
    rows = frame.select("id", "target", normalised_prompts(frame, task))
    others = rows.join(folds, on="id", how="anti").with_columns(group="id")
    rows = folds.join(rows, on="id", how="left", maintain_order="left")
    by_fold = rows.sort("fold").group_by("fold", maintain_order=True)
    parts = {"set aside" if key[0] == _SET_ASIDE else str(key[0]): part for key, part in by_fold}
    parts |= {"all": rows} | ({"train only": others} if len(others) else {})
    folds_table = table("Folds", "fold", "rows", "prompts", "groups", "largest group")
    for label, part in parts.items():
        folds_table.add_row(label, *_counts(part))
    shares_table = table("Shares of the classes", "fold", *parts)  # classes are many, or have long names: a line each
    shares = np.stack([targets_of(part).mean(axis=0) for part in parts.values()], axis=1)
    for name, by_part in zip(task.classes, shares, strict=True):
        shares_table.add_row(name, *(f"{share:.1%}" for share in by_part))
    return Group(folds_table, "", shares_table, "", _group_sizes(rows))


def _counts(rows: pl.DataFrame) -> list[str]:
    prompts = rows["prompt"].filter(rows["prompt"] != "").n_unique()
    largest = max(rows["group"].value_counts()["count"])
    return [f"{count:,}" for count in (len(rows), prompts, rows["group"].n_unique(), largest)]


def _group_sizes(rows: pl.DataFrame) -> Table:
    groups = rows.group_by("group").agg(rows=pl.len(), prompts=pl.col("prompt").n_unique())
    joined = groups.filter(pl.col("prompts") > 1)
    sizes_table = table("Groups", "", "")
    sizes_table.show_header = False
    for name, count in (
        ("groups of one row", (groups["rows"] == 1).sum()),
        ("groups of several rows", (groups["rows"] > 1).sum()),
        ("groups of several prompts, nearly the same or of one folds.group", len(joined)),
        ("prompts in these groups", joined["prompts"].sum()),
        ("rows without prompt text", (rows["prompt"] == "").sum()),
        ("rows set aside, near to prompts of several folds", (rows["fold"] == _SET_ASIDE).sum()),
    ):
        sizes_table.add_row(name, f"{count:,}")
    return sizes_table
