"""A run: its folder, its rows and folds, the split of a fold, and the assertion that no prompt is on both sides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import polars as pl
from rich.console import Group

from pairclf.config import Config
from pairclf.console import console
from pairclf.data.audit import ACROSS_ROWS, Finding, clean, exclude_overlap, note_changes
from pairclf.data.folds import assert_apart, assert_no_leak, make_folds, read_folds, report, write_folds
from pairclf.data.rows import read_rows, scan_rows
from pairclf.errors import ConfigError, DataError
from pairclf.files import locked
from pairclf.inputs.cache import Frames

FOLDS, OOF, OOF_AB, OOF_LOGITS = "folds.csv", "oof.parquet", "oof-ab.parquet", "oof-logits.parquet"
BUNDLE = "bundle"


@dataclass(frozen=True, slots=True)
class Paths:
    """The folders of a run: `output/fold0/...`, or `output/all/...` if nothing is held out."""

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
        ConfigError: `output_dir` is not set, and there is no config file to derive it from.
    """
    if config.output_dir is None:
        raise ConfigError(
            "output_dir is not set, and there is no config file to derive it from", remedy="set output_dir=FOLDER"
        )
    return config.output_dir


def bundles_of(config: Config) -> list[Path]:
    """The bundles of the run's folds, in order; without folds, the bundle that was trained on all rows.

    Raises:
        ConfigError: there is none.
    """
    output = output_of(config)
    folds = [path for fold in range(config.folds.n_splits) if (path := Paths(output, fold).bundle).is_dir()]
    bundles = folds or [path for path in [Paths(output, None).bundle] if path.is_dir()]
    if not bundles:
        raise ConfigError(f"{output} holds no bundle", remedy="run `pairclf cv CONFIG` or `pairclf train CONFIG` first")
    return bundles


def labelled_rows(config: Config) -> pl.DataFrame:
    """The canonical table of `data.train`, without `exclude_overlap` rows, cleaned by `data.rules`.

    Raises:
        ConfigError: `data.train` is empty.
        DataError: as `read_rows` and `clean`; or no row is left.
    """
    data, task = config.data, config.task
    if not data.train:
        raise ConfigError("data.train names no file", remedy="e.g. data.train=[train.csv]")
    frame = read_rows(data.sources, task, labelled=True, max_rows=data.max_rows)
    if (
        len(frame) == data.max_rows
        and any(source.train_only for source in data.train)
        and not frame["train_only"].any()
    ):
        console.print(f"note: data.max_rows={data.max_rows} leaves no room for train_only rows, which are read last")
    frame, excluded = exclude_overlap(frame, data.sources, task, config.folds.near_duplicate_threshold)
    frame, findings = clean(frame, task, data.rules, labelled=True)
    note_changes([*excluded, *findings])
    if frame.is_empty():
        raise DataError("no row of data.train is left", remedy="look at data.rules and at exclude_overlap")
    return frame


def folds_of(config: Config, frame: pl.DataFrame, *, renew: bool = False) -> pl.DataFrame:
    """The run's folds: read from folds.csv if it exists, otherwise made and written.

    Rows that are train_only have no fold and do not influence the folds of others.

    Raises:
        DataError: the file does not cover these rows, or holds another number of folds than `folds.n_splits`.
    """
    path, settings = output_of(config) / FOLDS, config.folds
    frame = frame.filter(~pl.col("train_only"))
    with locked(path.with_name(f".{FOLDS}.lock")):  # several folds may be started at once
        if path.exists() and not renew:
            return read_folds(path, frame, n=settings.n_splits)
        folds = make_folds(
            frame,
            config.task,
            n=settings.n_splits,
            seed=config.seed,
            near=settings.near_duplicate_threshold,
            stable=settings.stable,
        )
        write_folds(path, folds)
    return folds


def remake_folds(config: Config) -> Group:
    """Replace the run's folds, and report on the new ones."""
    frame = labelled_rows(config)
    return report(folds_of(config, frame, renew=True), frame, config.task)


class Split(NamedTuple):
    """Training rows and held-out rows; `held_out` is None if all rows are training rows."""

    training: pl.DataFrame
    held_out: pl.DataFrame | None


