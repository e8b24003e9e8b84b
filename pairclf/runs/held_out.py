"""Runs side by side: the held-out scores of several runs, or of files of scores, on the same labelled rows.

Everything is joined on the rows' ids, and classes are matched by their names. Scores of other rows, and of models that
were trained on the rows, are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from pairclf.config import Config, deciding_settings, load_config, parse_yaml
from pairclf.console import counted
from pairclf.data.folds import prompt_groups
from pairclf.data.identity import refuse_other_rows
from pairclf.data.scores import HASHES
from pairclf.errors import ConfigError, DataError, LeakError
from pairclf.own_files import or_shipped
from pairclf.run import FOLDS, TRAINED, Paths, check_folds, labelled_rows, output_of, refuse_mixed_folds, trained_as
from pairclf.runs.evaluate import out_of_fold, scored
from pairclf.scores.metrics import Floats, likeliest
from pairclf.scores.orders import two_orders
from pairclf.scores.probabilities import Calibration
from pairclf.task import Task

CONFIG = "config.yaml"
SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True, slots=True, eq=False)
class ScoredRun:
    """A run, or a file of scores, on the common rows.

    Attributes:
        name: unique among the runs.
        path: what was given.
        probabilities: `(N, C)`, rows summing to one unless the task has several labels.
        flips: `(N,)`, whether the likeliest class of both orders differs; None: unknown, or there is one order.
        config: of the run; None: it is a file of scores.
        trained: what `trained.json` says of each trained fold.
        first_order: `(N, C)`, probabilities of order AB alone; None: unknown, or there is one order.
    """

    name: str
    path: Path
    probabilities: Floats
    flips: NDArray[np.bool_] | None
    config: Config | None
    trained: Mapping[int, Mapping[str, Any]]
    first_order: Floats | None = None

    @property
    def bundles(self) -> list[Path]:
        """The bundles of its folds; without any, the one of all rows."""
        if self.config is None:
            return []
        folds = [*range(self.config.folds.n_splits), None]
        folders = [path for fold in folds if (path := Paths(output_of(self.config), fold).bundle).is_dir()]
        return folders[:-1] if len(folders) > 1 and folders[-1].parent.name == "all" else folders


@dataclass(frozen=True, slots=True, eq=False)
class CommonRows:
    """The rows that all runs have scored, and the runs.

    Attributes:
        config: of the run whose labels are used.
        frame: canonical table of the rows.
        labelled: canonical table of all labelled rows.
        ids: `N` ids.
        targets: `(N, C)`.
        weights: `(N,)`.
        groups: `(N,)`, equal for rows with one prompt.
        folds: `(N,)`, from folds.csv; None: there is none.
        hashes: as `identity.row_hashes`.
        runs: in the order given.
    """

    config: Config
    frame: pl.DataFrame
    labelled: pl.DataFrame
    ids: list[str]
    targets: Floats
    weights: Floats
    groups: NDArray[np.str_]
    folds: NDArray[np.int64] | None
    hashes: pl.DataFrame
    runs: list[ScoredRun]

    @property
    def task(self) -> Task:
        return self.config.task


def open_runs(
    paths: Sequence[Path], labels: Path | None = None, *, folds: Sequence[int] = (), common: bool = False
) -> CommonRows:
    """Read the held-out scores of runs, and join them with the labels.

    Args:
        paths: run folders, config files of runs, or files of scores (CSV, parquet) with ids and a column per class.
        labels: config file whose `data.train` has the labels; None: that of the first run.
        folds: folds whose rows are used; empty: all that were scored.
        common: use the rows that all have scored, instead of refusing runs with other rows.

    Raises:
        ConfigError: there is no such path or no config, a run is given twice, or tasks have different classes.
        DataError: scores can't be used, are of other rows, or the runs have scored different rows.
        LeakError: a model was trained on rows that it scored.
    """
    if len({path.resolve() for path in paths}) < len(paths):
        raise ConfigError("a run is given twice", remedy="give each run once")
    if missing := [str(path) for path in paths if not or_shipped(path).exists()]:
        raise ConfigError(f"there is no {', '.join(missing)}", remedy="give run folders, configs or files of scores")
    configs = [config_of_run(path) for path in paths]
    config = load_config(labels) if labels is not None else next((own for own in configs if own is not None), None)
    if config is None:
        raise ConfigError(
            "files of scores alone don't say which labels they belong to",
            remedy="give --config CONFIG, whose data.train has the labels",
        )
    trained = [{} if own is None else _trained_folds(own, folds) for own in configs]
    read = [_read(*run, config.task) for run in zip(paths, configs, trained, strict=True)]
    labelled = labelled_rows(config)
    joined = labelled.join(_folds_of(config), on="id", how="left", maintain_order="left")
    ids = _common_ids(paths, [part.rows["id"] for part in read], _of_folds(joined, folds), common)
    _refuse_unlabelled(paths[0], ids, labelled)
    rows = pl.DataFrame({"id": ids}).join(joined, on="id", how="left", maintain_order="left")
    _refuse_mixed_rows(paths, read, rows, config.task)
    places = [positions(ids, part.rows["id"]) for part in read]
    runs = [
        ScoredRun(
            name=name,
            path=path,
            probabilities=part.probabilities[at],
            first_order=None if part.first_order is None else part.first_order[at],
            flips=None if part.flips is None else part.flips[at],
            config=own,
            trained=records,
        )
        for name, path, own, records, part, at in zip(_names(paths), paths, configs, trained, read, places, strict=True)
    ]
    return CommonRows(
        config=config,
        frame=rows,
        labelled=labelled,
        ids=ids,
        targets=np.array(rows["target"].to_list(), dtype=np.float64),
        weights=rows["weight"].to_numpy().astype(np.float64),
        groups=_groups_of(rows, config).to_numpy().astype(np.str_),
        folds=None if rows["fold"].is_null().any() else rows["fold"].to_numpy().astype(np.int64),
        hashes=read[0].rows.select(*HASHES)[places[0]],
        runs=runs,
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Read:
    """Scores as they were read, with the columns of the common task: `id`, `HASHES`; `(N, C)` as predicted, and of
    order AB alone; and flips."""

    rows: pl.DataFrame
    probabilities: Floats
    first_order: Floats | None
    flips: NDArray[np.bool_] | None


def is_ensemble(path: Path) -> bool:
    """Whether it is an ensemble's file."""
    if path.suffix not in SUFFIXES or not path.is_file():
        return False
    tree = parse_yaml(path.read_text(encoding="utf-8", errors="replace"), path)
    return isinstance(tree, dict) and "members" in tree


