"""A run: its folder, its rows and folds, the split of a fold, and the assertion that no prompt is on both sides."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from rich.console import Group

from pairclf.bundles.base import resolve_base
from pairclf.bundles.bundle import Bundle
from pairclf.config import BY_BASE, SECTIONS, Config, deciding_settings, setting_changes, settings_before
from pairclf.console import console
from pairclf.data.audit import ACROSS_ROWS, Finding, clean, exclude_overlap, note_absent_classes, note_changes
from pairclf.data.folds import assert_apart, assert_no_leak, draw_rows, make_folds, read_folds, report, write_folds
from pairclf.data.formats import check_is_file, expand
from pairclf.data.identity import fingerprint
from pairclf.data.rows import read_rows, scan_rows, to_rows
from pairclf.data.teachers import with_soft_labels
from pairclf.errors import ConfigError, DataError, cut, quoted
from pairclf.files import MAX_JSON, locked, parsed, read_plain, write_text
from pairclf.inputs.cache import Frames
from pairclf.scores.figures import METRICS

FOLDS, OOF, OOF_AB, OOF_LOGITS = "folds.csv", "oof.parquet", "oof-ab.parquet", "oof-logits.parquet"
BUNDLE = "bundle"
TRAINED, LOG = "trained.json", "log.txt"
TRAINING = "training"
"""Key of `trained.json`: what is known of the training besides its identity, such as its duration."""
SCORED_ROWS, SCORED_SECONDS = "scored_rows", "scored_seconds"
"""Keys below `TRAINING`: held-out rows that were scored in all orders, and how long it took from their texts."""


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


def tokens_of(config: Config) -> Path:
    """The folder of a run's token caches."""
    return config.data.cache_dir or output_of(config) / "tokens"


def check_folds(config: Config, folds: Sequence[int]) -> None:
    """Raises `ConfigError` if a fold is named twice, or does not exist."""
    if len(set(folds)) < len(folds):
        raise ConfigError(f"folds {list(folds)} names a fold twice")
    if unknown := [fold for fold in folds if not 0 <= fold < config.folds.n_splits]:
        raise ConfigError(
            f"fold {unknown[0]} does not exist: folds are counted from 0 and folds.n_splits={config.folds.n_splits}"
        )


def variant_name(settings: Mapping[str, Any], names: Iterable[str]) -> str:
    """The name of a run folder for a variant of a run, from the settings that differ.

    >>> variant_name({"train.learning_rate": 5e-4, "seed": 1}, ["train.learning_rate", "seed"])
    'learning_rate-0.0005_seed-1'
    """
    text = "_".join(f"{name.rpartition('.')[2]}-{settings[name]}" for name in names)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)[:80].strip("-._")


def bundles_of(config: Config, folds: Sequence[int] = ()) -> list[Path]:
    """The bundles of these folds; without any, of all folds of the run that have one, or the one trained on all rows.

    Raises:
        ConfigError: there is none, or as `check_folds`.
    """
    check_folds(config, folds)
    output = output_of(config)
    if missing := [fold for fold in folds if not Paths(output, fold).bundle.is_dir()]:
        raise ConfigError(
            f"{Paths(output, missing[0]).bundle} does not exist",
            remedy=f"run `pairclf train CONFIG --fold {missing[0]}` first",
        )
    if folds:
        return [Paths(output, fold).bundle for fold in folds]
    trained = [path for fold in range(config.folds.n_splits) if (path := Paths(output, fold).bundle).is_dir()]
    bundles = trained or [path for path in [Paths(output, None).bundle] if path.is_dir()]
    if not bundles:
        raise ConfigError(f"{output} holds no bundle", remedy="run `pairclf cv CONFIG` or `pairclf train CONFIG` first")
    return bundles


def bundles_in(folder: Path) -> list[Path]:
    """The bundles of a run's folder, by fold, or the one trained on all rows; the folder itself if it is no run's."""
    by_fold = sorted(folder.glob(f"fold*/{BUNDLE}"), key=lambda path: (len(path.parent.name), path.parent.name))
    return by_fold or [path for path in [Paths(folder, None).bundle] if path.is_dir()] or [folder]


def trained_as(paths: Paths) -> dict[str, Any]:
    """What `trained.json` says of a finished training: its identity (`Trainer.identity`), and `TRAINING`.

    Empty if there is no finished training, or the file is damaged.
    """
    try:
        read: Any = parsed(read_plain(paths.folder / TRAINED, MAX_JSON))
    except (OSError, ValueError):
        return {}
    return read if isinstance(read, dict) else {}