class Run:
    """A run's rows and folds, read once per command.

    Args:
        config: the resolved config.
        frame: the rows, if they were read before.
    """

    def __init__(self, config: Config, frame: pl.DataFrame | None = None) -> None:
        self.config = config
        self._frame = frame
        self._proven: set[int] = set()

    @cached_property
    def frame(self) -> pl.DataFrame:
        """As `labelled_rows`."""
        return labelled_rows(self.config) if self._frame is None else self._frame

    @cached_property
    def folds(self) -> pl.DataFrame:
        """As `folds_of`."""
        return folds_of(self.config, self.frame)

    def prove(self, folds: Sequence[int]) -> None:
        """Assert, in one pass over all prompts, that the two sides of each fold share no prompt and no near prompt.

        Raises:
            ConfigError: there is no such fold.
            LeakError: a prompt is on both sides, exactly or nearly; train_only rows are compared with all folds.
        """
        settings, task = self.config.folds, self.config.task
        if unknown := [fold for fold in folds if not 0 <= fold < settings.n_splits]:
            raise ConfigError(
                f"fold {unknown[0]} does not exist: folds are counted from 0 and folds.n_splits={settings.n_splits}"
            )
        if self._proven.issuperset(folds):
            return
        assert_no_leak(self.frame, self.folds, folds, task, settings.near_duplicate_threshold)
        train_only = self.frame.filter("train_only")
        if len(train_only):
            assert_apart(train_only, self.frame.filter(~pl.col("train_only")), task, settings.near_duplicate_threshold)
        self._proven.update(folds)

    def split(self, fold: int | None) -> Split:
        """Training rows and held-out rows, proven to share no prompt.

        Rows that are set aside (fold -1) are on neither side; train_only rows are training rows of every fold. If fold
        is None, all rows are training rows.

        Raises:
            ConfigError, LeakError: as `prove`.
        """
        if fold is None:
            return Split(self.frame, None)
        self.prove([fold])
        return Split(*self.sides(fold))

    def sides(self, fold: int) -> tuple[pl.DataFrame, pl.DataFrame]:
        """Like `split`, without the leak check."""
        return sides(self.frame, self.folds, fold)


def sides(frame: pl.DataFrame, folds: pl.DataFrame, fold: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Training rows and held-out rows of a fold, without the leak check."""
    joined = frame.join(folds.select("id", "fold"), on="id", how="left", maintain_order="left")
    others = (pl.col("fold") >= 0) & (pl.col("fold") != fold)
    held_out = joined.filter(pl.col("fold") == fold).drop("fold")
    return joined.filter(others | pl.col("train_only")).drop("fold"), held_out


def chunks_of(config: Config, data: Path | None) -> Frames:
    """The rows of `data.train` as `train` reads them, or of an unlabelled file as `predict` reads them, in chunks.

    Only one chunk is in memory, unless a rule or `exclude_overlap` compares rows.
    """
    if data:
        return unlabelled(config, data)
    task, rules = config.task, config.data.rules
    together = any(getattr(rules, rule) in ("fix", "drop") for rule in ACROSS_ROWS)
    if together or any(source.exclude_overlap for source in config.data.sources):
        return labelled_rows(config).iter_slices
    return lambda: (
        clean(chunk, task, rules, labelled=True)[0]
        for chunk in scan_rows(config.data.sources, task, labelled=True, max_rows=config.data.max_rows)
    )


def unlabelled(config: Config, data: Path, note: Callable[[list[Finding]], None] = lambda findings: None) -> Frames:
    """The rows of a test file, repaired by `data.rules`, in chunks; `note` receives the findings of each chunk."""
    task, rules = config.task, config.data.rules
    # Repeated ids can only be fixed with the whole file in memory; without `fix`, later checks find them.
    whole = rules.duplicate_id == "fix"

    def frames() -> Iterator[pl.DataFrame]:
        for chunk in [read_rows([data], task, labelled=False)] if whole else scan_rows([data], task, labelled=False):
            frame, findings = clean(chunk, task, rules, labelled=False)
            note(findings)
            yield frame

    return frames
