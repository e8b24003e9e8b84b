"""Distill runs: train a student on out-of-fold scores of teachers; what it loses against them, and how fast it is."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from rich.table import Table

from pairclf.bundles.bundle import open_bundle
from pairclf.config import Config, load_config
from pairclf.config.dump import tree_of
from pairclf.console import console, number, table
from pairclf.data.identity import row_hashes
from pairclf.data.rows import targets_of
from pairclf.data.scores import scores_frame, write_scores
from pairclf.data.teachers import mean_of_teachers, with_soft_labels
from pairclf.errors import ConfigError, DataError, PairclfError
from pairclf.inference.serve import Server
from pairclf.run import FOLDS, OOF, Run, check_training, copy_folds, output_of
from pairclf.runs.compare import half_width
from pairclf.runs.cv import cross_validate
from pairclf.runs.held_out import CommonRows, ScoredRun, open_runs
from pairclf.scores.intervals import Estimate, difference
from pairclf.scores.metrics import Floats, row_losses
from pairclf.scores.probabilities import mean_of_models

TAUGHT, UNTAUGHT, SOFT_LABELS = "taught", "labels", "soft-labels.parquet"
"""In the folder of a distillation: the student's run, its run on labels alone, and the student's labels as a file."""

WARM_UP, ROWS, SECONDS = 8, 256, 300.0
"""Rows scored before the clock starts, rows scored under it, and the time they may take."""

FLATTERS = (
    "Out of fold, a taught student is flattered: its teachers were trained on rows that it holds out. Judge it on rows "
    "that no teacher saw (docs/labels.md)"
)

Train = Callable[[Config], object]
"""Trains all folds of a run."""


@dataclass(frozen=True, slots=True, eq=False)
class Distillation:
    """A student beside its teachers, on the held-out rows of all folds.

    The figures of the taught student flatter it: those who taught it on the rows of one fold were trained on the rows
    of others, which it holds out. With two folds the whole gain may be this leak.

    Attributes:
        rows: number of rows.
        log_loss: of `teacher` (the mean of the teachers), `student`, and `untaught`, the student trained on labels.
        cost: the student's log loss less the teacher's, paired by prompt.
        gain: the student's log loss less that of the same model trained on labels alone: below 0, the teacher helped.
        rows_per_second: of `teacher` (all of them one after the other) and `student`, one bundle each, here; None:
            there is no bundle, or it can't be loaded here.
        folder: of both runs.
    """

    rows: int
    log_loss: Mapping[str, float]
    cost: Estimate
    gain: Estimate
    rows_per_second: Mapping[str, float | None]
    folder: Path

    def as_dict(self) -> dict[str, Any]:
        """All figures as JSON has them."""
        differences = {
            name: {"value": gap.value, "low": gap.low, "high": gap.high}
            for name, gap in (("cost", self.cost), ("gain", self.gain))
        }
        figures = {"rows": self.rows, "log_loss": dict(self.log_loss), **differences}
        return {
            **figures,
            "note": FLATTERS,
            "rows_per_second": dict(self.rows_per_second),
            "run": str(self.folder / TAUGHT),
        }


@dataclass(frozen=True, slots=True, eq=False)
class Students:
    """What is about to be trained: configs of both runs, and the scores and files of their teachers."""

    taught: Config
    untaught: Config
    paths: Sequence[Path]
    teachers: CommonRows


def plan_students(
    paths: Sequence[Path], to: Path, overrides: Sequence[str] = (), *, weight: float = 0.5, out: Path | None = None
) -> Students:
    """Check teachers and student before anything is trained, and write what the student's runs read.

    Args:
        paths: the teachers: run folders, config files of runs, or files of scores; one of them is a run, whose rows
            and folds the student has.
        to: config file of the student; its task, data and folds are replaced by the run's.
        overrides: `key=value` for the student.
        weight: share of the teachers in the loss, and the labels have the rest.
        out: folder of the student's runs; None: `distill/NAME` in the run's folder, NAME as `to` is called.

    Raises:
        ConfigError: no teacher is a run, the student does not train, or as `load_config` and `check_training`.
        DataError: as `open_runs`; a teacher has not scored all rows; or the student has other folds.
        LeakError: as `open_runs` and `out_of_sample`.
    """
    teachers = open_runs(paths)
    config = next((run.config for run in teachers.runs if run.config is not None), None)
    if config is None:
        raise ConfigError("no teacher is a run, whose folds the student needs", remedy="give a run folder as well")
    folder = out or output_of(config) / "distill" / to.stem
    files = [run.path if run.config is None else output_of(run.config) / OOF for run in teachers.runs]
    tree = tree_of(config)
    same = [f"{key}={json.dumps(tree[key])}" for key in ("task", "seed", "data", "folds")] + ["folds.run=null"]
    untaught = load_config(to, [*same, *overrides, f"output_dir={folder / UNTAUGHT}"])
    if untaught.approach == "prompt" or ("train" not in untaught.unread() and not untaught.trains):
        raise ConfigError(
            f"{to}: approach={untaught.approach} trains nothing here, and can't learn from a teacher",
            remedy="give a student with approach=finetune or approach=classical",
        )
    check_training(untaught, [])
    _refuse_missing(paths, teachers, config)
    for run in (TAUGHT, UNTAUGHT):
        copy_folds(output_of(config), folder / run)
        if (folder / run / FOLDS).read_bytes() != (output_of(config) / FOLDS).read_bytes():
            raise DataError(
                "the student has other folds than its teacher, and would learn from scores of rows that it holds out",
                where=folder / run / FOLDS,
                remedy="give another --out, or delete this folder",
            )
    if "train" not in untaught.unread():
        listed = json.dumps([str(path) for path in files])
        more = [f"train.distill={{scores: {listed}, ce_weight: {1 - weight}, kl_weight: {weight}}}"]
    else:
        more = [f"data.soft_labels={_write_soft_labels(folder / SOFT_LABELS, files, untaught, weight)}"]
    return Students(
        load_config(to, [*same, *more, *overrides, f"output_dir={folder / TAUGHT}"]), untaught, paths, teachers
    )


def _refuse_missing(paths: Sequence[Path], teachers: CommonRows, config: Config) -> None:
    folds = Run(config).folds.filter(pl.col("fold") >= 0)
    missing = folds.filter(~pl.col("id").is_in(teachers.ids))
    if len(missing):
        raise DataError(
            f"{len(missing):,} of {len(folds):,} rows have no out-of-fold score of their teacher (folds "
            f"{sorted(missing['fold'].unique())})",
            where=", ".join(map(str, paths)),
            rows=missing["id"].to_list(),
            remedy="train all folds of the teacher: `pairclf cv CONFIG`",
        )


def _write_soft_labels(path: Path, files: Sequence[Path], config: Config, weight: float) -> str:
    """Write the mean of labels and teachers, and return its name for `data.soft_labels`.

    Cross-entropy with this mean is the sum of the weighted cross-entropies with both, as in `train.distill` at
    temperature 1; so each model that takes soft labels can be a student.
    """
    rows, task = with_soft_labels(Run(config).frame, config), config.task
    taught = mean_of_teachers(files, rows, task)
    labels = targets_of(rows)
    mixed = np.where(np.isfinite(taught), (1 - weight) * labels + weight * taught, labels)
    names, hashes = [file.parent.name or file.name for file in files], row_hashes(rows, task)
    write_scores(path, scores_frame(rows["id"].to_list(), mixed, task, 1, names, seen=0, hashes=hashes))
    return config.data.name_of(path)


def distill(students: Students, train: Train | None = None, *, rows: int = ROWS) -> Distillation:
    """Train the student with and without its teachers, and compare them.

    Args:
        students: from `plan_students`.
        train: how a run is trained; None: by `cross_validate`, which keeps finished folds.
        rows: rows that the speed is measured on; 0: it is not measured.
    """
    train = train or (lambda config: cross_validate(config, resume=True))
    outputs = []
    for config, title in ((students.taught, "the student, taught"), (students.untaught, "the student, labels alone")):
        console.rule(title, align="left")
        train(config)
        outputs.append(output_of(config))
    common = open_runs([*students.paths, *outputs])
    *teachers, taught, untaught = common.runs
    values = {
        "teacher": mean_of_models([run.probabilities for run in teachers]),
        "student": taught.probabilities,
        "untaught": untaught.probabilities,
    }
    losses: dict[str, Floats] = {
        name: row_losses(scores, common.targets, multi_label=common.task.multi_label) for name, scores in values.items()
    }
    cost, gain = (
        difference(losses["student"], losses[other], common.groups, common.weights) for other in ("teacher", "untaught")
    )
    speeds = {"teacher": _speed(teachers, common, rows), "student": _speed([taught], common, rows)}
    means = {name: float(np.average(loss, weights=common.weights)) for name, loss in losses.items()}
    return Distillation(len(common.ids), means, cost, gain, speeds, outputs[0].parent)


def _speed(runs: Sequence[ScoredRun], common: CommonRows, rows: int) -> float | None:
    """Rows a second of the first bundle of each run, one after the other; None: unknown."""
    if not rows or not all(run.bundles for run in runs):
        return None
    speeds = []
    for run in runs:
        try:
            speeds.append(rows_per_second(run.bundles[0], common.frame, rows))
        except PairclfError as error:  # a teacher that was trained elsewhere may not fit on this machine
            console.print(f"note: the speed of {run.name} is not known: {error}")
            return None
    return 1 / sum(1 / speed for speed in speeds)


def rows_per_second(
    bundle: Path, frame: pl.DataFrame, rows: int = ROWS, *, clock: Callable[[], float] = time.monotonic
) -> float:
    """Rows a second of a bundle on this machine, from texts to probabilities, in its `predict.swap`, once it is loaded.

    Args:
        bundle: its folder.
        frame: canonical table, whose first rows are scored.
        rows: how many.
        clock: seconds.

    Raises:
        PairclfError: as `Server`.
    """
    config = open_bundle(bundle).config
    columns = {name: config.data.test.columns.get(name) or name for name in ("id", *config.task.fields)}
    batch = frame.select(pl.col(name).alias(theirs) for name, theirs in columns.items())
    server = Server([bundle], seconds=SECONDS, rows=rows + WARM_UP, batch_seconds=SECONDS, clock=clock)
    try:
        server.predict(batch.head(WARM_UP))
        before = server.report()
        server.predict(batch.head(rows))
        after = server.report()
    finally:
        server.close()
    scored = sum(after[count] - before[count] for count in ("both", "one"))
    return scored / max(after["seconds"] - before["seconds"], 1e-9)


def render(result: Distillation) -> list[Table]:
    """The student beside its teachers."""
    names = {"teacher": "teacher", "student": "student, taught", "untaught": "student, labels alone"}
    distilled_table = table(f"Distilled, out of fold: {result.rows:,} rows", "", "log loss", "rows/s")
    for name, words in names.items():
        speed = result.rows_per_second.get("student" if name == "untaught" else name)
        distilled_table.add_row(words, number(result.log_loss[name]), number(speed, 1))
    differences = (("student less teacher", result.cost), ("taught less labels alone", result.gain))
    lines = [f"{words}: {gap.value:+.4f} {half_width(gap)}" for words, gap in differences]
    distilled_table.caption = "\n".join([*lines, FLATTERS])
    distilled_table.caption_justify = "left"
    return [distilled_table]
