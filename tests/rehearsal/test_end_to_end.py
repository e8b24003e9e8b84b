"""The real chain: classifiers trained here, packaged, and scored by their kernel as they are scored here."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
from rehearsal_support import TEST_ROWS, alike, files_of, tiny_config

from pairclf.files import sha256_tree
from pairclf.jobs.fit import fit
from pairclf.jobs.predict import predict
from pairclf.packaging.build import package
from pairclf.rehearsal.rehearse import Options, rehearse
from pairclf.rehearsal.report import Report, read_passed

HERE = "here.csv"
"""What `predict` gives in this process."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows, two bundles of a run, and their submission."""
    folder = tmp_path_factory.mktemp("end-to-end")
    config = tiny_config(folder)
    test, sample = files_of(folder)
    predict([fit(config, fold) for fold in (0, 1)], test, folder / HERE, sample=sample)
    return folder


def rehearsed(trained: Path, made: Path, kernel: str) -> Report:
    """Package and rehearse; its submission must be that of `predict`, whose batches follow another pace."""
    config = tiny_config(trained, kernel=kernel)
    package(config, [trained / "run" / f"fold{fold}" / "bundle" for fold in (0, 1)], made)
    before = sha256_tree(made)
    test, sample = files_of(trained)
    (report,) = rehearse(made, Options(test=test, sample=sample)).runs
    submission = made / "rehearsal" / "submission.csv"
    assert alike(trained / HERE, submission, tolerance=1e-5)
    assert pl.read_csv(submission)["id"].to_list() == pl.read_csv(sample)["id"].to_list()
    assert report.passed
    assert len(report.parity) == 2
    assert before.items() <= sha256_tree(made).items(), "a package is not changed by its rehearsal"
    return report


@pytest.mark.slow
def test_kernel_gives_the_submission_that_predict_gives_here(trained: Path, tmp_path: Path) -> None:
    report = rehearsed(trained, tmp_path / "package", "notebook")
    assert report.scored is not None
    assert report.scored.both == report.rows == TEST_ROWS
    assert {"cell check", "cell install", "cell verify", "cell predict"} <= report.seconds.keys()
    assert report.memory_peak > 200e6
    here, there = report.projections
    assert there.judged
    assert there.machine == "2 x Tesla T4"
    assert there.rows == 25_000
    assert 0 < there.predict < 3600, "a model of a million parameters"
    assert here.predict > report.seconds["cell predict"]
    assert read_passed(tmp_path / "package") == report


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["script", "server"])
def test_other_kinds_of_kernel_give_the_same(trained: Path, tmp_path: Path, kernel: str) -> None:
    report = rehearsed(trained, tmp_path / "package", kernel)
    assert (report.scored is None) is (kernel == "server"), "a server answers, and writes no scores"