def config_of_run(path: Path) -> Config | None:
    """The config of a run, from its file or as its folds keep it; None: a file of scores.

    Raises:
        ConfigError: it can't be read, a folder holds no finished training, or it is an ensemble's file.
    """
    if is_ensemble(path):
        raise ConfigError(
            f"{path} is an ensemble's file, and no run: its weights were fitted to the rows that would judge it",
            remedy="give the runs that it averages, or the file that `pairclf blend RUN... --scores FILE` writes",
        )
    if path.suffix in SUFFIXES and not path.is_dir():
        return load_config(path)
    if not path.is_dir():
        return None
    kept = sorted(path.glob(f"*/{TRAINED}"))
    if not kept or not (kept[0].parent / CONFIG).is_file():
        raise ConfigError(
            f"{path} holds no finished training",
            remedy="give a run's folder, its config file, or a file of scores; `pairclf runs` lists the runs",
        )
    return load_config(kept[0].parent / CONFIG).model_copy(update={"output_dir": path})


def _trained_folds(config: Config, folds: Sequence[int]) -> dict[int, dict[str, Any]]:
    """What `trained.json` says, by fold, of folds that were trained with the same settings."""
    check_folds(config, folds)
    output, keys = output_of(config), deciding_settings(config).keys()
    records = {fold: trained_as(Paths(output, fold)) for fold in folds or range(config.folds.n_splits)}
    records = {fold: record for fold, record in records.items() if record}
    if missing := sorted({*folds} - {*records}):
        raise ConfigError(f"{output} has no finished training of fold {missing[0]}", remedy="train it, or leave it out")
    refuse_mixed_folds(output, {fold: {key: record.get(key) for key in keys} for fold, record in records.items()})
    return records


