"""What a run must leave to pass; here files that a test wrote stand for what a kernel left."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from support.kernels import make_report
from support.records import BUNDLE, make_build, make_package

from pairclf.rehearsal.faults import FAULTS
from pairclf.rehearsal.report import RehearsalReport, ScoredRows
from pairclf.rehearsal.result_checks import RunChecks
from pairclf.rehearsal.workspace import Workspace, workspace
from pairclf.task import LMSYS

Spoil = Callable[[Path], Any]
VERIFIED = [{"bundle": BUNDLE, "rows": 4, "largest_difference": 1e-7, "tolerance": 1e-5, "dtype": "float32"}]
SUBMISSION = pl.DataFrame({"id": [7, 3], **dict(zip(LMSYS.classes, ([0.5, 0.5], [0.3, 0.3], [0.2, 0.2]), strict=True))})


@pytest.fixture
def judge(tmp_path: Path) -> RunChecks:
    """Of a run without a fault; the undisturbed submission is that which `leave` writes."""
    SUBMISSION.write_csv(tmp_path / "sample.csv")
    return RunChecks(make_build(), tmp_path / "sample.csv", None, "", tmp_path / "sample.csv")


def leave(stage: Workspace, *, served: dict[str, Any] | None = None, orders: tuple[int, int] = (2, 2)) -> None:
    """Write what a run leaves that scores two rows; what it `served` is a server's."""
    SUBMISSION.write_csv(stage.results_folder / "submission.csv")
    (stage.results_folder / "verify.json").write_text(json.dumps(VERIFIED))
    if served is None:
        SUBMISSION.with_columns(orders=pl.Series(orders)).write_parquet(stage.results_folder / "scores.parquet")
    else:
        (stage.results_folder / "served.json").write_text(json.dumps(served))


def judged(judge: RunChecks, stage: Workspace, **changes: object) -> RehearsalReport:
    blank = {"rows": 2, "scored": None, "parity": [], "passed": False, "submission": {}, "projections": []}
    report = make_report(**(blank | changes))
    judge.check(stage, report)
    assert report.passed == (report.problems == [])
    return report


def test_judge_passes_a_run_that_scored_every_row(judge: RunChecks) -> None:
    with workspace() as stage:
        leave(stage)
        report = judged(judge, stage)
    assert report.passed
    assert report.scored == ScoredRows(both_orders=2, one_order=0, prior=0)
    assert report.parity[0].difference == 1e-7


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda kept: (kept / "submission.csv").unlink(), "there is no submission"),
        (
            lambda kept: SUBMISSION.with_columns(winner_tie=float("nan")).write_csv(kept / "submission.csv"),
            "Kaggle would refuse the submission",
        ),
        (
            lambda kept: SUBMISSION.with_columns(orders=0).write_parquet(kept / "scores.parquet"),
            "2 of 2 rows have nothing but the prior",
        ),
        (lambda kept: (kept / "scores.parquet").unlink(), "there is no scores.parquet"),
        (lambda kept: (kept / "verify.json").unlink(), f"did not score the probe rows of {BUNDLE}"),
        (
            lambda kept: (kept / "verify.json").write_text(json.dumps([VERIFIED[0] | {"largest_difference": 0.5}])),
            f"logits of {BUNDLE} differ by 0.5; 1e-05 is allowed",
        ),
    ],
    ids=["no-submission", "nan", "priors", "no-scores", "not-verified", "other-logits"],
)
def test_judge_names_what_does_not_pass(judge: RunChecks, spoil: Spoil, says: str) -> None:
    with workspace() as stage:
        leave(stage)
        spoil(stage.results_folder)
        assert says in str(judged(judge, stage).problems)


@pytest.mark.parametrize(
    ("served", "says"),
    [
        ({"rows": 2, "both": 1, "one": 1, "priors": 0}, None),
        ({"rows": 2, "both": 1, "one": 0, "priors": 1}, "1 of 2 rows have nothing but the prior"),
        ({"rows": 1, "both": 1, "one": 0, "priors": 0}, "the scores are of 1 row, and the sample submission has 2"),
        ({"both": 0, "one": 0}, "there is no served.json"),
    ],
    ids=["all", "a-prior", "a-row-too-few", "nobody-counted"],
)
def test_judge_counts_what_a_server_served(judge: RunChecks, served: dict[str, Any], says: str | None) -> None:
    serving = replace(judge, build=make_build(package=make_package(kernel_type="server")))
    with workspace() as stage:
        leave(stage, served=served)
        report = judged(serving, stage)
        (stage.results_folder / "served.json").unlink()
        assert "there is no served.json" in str(judged(serving, stage).problems)
    if says is None:
        assert report.scored == ScoredRows(both_orders=1, one_order=1, prior=0)
        assert report.passed
    else:
        assert says in str(report.problems)


