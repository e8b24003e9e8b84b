"""`demo`: generate rows, cross-validate the embedded model, blend it with a classical one, rehearse, and report."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import polars as pl
from rich.table import Table

from pairclf.config import Config, Package, load_config
from pairclf.config.dump import tree_of
from pairclf.console import console, number, stdout, table
from pairclf.data.audit import audit
from pairclf.data.audit import render as render_audit
from pairclf.data.folds import report, write_folds
from pairclf.data.scores import class_matrix
from pairclf.demo.arena import generate, write_lmsys
from pairclf.files import write_json
from pairclf.own_files import shipped
from pairclf.packaging.build import package
from pairclf.rehearsal.kernel_run import SUBMISSION
from pairclf.rehearsal.rehearse import Options, rehearse
from pairclf.rehearsal.report import REHEARSAL
from pairclf.reports.report import REPORT, write_report
from pairclf.run import FOLDS, folds_of, labelled_rows, output_of
from pairclf.runs.blend import BlendReport, blend_runs, write_ensemble
from pairclf.runs.blend import render as render_blends
from pairclf.runs.cv import cross_validate
from pairclf.runs.evaluate import Evaluation, evaluate, out_of_fold
from pairclf.runs.evaluation_report import as_tree, render
from pairclf.runs.held_out import open_runs
from pairclf.scores.figures import measure, title, titled
from pairclf.task import Task

CONFIG = "configs/demo/gemma2-tiny.yaml"
ROWS, TEST_ROWS = 4_400, 400
RUN = "gemma2-tiny"
CLASSICAL_CONFIG, CLASSICAL, ENSEMBLE = "configs/demo/classical.yaml", "classical", "ensemble.yaml"


def demo(folder: Path, overrides: Sequence[str] = ()) -> Evaluation:
    """Run every stage and print the summary; artefacts go to `folder`. It ends with a report of the run.

    Returns:
        The evaluation of the out-of-fold scores.
    """
    data, built = folder / "data", folder / "kaggle"
    own = [f"data.folder={data}", f"output_dir={folder / RUN}"]
    config = load_config(shipped(CONFIG), [*own, *overrides])
    clock = Stages()
    with clock.stage("rows: a synthetic arena, its audit, its folds"):
        write_lmsys(generate(ROWS, seed=config.seed), data, n_test=TEST_ROWS)
        _look(config)
    with clock.stage("training: NF4 QLoRA, fold by fold, and out-of-fold scores"):
        bundles = cross_validate(config, resume=False)
    with clock.stage("evaluation"):
        scores = out_of_fold(output_of(config), config.task, config.predict)
        judged = evaluate(labelled_rows(config), scores, config.task, truth=data / "truth.parquet")
        stdout.print(render(judged, config.task))
    with clock.stage("classical: LightGBM on the same folds, and the blend of both"):
        blended = blend_with_classical(config, folder / CLASSICAL)
    with clock.stage("packaging: notebook, bundles, wheels"):
        kaggle = ["package.owner=somebody", f"package.python_versions=[{', '.join(pythons())}]"]
        package(load_config(shipped(CONFIG), [*own, *kaggle, *overrides]), bundles, built)
    with clock.stage("rehearsal: the notebook, offline, on an image like Kaggle's"):
        stdout.print(rehearse(built, Options()).render())
    with clock.stage("report: figures, plots and rows of the run, for a browser"):
        write_report([output_of(config), folder / CLASSICAL])
    submission = built / REHEARSAL / SUBMISSION
    test_loss = expected_log_loss(submission, data / "truth.parquet", config.task)
    stdout.print(_summary(_figures(judged, test_loss, config.task), blended, clock, folder))
    figures = {"test_log_loss": test_loss, "blend": blended.as_dict(), "seconds": clock.seconds}
    write_json(folder / "summary.json", as_tree(judged) | figures)
    return judged


def pythons() -> list[str]:
    """Python versions of Kaggle and of the running interpreter, for the rehearsal; quoted, as 3.10 would become 3.1."""
    running = f"{sys.version_info.major}.{sys.version_info.minor}"
    return [f"'{version}'" for version in sorted({running, *Package().python_versions})]


def blend_with_classical(config: Config, folder: Path) -> BlendReport:
    """Cross-validate a classical model on the rows and folds of a finished run, and blend the scores of both.

    Args:
        config: of the run.
        folder: for the classical run.
    """
    tree = tree_of(config)
    same = [f"{key}={json.dumps(tree[key])}" for key in ("task", "seed", "data", "folds")]
    classical = load_config(shipped(CLASSICAL_CONFIG), [*same, f"output_dir={folder}"])
    write_folds(folder / FOLDS, folds_of(config, labelled_rows(config)))
    cross_validate(classical, resume=False)
    common = open_runs([output_of(config), folder])
    report = blend_runs(common)
    for blends in render_blends(report):
        stdout.print(blends)
    write_ensemble(folder.parent / ENSEMBLE, report, common.runs)
    return report


class Stages:
    """Seconds of each stage, in the order in which they ran."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        console.rule(title, align="left")
        start = time.perf_counter()
        yield
        self.seconds[title.partition(":")[0]] = round(time.perf_counter() - start, 1)


def expected_log_loss(submission: Path, truth: Path, task: Task) -> float:
    """Log loss of a submission against the true probabilities, in nats: the expected one over drawn labels."""
    predicted = pl.read_csv(submission, schema_overrides={"id": pl.String})
    true = predicted.select("id").join(pl.read_parquet(truth), on="id", how="left", maintain_order="left")
    return measure(class_matrix(predicted, task), class_matrix(true, task).astype(np.float64), task)["log_loss"]


def _look(config: Config) -> None:
    frame = labelled_rows(config)
    stdout.print(render_audit(audit(frame, config.task, config.data.rules, labelled=True)))
    stdout.print(report(folds_of(config, frame, renew=True), frame, config.task))


def _figures(judged: Evaluation, test_loss: float, task: Task) -> list[tuple[str, str]]:
    return [
        (f"{title(task.metric, task)} of the class prior", f"{judged.prior[task.metric]:.4f}"),
        *((f"{name}, out of fold", f"{value:.4f}") for name, value in titled(judged.model, task).items()),
        ("log loss of the submission", number(test_loss)),
        ("best possible log loss", number(judged.best)),
        ("way from the prior to the best", "-" if judged.way is None else f"{judged.way:.0%}"),
        ("gained by the swap", number(judged.swap_gain)),
    ]


def _summary(figures: Sequence[tuple[str, str]], blended: BlendReport, clock: Stages, folder: Path) -> Table:
    summary_table = table("pairclf demo", "", "")
    summary_table.show_header = False
    rows = [
        *figures,
        ("log loss of the blend with LightGBM", number(blended.judged[blended.chosen].nested["log_loss"])),
        *((f"seconds: {name}", f"{seconds:.1f}") for name, seconds in clock.seconds.items()),
        ("seconds in all", f"{sum(clock.seconds.values()):.1f}"),
        ("submission", f"{folder / 'kaggle' / REHEARSAL / SUBMISSION}"),
        ("executed notebook and report", f"{folder / 'kaggle' / REHEARSAL}"),
        ("package for Kaggle", f"{folder / 'kaggle'}"),
        ("bundles, scores, metrics", f"{folder / RUN}"),
        ("the blend, for pairclf predict", f"{folder / ENSEMBLE}"),
        ("the report, for a browser", f"{folder / RUN / REPORT}"),
    ]
    for name, value in rows:
        summary_table.add_row(name, value)
    return summary_table