def training_log(paths: Paths) -> list[dict[str, Any]]:
    """The lines of a training's metrics.jsonl; none of classical models and prompts, which train no steps.

    A last line without an end, which a training leaves that is killed, does not count.

    Raises:
        DataError: the file can't be read.
    """
    path = paths.folder / "metrics.jsonl"
    try:
        lines = [parsed(line) for line in read_plain(path, MAX_JSON).split("\n")[:-1]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise DataError(f"{path} can't be read: {cut(error)}", remedy="train the fold again, or remove it") from error
    return [line for line in lines if isinstance(line, dict)]


def trained_otherwise(config: Config, trained: Mapping[str, Any]) -> dict[str, str]:
    """The settings of a training (`trained_as`) that differ from those of a config, with both values."""
    now = deciding_settings(config)
    if config.inputs.template.apply_chat_template:  # a training has the chat template written out
        now = {key: value for key, value in now.items() if not key.startswith("inputs.template.")}
    now = {key: value for key, value in now.items() if value is not None or key not in BY_BASE}
    before = settings_before(now, trained)
    return {
        key: f"{key}={quoted(before[key])} (now {quoted(value)})" for key, value in now.items() if before[key] != value
    }


def refuse_mixed_folds(run: Path, settings: Mapping[int, Mapping[str, Any]]) -> None:
    """Refuse folds of one run that were trained with different settings, by their number.

    Raises:
        ConfigError: it names two folds and the settings that differ.
    """
    first = next(iter(settings), 0)
    for fold in settings:
        if differing := setting_changes(settings[fold], settings[first]):
            raise ConfigError(
                f"folds {first} and {fold} of one run were trained with different settings: fold {fold} with "
                f"{', '.join(differing.values())}",
                where=run,
                remedy="train them with the same settings (--no-resume replaces a fold), each kind in a run folder of "
                "its own: output_dir=FOLDER",
            )


def refuse_mixed_bundles(bundles: Sequence[Bundle]) -> None:
    """`refuse_mixed_folds` for the bundles that lie in their run folder; those of different runs may differ."""
    runs: dict[Path, dict[int, Mapping[str, Any]]] = {}
    for bundle in bundles:
        folder = bundle.folder.resolve()  # it may have been named from within the run
        paths = Paths(folder.parent.parent, bundle.manifest.fold)
        if paths.fold is not None and folder == paths.bundle:
            runs.setdefault(paths.output, {})[paths.fold] = deciding_settings(bundle.config)
    for run, settings in runs.items():
        refuse_mixed_folds(run, settings)


def out_of_fold_metric(bundles: Sequence[Bundle], metric: str) -> float | None:
    """The metric over the rows of all folds, by their weights, where each bundle held out a fold of its own.

    None: it is not known, or no mean over rows.
    """
    return mean_over_folds(bundles, metric) if metric in METRICS and METRICS[metric].by_row else None


def mean_over_folds(bundles: Sequence[Bundle], name: str) -> float | None:
    """The mean of a figure of the bundles' manifests by the rows' weights; None: as `out_of_fold_metric`."""
    folds = [bundle.manifest.fold for bundle in bundles]
    figures = [bundle.manifest.metrics for bundle in bundles]
    is_known = all({"weight", name} <= of_fold.keys() for of_fold in figures)
    if not is_known or None in folds or len(set(folds)) < len(folds):
        return None
    weights = [of_fold["weight"] for of_fold in figures]
    return float(np.average([of_fold[name] for of_fold in figures], weights=weights))


def check_files(config: Config, data: Path | None = None) -> None:
    """Whether the files of `data.train` are there, or another one, before anything that takes time.

    Raises:
        ConfigError: `data.train` is empty.
        DataError: a file is missing, or a glob matches none.
    """
    if not config.data.train and data is None:
        raise ConfigError("data.train names no file", remedy="e.g. data.train=[train.csv]")
    names = [data] if data else [name for source in config.data.sources for name in source.files]
    for path in expand(names):
        check_is_file(path)
    if data is None and (labels := config.data.soft_label_file) is not None:
        check_is_file(labels)


def labelled_rows(config: Config) -> pl.DataFrame:
    """The canonical table of `data.train`, without `exclude_overlap` rows, cleaned by `data.rules`; or a sample of it.

    Raises:
        ConfigError, DataError: as `check_files`, `read_rows` and `clean`; or no row is left.
    """
    data, task = config.data, config.task
    check_files(config)
    head = data.max_rows if data.sampling == "head" else None
    frame = read_rows(data.sources, task, labelled=True, max_rows=head, group=config.folds.group)
    if len(frame) == head and any(source.train_only for source in data.train) and not frame["train_only"].any():
        console.print(f"note: data.max_rows={data.max_rows} leaves no room for train_only rows, which are read last")
    frame, excluded = exclude_overlap(frame, data.sources, config)
    frame, findings = clean(frame, task, data.rules, labelled=True)
    note_changes([*excluded, *findings])
    if frame.is_empty():
        raise DataError("no row of data.train is left", remedy="look at data.rules and at exclude_overlap")
    if data.max_rows is not None and len(frame) > data.max_rows:
        frame = draw_rows(frame, task, data.max_rows, config.seed)
    note_absent_classes(frame, task)
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


def copy_folds(source: Path, output: Path) -> None:
    """Give a run the folds.csv of another run folder, unless it has its own."""
    if not (output / FOLDS).exists():
        output.mkdir(parents=True, exist_ok=True)
        write_text(output / FOLDS, (source / FOLDS).read_text(encoding="utf-8"))


def remake_folds(config: Config) -> Group:
    """Replace the run's folds, and report on the new ones."""
    frame = labelled_rows(config)
    return report(folds_of(config, frame, renew=True), frame, config.task)


def check_rows(config: Config, folds: Sequence[int]) -> None:
    """`check_folds` and `check_files`: what is mistyped shows at once, and not after slow imports."""
    check_folds(config, folds)
    check_files(config)


def check_training(config: Config, folds: Sequence[int]) -> None:
    """As `check_rows`; and whether the base model is there, if it is a folder or an embedded one.

    Raises:
        ModelError: as `resolve_base`.
    """
    check_rows(config, folds)
    if "model" in SECTIONS[config.approach]:
        resolve_base(config.model.base)


class Split(NamedTuple):
    """Training rows and held-out rows; `held_out` is None if all rows are training rows."""

    training: pl.DataFrame
    held_out: pl.DataFrame | None


def identity_of_rows(config: Config, split: Split) -> dict[str, Any]:
    """What decides weights and scores: `deciding_settings`, and the fingerprints of the rows on each side."""
    rows, unseen = (None if side is None else fingerprint(to_rows(side, config.task)) for side in split)
    return {**deciding_settings(config), "rows": rows, "held-out rows": unseen}


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
    def _training_labels(self) -> pl.DataFrame:
        """`id` and `target` of each row as a training row: `data.soft_labels` apply, and to no row that is held out."""
        return with_soft_labels(self.frame, self.config).select("id", "target")

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
        check_folds(self.config, folds)
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
            return Split(self._for_training(self.frame), None)
        self.prove([fold])
        return Split(*self.sides(fold))

    def sides(self, fold: int) -> tuple[pl.DataFrame, pl.DataFrame]:
        """Like `split`, without the leak check."""
        joined = self.frame.join(self.folds.select("id", "fold"), on="id", how="left", maintain_order="left")
        others = (pl.col("fold") >= 0) & (pl.col("fold") != fold)
        held_out = joined.filter(pl.col("fold") == fold).drop("fold")
        return self._for_training(joined.filter(others | pl.col("train_only")).drop("fold")), held_out

    def _for_training(self, rows: pl.DataFrame) -> pl.DataFrame:
        if self.config.data.soft_labels is None:
            return rows
        columns = rows.columns
        return rows.drop("target").join(self._training_labels, on="id", how="left", maintain_order="left")[columns]


def chunks_of(config: Config, data: Path | None) -> Frames:
    """The rows of `data.train` as `train` reads them, or of an unlabelled file as `predict` reads them, in chunks.

    Only one chunk is in memory, unless a rule or `exclude_overlap` compares rows, or a sample of them is drawn.
    """
    check_files(config, data)
    if data:
        return unlabelled(config, data)
    task, rules, settings = config.task, config.data.rules, config.data
    together = any(getattr(rules, rule) in ("fix", "drop") for rule in ACROSS_ROWS)
    drawn = settings.max_rows is not None and settings.sampling == "stratified"
    if together or drawn or any(source.exclude_overlap for source in settings.sources):
        return labelled_rows(config).iter_slices
    scan = partial(scan_rows, labelled=True, max_rows=settings.max_rows, group=config.folds.group)
    return lambda: (clean(chunk, task, rules, labelled=True)[0] for chunk in scan(settings.sources, task))


def unlabelled(
    config: Config,
    data: Path,
    note: Callable[[list[Finding]], object] = lambda findings: None,
    original: Callable[[pl.DataFrame], object] = lambda chunk: None,
) -> Frames:
    """The rows of a test file, repaired by `data.rules`, in chunks.

    Args:
        config: `task` and `data.rules`.
        data: the file.
        note: receives the findings of each chunk.
        original: receives each chunk before it is repaired.
    """
    task, rules, source = config.task, config.data.rules, config.data.unlabelled(data)
    # Repeated ids can only be fixed with the whole file in memory; without `fix`, later checks find them.
    whole = rules.duplicate_id == "fix"

    def frames() -> Iterator[pl.DataFrame]:
        chunks = [read_rows([source], task, labelled=False)] if whole else scan_rows([source], task, labelled=False)
        for chunk in chunks:
            original(chunk)
            frame, findings = clean(chunk, task, rules, labelled=False)
            note(findings)
            yield frame

    return frames