@pytest.mark.parametrize(("orders", "full"), [((1,), 2), ((2,), 1), ((2, 1), 2)], ids=["reward", "head", "both"])
def test_judge_counts_rows_in_full_by_the_orders_of_the_bundles(
    judge: RunChecks, orders: tuple[int, ...], full: int
) -> None:
    """A row of a reward model has one order, and of an ensemble the fewest of its models."""
    (bundle,) = judge.build.bundles
    bundles = [bundle.model_copy(update={"orders": count}) for count in orders]
    expected = ScoredRows(both_orders=full, one_order=2 - full, prior=0)
    for kernel_type in ("notebook", "server"):
        build = make_build(package=make_package(kernel_type=kernel_type), bundles=bundles)
        with workspace() as stage:
            leave(stage, orders=(2, 1))
            (stage.results_folder / "served.json").write_text(json.dumps({"rows": 2, "both": 1, "one": 1, "priors": 0}))
            assert judged(replace(judge, build=build), stage).scored == expected


def test_judge_asks_of_each_fault_what_must_come_of_it(judge: RunChecks) -> None:
    """With the fault `oom` one row at least; with `slow` any; with `null-rows` all of them."""
    for name, passes in (("oom", True), ("slow", True), ("null-rows", False)):
        with workspace() as stage:
            leave(stage, orders=(2, 0))
            assert "the fault never struck" in str(judged(replace(judge, fault=FAULTS["oom"]), stage).problems)
            (stage.home / "struck-pass").touch()
            report = judged(replace(judge, fault=FAULTS[name]), stage)
            assert report.passed is passes, name
            assert report.scored == ScoredRows(both_orders=1, one_order=0, prior=1)
    with workspace() as stage:
        leave(stage, orders=(0, 0))
        (stage.home / "struck-pass").touch()
        assert "no row was scored" in str(judged(replace(judge, fault=FAULTS["oom"]), stage).problems)
        assert judged(replace(judge, fault=FAULTS["slow"]), stage).passed
        assert "which can't be" not in str(judged(replace(judge, fault=FAULTS["slow"]), stage).problems)
        others = SUBMISSION.with_columns(orders=0, winner_model_a=pl.Series([0.5, 0.4]))
        others.write_parquet(stage.results_folder / "scores.parquet")
        report = judged(replace(judge, fault=FAULTS["slow"]), stage)
        assert "2 rows were not scored, and do not all have the prior" in str(report.problems)


def test_judge_compares_with_the_undisturbed_run(judge: RunChecks, tmp_path: Path) -> None:
    fault = FAULTS["extra-columns"]
    with workspace() as stage:
        leave(stage)
        assert judged(replace(judge, fault=fault), stage).passed
        a, tie = pl.col("winner_model_a"), pl.col("winner_tie")
        SUBMISSION.with_columns(a - 0.1, tie + 0.1).write_csv(tmp_path / "undisturbed.csv")
        report = judged(replace(judge, fault=fault, undisturbed=tmp_path / "undisturbed.csv"), stage)
        assert "winner_model_a differs by 0.09999999999999998 from the undisturbed run" in str(report.problems)
        SUBMISSION.reverse().write_csv(tmp_path / "undisturbed.csv")
        report = judged(replace(judge, fault=fault, undisturbed=tmp_path / "undisturbed.csv"), stage)
        assert "the rows are not those of the undisturbed run" in str(report.problems)


def test_judge_asks_the_first_cell_for_what_is_wrong(judge: RunChecks) -> None:
    fault = FAULTS["wrong-python"]
    for changes, says in (
        ({"failed": "check", "last_output": "this image has 3.99"}, None),
        ({"failed": "check", "last_output": "no"}, "the first cell's error does not match"),
        (
            {"failed": "predict", "last_output": "3.99"},
            "the cell predict failed, and the first cell did not detect the fault",
        ),
        ({}, "the first cell did not detect the fault, and the kernel continued"),
    ):
        with workspace() as stage:
            report = judged(replace(judge, fault=fault), stage, **changes)
        assert report.passed if says is None else says in str(report.problems)