def _read(path: Path, config: Config | None, trained: Mapping[int, object], task: Task) -> _Read:
    """The held-out scores of a run or of a file, in the class order of the common task."""
    own = task if config is None else config.task
    if {*own.classes} != {*task.classes} or own.multi_label != task.multi_label:
        raise ConfigError(
            f"{path} has the classes {', '.join(own.classes)}, and others have {', '.join(task.classes)}",
            remedy="compare runs of one task",
        )
    read = scored(path, task) if config is None else out_of_fold(output_of(config), own, config.predict, [*trained])
    if read.seen:
        raise LeakError(
            f"models were trained on the prompts of {counted(read.seen, 'row')} that they scored",
            where=read.where,
            remedy="give out-of-fold scores, as `pairclf cv` writes them; or leave rows whose `seen` is above 0 out of "
            "the file, and compare the rows that all have: --common",
        )
    calibration = Calibration(read.temperature)
    columns = [own.classes.index(name) for name in task.classes]
    values = read.at(calibration)[:, columns]
    if not task.multi_label:
        values = values / values.sum(axis=1, keepdims=True)
    first = flips = None
    if read.logits is not None:
        orders = two_orders(read.logits, own, calibration)
        first = orders.first[:, columns]
        flips = likeliest(orders.first) != likeliest(orders.second)
    return _Read(read.rows, values, first, flips)


def _folds_of(config: Config) -> pl.DataFrame:
    """`id`, `fold`, `group` of the run's folds.csv; without rows if there is none."""
    schema = {"id": pl.String, "fold": pl.Int64, "group": pl.String}
    path = output_of(config) / FOLDS
    return pl.read_csv(path, schema=schema, glob=False) if path.is_file() else pl.DataFrame(schema=schema)


def _of_folds(labelled: pl.DataFrame, folds: Sequence[int]) -> set[str] | None:
    """The ids of these folds; None: all rows."""
    return {*labelled.filter(pl.col("fold").is_in(list(folds)))["id"]} if folds else None


def _groups_of(rows: pl.DataFrame, config: Config) -> pl.Series:
    """Groups of folds.csv; rows with equal prompts, where it does not cover the rows."""
    if not rows["group_right"].is_null().any():
        return rows["group_right"]
    return prompt_groups(rows, config.task)


def _common_ids(
    paths: Sequence[Path], scored_ids: Sequence[pl.Series], chosen: set[str] | None, common: bool
) -> list[str]:
    """The ids that all have scored, in the order of the first.

    Raises:
        DataError: the runs have scored different rows and `common` is not set, or no row is left.
    """
    sets = [{*ids} if chosen is None else {*ids} & chosen for ids in scored_ids]
    for path, own in zip(paths[1:], sets[1:], strict=True):
        if not common and (own ^ sets[0]):
            missing, more = sets[0] - own, own - sets[0]
            raise DataError(
                f"{path} has scored {counted(len(own), 'row')} and {paths[0]} {len(sets[0]):,}: {len(missing):,} are "
                f"missing, {len(more):,} are in {path} alone",
                rows=sorted(missing or more),
                remedy="give runs of the same rows and folds (--fold N), or compare the rows that all have: --common",
            )
    shared = set.intersection(*sets)
    if not shared:
        raise DataError("the runs have no scored row in common", where=", ".join(map(str, paths)))
    return [row for row in scored_ids[0].to_list() if row in shared]


def _refuse_unlabelled(path: Path, ids: Sequence[str], labelled: pl.DataFrame) -> None:
    known = {*labelled.filter(pl.col("target").is_not_null())["id"]}
    if unknown := [row for row in ids if row not in known]:
        raise DataError(
            f"{counted(len(unknown), 'scored row has', 'scored rows have')} no label",
            where=path,
            rows=unknown,
            remedy="give --config CONFIG, whose data.train has the rows that were scored",
        )


def _refuse_mixed_rows(paths: Sequence[Path], read: Sequence[_Read], rows: pl.DataFrame, task: Task) -> None:
    """Refuse scores of rows with other texts. The texts are hashed once; other runs are compared with that one."""
    checked: pl.DataFrame | None = None
    for path, part in zip(paths, read, strict=True):
        own = part.rows.select("id", *HASHES).join(rows.select("id"), on="id", how="semi").sort("id")
        if checked is None or not own.equals(checked):
            refuse_other_rows(own, rows, task, path)
        checked = own


def positions(ids: Sequence[str], scored_ids: pl.Series) -> NDArray[np.int64]:
    """`(N,)`: where each id stands among those that were scored."""
    places = {row: place for place, row in enumerate(scored_ids)}
    return np.array([places[row] for row in ids], dtype=np.int64)


def _names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path without suffix, or the path where another has the same."""
    short = [path.stem if path.suffix and not path.is_dir() else path.resolve().name for path in paths]
    return [name if short.count(name) == 1 else str(path) for name, path in zip(short, paths, strict=True)]
