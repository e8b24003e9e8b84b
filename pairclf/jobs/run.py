"""A run: its folder, its rows, its folds, and the assertion that nothing leaks from one side to the other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import polars as pl

from pairclf.config import Config
from pairclf.console import console
from pairclf.data.audit import clean, exclude_overlap, note_changes
from pairclf.data.folds import assert_apart, assert_no_leak, make_folds, read_folds, write_folds
from pairclf.data.tables import read_rows
from pairclf.errors import ConfigError, DataError
from pairclf.files import locked

FOLDS, OOF, OOF_AB, OOF_LOGITS = "folds.csv", "oof.parquet", "oof-ab.parquet", "oof-logits.parquet"
BUNDLE = "bundle"


@dataclass(frozen=True, slots=True)
class Paths:
    """Where a run keeps what: `output/fold0/...`, or `output/all/...` where nothing is held out."""

    output: Path
    fold: int | None

    @property
    def folder(self) -> Path:
        return self.output / ("all" if self.fold is None else f"fold{self.fold}")

    @property
    def bundle(self) -> Path:
        return self.folder / BUNDLE


def output_of(config: Config) -> Path:
    """The run folder.

    Raises:
        ConfigError: the config was made without a file and names none.
    """
    if config.output is None:
        raise ConfigError(
            "output is not set, and there is no config file to derive it from", remedy="set output=FOLDER"
        )
    return config.output


def bundles_of(config: Config) -> list[Path]:
    """The bundles of the run's folds, in their order; where there are none, the one that was trained on all rows.

    Raises:
        ConfigError: there is none.
    """
    output = output_of(config)
    folds = [path for fold in range(config.folds.n) if (path := Paths(output, fold).bundle).is_dir()]
    found = folds or [path for path in [Paths(output, None).bundle] if path.is_dir()]
    if not found:
        raise ConfigError(f"{output} holds no bundle", remedy="run `pairclf cv CONFIG` or `pairclf train CONFIG` first")
    return found


def labelled_rows(config: Config) -> pl.DataFrame:
    """The canonical table of `data.train`, less what must stay unseen, cleaned as `data.rules` says.

    Raises:
        ConfigError: `data.train` is empty.
        DataError: as `read_rows` and `clean`; or no row is left.
    """
    data, task = config.data, config.task
    if not data.train:
        raise ConfigError("data.train names no file", remedy="e.g. data.train=[train.csv]")
    frame = read_rows(data.sources, task, labelled=True, max_rows=data.max_rows)
    if len(frame) == data.max_rows and any(one.train_only for one in data.train) and not frame["train_only"].any():
        console.print(f"note: data.max_rows={data.max_rows} leaves no room for train_only rows, which are read last")
    frame, excluded = exclude_overlap(frame, data.sources, task, config.folds.near)
    frame, findings = clean(frame, task, data.rules, labelled=True)
    note_changes([*excluded, *findings])
    if frame.is_empty():
        raise DataError("no row of data.train is left", remedy="look at data.rules and at exclude_overlap")
    return frame


def folds_of(config: Config, frame: pl.DataFrame, *, renew: bool = False) -> pl.DataFrame:
    """The run's folds: read if they were made before (and fit the rows), else made and written.

    Rows that are train_only have no fold and no part in making them: the folds are the same with and without them.

    Raises:
        DataError: the file does not cover these rows, or holds another number of folds than `folds.n`.
    """
    path, settings = output_of(config) / FOLDS, config.folds
    frame = frame.filter(~pl.col("train_only"))
    with locked(path.with_name(f".{FOLDS}.lock")):  # several folds may be started at once
        if path.exists() and not renew:
            return read_folds(path, frame, n=settings.n)
        made = make_folds(
            frame, config.task, n=settings.n, seed=config.seed, near=settings.near, stable=settings.stable
        )
        write_folds(path, made)
    return made


def split(config: Config, frame: pl.DataFrame, fold: int | None) -> tuple[pl.DataFrame, pl.DataFrame | None]:
    """Training rows and held-out rows; it is asserted that they share no prompt, nor have nearly equal ones.

    Rows that the folds set aside (fold -1) are on neither side; those that are train_only are trained on in every fold.
    Without a fold, all rows are trained on.

    Raises:
        ConfigError: there is no such fold.
        LeakError: a prompt stands on both sides, or nearly so; for train_only rows, whichever fold is held out, so that
            it shows at the first one.
    """
    if fold is None:
        return frame, None
    if not 0 <= fold < config.folds.n:
        raise ConfigError(f"fold {fold} does not exist: folds are counted from 0 and folds.n={config.folds.n}")
    training, held_out = sides(frame, folds_of(config, frame), fold)
    folded = training.filter(~pl.col("train_only"))
    assert_no_leak(folded, held_out, config.task, config.folds.near)
    train_only = frame.filter("train_only")
    if len(train_only):
        assert_apart(train_only, frame.filter(~pl.col("train_only")), config.task, config.folds.near)
    return training, held_out


def sides(frame: pl.DataFrame, folds: pl.DataFrame, fold: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Training rows and held-out rows of a fold, as `split` has them, whether or not they share a prompt."""
    joined = frame.join(folds.select("id", "fold"), on="id", how="left", maintain_order="left")
    others = (pl.col("fold") >= 0) & (pl.col("fold") != fold)
    held_out = joined.filter(pl.col("fold") == fold).drop("fold")
    return joined.filter(others | pl.col("train_only")).drop("fold"), held_out
