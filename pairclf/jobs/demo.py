"""The whole job on the embedded default: from rows that did not exist to the submission of an offline notebook."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import polars as pl
from rich.table import Table

from pairclf.config import Config, Package, load_config
from pairclf.console import console, output, table
from pairclf.data.arena import generate, write_lmsys
from pairclf.data.audit import audit
from pairclf.data.audit import render as render_audit
from pairclf.data.folds import report
from pairclf.data.tables import class_matrix
from pairclf.files import write_json
from pairclf.jobs.cv import cross_validate
from pairclf.jobs.evaluate import Evaluation, evaluate, out_of_fold, render
from pairclf.jobs.run import folds_of, labelled_rows, output_of
from pairclf.packaging.build import package
from pairclf.packaging.sources import shipped
from pairclf.rehearsal.play import SUBMISSION
from pairclf.rehearsal.rehearse import Options, rehearse
from pairclf.rehearsal.report import REHEARSAL
from pairclf.scores.metrics import log_loss
from pairclf.task import Task

CONFIG = "configs/demo/gemma2-tiny.yaml"
ROWS, TEST_ROWS = 4_400, 400
RUN = "gemma2-tiny"


def demo(folder: Path, overrides: Sequence[str] = ()) -> Evaluation:
    """Run every stage and print the summary; artefacts go to `folder`.

    Returns:
        The evaluation of the out-of-fold scores.
    """
    data, built = folder / "data", folder / "kaggle"
    own = [f"data.folder={data}", f"output={folder / RUN}"]
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
        output.print(render(judged, config.task))
    with clock.stage("packaging: notebook, bundles, wheels"):
        kaggle = ["package.owner=somebody", f"package.pythons=[{', '.join(pythons())}]"]
        package(load_config(shipped(CONFIG), [*own, *kaggle, *overrides]), bundles, built)
    with clock.stage("rehearsal: the notebook, offline, on an image like Kaggle's"):
        output.print(rehearse(built, Options()).render())
    submission = built / REHEARSAL / SUBMISSION
    test_loss = expected_log_loss(submission, data / "truth.parquet", config.task)
    output.print(_summary(judged, test_loss, clock, folder))
    write_json(folder / "summary.json", judged.as_dict() | {"test_log_loss": test_loss, "seconds": clock.seconds})
    return judged


def pythons() -> list[str]:
    """Kaggle's, and this one, which the rehearsal runs on; in quotes, for 3.10 is no number."""
    running = f"{sys.version_info.major}.{sys.version_info.minor}"
    return [f"'{one}'" for one in sorted({running, *Package().pythons})]


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
    """Log loss of a submission against the true probabilities: what drawn labels would give on average, in nats."""
    predicted = pl.read_csv(submission, schema_overrides={"id": pl.String})
    true = predicted.select("id").join(pl.read_parquet(truth), on="id", how="left", maintain_order="left")
    return log_loss(class_matrix(predicted, task), class_matrix(true, task).astype(np.float64))


def _look(config: Config) -> None:
    frame = labelled_rows(config)
    output.print(render_audit(audit(frame, config.task, config.data.rules, labelled=True)))
    output.print(report(folds_of(config, frame, renew=True), frame, config.task))


def _summary(judged: Evaluation, test_loss: float, clock: Stages, folder: Path) -> Table:
    shown = table("pairclf demo", "", "")
    shown.show_header = False
    rows = [
        ("log loss of the class prior", f"{judged.prior:.4f}"),
        ("log loss of the model, out of fold", f"{judged.log_loss:.4f}"),
        ("log loss of the submission", f"{test_loss:.4f}"),
        ("best possible log loss", f"{judged.best:.4f}"),
        ("way from the prior to the best", f"{judged.way:.0%}"),
        ("accuracy, out of fold", f"{judged.accuracy:.4f}"),
        ("gained by the swap", f"{judged.swap_gain:.4f}"),
        *((f"seconds: {name}", f"{seconds:.1f}") for name, seconds in clock.seconds.items()),
        ("seconds in all", f"{sum(clock.seconds.values()):.1f}"),
        ("submission", f"{folder / 'kaggle' / REHEARSAL / SUBMISSION}"),
        ("executed notebook and report", f"{folder / 'kaggle' / REHEARSAL}"),
        ("package for Kaggle", f"{folder / 'kaggle'}"),
        ("bundles, scores, metrics", f"{folder / RUN}"),
    ]
    for name, value in rows:
        shown.add_row(name, value)
    return shown
