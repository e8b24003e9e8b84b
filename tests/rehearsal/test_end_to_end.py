"""The real chain: a classifier trained here, packaged, and scored by its kernel as it is scored here, whatever happens.

Each fault against the real kernel with a real bundle; kernels that lack a precaution must be found out.
"""

from __future__ import annotations

import json
import sys
import venv
from collections.abc import Iterator, Sequence
from pathlib import Path

import nbformat
import polars as pl
import pytest
from rehearsal_support import TEST_ROWS, alike, files_of, tiny_package

from pairclf.errors import PackagingError
from pairclf.files import sha256_tree
from pairclf.jobs.predict import predict
from pairclf.packaging.record import identity_of, read_build, write_build
from pairclf.rehearsal import stage
from pairclf.rehearsal.image import make_image, needed_by
from pairclf.rehearsal.rehearse import Options, rehearse
from pairclf.rehearsal.report import Report, read_passed


@pytest.fixture(autouse=True)
def machine() -> None:
    """One for all tests, see `made`: what it has rehearsed is asked for by several."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A package, rehearsed without faults."""
    folder = tmp_path_factory.mktemp("faults")
    with pytest.MonkeyPatch.context() as patch:
        linked = make_image(folder / "image", {"pairclf"})
        patch.setattr(stage, "make_image", lambda target, hidden: beside(target, linked))
        patch.setattr(stage, "needed_by", lambda python: [*needed_by(python), linked.parents[1]])
        for name in ("XDG_STATE_HOME", "XDG_CACHE_HOME"):
            patch.setenv(name, str(folder / "machine" / name))
        package = tiny_package(folder)
        before = sha256_tree(package)
        test, sample = files_of(folder)
        rehearse(package, Options(test=test, sample=sample, layouts=("flat",)))
        assert before.items() <= sha256_tree(package).items(), "a package is not changed by its rehearsal"
        yield package


def beside(folder: Path, linked: Path) -> Path:
    """An environment that looks into another one: linking that one's files again takes seconds each time."""
    venv.EnvBuilder(symlinks=True, with_pip=False).create(folder)
    site = next(linked.parents[1].glob("lib/python*/site-packages"))
    next(folder.glob("lib/python*/site-packages")).joinpath("image.pth").write_text(f"{site}\n")
    return folder / "bin" / "python"


def inject(package: Path, *names: str) -> Sequence[Report]:
    test, sample = files_of(package.parent)
    return rehearse(package, Options(test=test, sample=sample, layouts=("flat",), late=0.2, inject=names)).runs


def run(package: Path, name: str) -> Report:
    (report,) = inject(package, name)
    assert report.fault == name
    assert report.passed
    assert json.loads((package / "rehearsal" / f"report-{name}.json").read_text())["passed"]
    return report


def scores(package: Path, name: str) -> pl.DataFrame:
    return pl.read_parquet(package / "rehearsal" / f"scores-{name}.parquet")


def submission(package: Path, name: str | None = None) -> Path:
    return package / "rehearsal" / ("submission.csv" if name is None else f"submission-{name}.csv")


@pytest.mark.slow
def test_kernel_gives_the_submission_that_predict_gives_here(made: Path, tmp_path: Path) -> None:
    """Its batches follow another pace, under its deadline."""
    test, sample = files_of(made.parent)
    predict([made.parent / "run" / "fold0" / "bundle"], test, tmp_path / "here.csv", sample=sample)
    assert alike(tmp_path / "here.csv", submission(made), tolerance=1e-5)
    report = read_passed(made)
    assert len(report.parity) == 1
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


@pytest.mark.slow
def test_oom(made: Path) -> None:
    report = run(made, "oom")
    assert report.scored is not None
    assert report.scored.both + report.scored.one > TEST_ROWS / 2, "what fits is scored"


@pytest.mark.slow
def test_kill(made: Path) -> None:
    report = run(made, "kill")
    assert report.scored is not None
    assert report.scored.both == TEST_ROWS
    assert "predict was killed" in str((made / "rehearsal" / "executed-kill.ipynb").read_text())
    assert alike(submission(made), submission(made, "kill"), tolerance=1e-5)


@pytest.mark.slow
def test_slow(made: Path) -> None:
    report = run(made, "slow")
    assert report.speed == 1, "the machine's own slowness uses up nothing of the time"
    assert report.deadline / 2 < report.notebook < 3600 * report.hours, "the passes used it up, and the end was in time"
    assert report.scored is not None
    assert report.scored.prior > 0, "there was no time for all"
    prior = pl.read_csv(submission(made, "slow")).filter(pl.Series(scores(made, "slow")["orders"] == 0))
    assert prior.drop("id").unique().height == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["null-rows", "extra-columns"])
def test_strange_test_files(made: Path, name: str) -> None:
    report = run(made, name)
    assert report.scored is not None
    assert report.scored.both == TEST_ROWS
    assert alike(submission(made), submission(made, name)) is (name == "extra-columns")


@pytest.mark.slow
def test_missing_model(made: Path) -> None:
    report = run(made, "missing-model")
    assert report.scored is None
    assert report.submission["rows"] == TEST_ROWS
    assert pl.read_csv(submission(made, "missing-model")).drop("id").unique().height == 1
    assert not alike(submission(made), submission(made, "missing-model"))


@pytest.mark.slow
def test_corrupt_bundle_and_wrong_python_fail_in_the_first_cell(made: Path) -> None:
    corrupt, python = inject(made, "corrupt-bundle", "wrong-python")
    assert (corrupt.failed, python.failed) == ("check", "check")
    assert [name for name in corrupt.seconds if name.startswith("cell")] == ["cell check"]
    assert read_build(made).bundles[0].folder in corrupt.said
    assert f"and this image has {'3.99'}" in python.said
    assert sys.version_info < (3, 99)


# --- kernels without a precaution ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "old", "new", "says"),
    [
        (
            "corrupt-bundle",
            "return sha256(path) == expected",
            "return True",
            "the kernel went on as if nothing was wrong",
        ),
        ("wrong-python", "if here not in PYTHONS", "if False", "the kernel went on as if nothing was wrong"),
        ("missing-model", "if not RERUN:", "if True:", "the cell check failed"),
    ],
)
def test_kernel_that_lacks_a_precaution_does_not_pass(made: Path, name: str, old: str, new: str, says: str) -> None:
    build = read_build(made)
    kernel = made / "kernel" / build.code_file
    before = kernel.read_text()
    notebook = nbformat.reads(before, as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace(old, new)
    changed = [cell.source for cell in notebook.cells] != [cell.source for cell in nbformat.reads(before, 4).cells]
    assert changed, "the kernel has other words for it now"
    notebook.cells = [cell for cell in notebook.cells if cell.cell_type == "code"][:1]
    kernel.write_text(nbformat.writes(notebook))
    write_build(made, build.model_copy(update={"identity": identity_of(made, build.code_file, build.parts)}))
    try:
        with pytest.raises(PackagingError, match=says):
            inject(made, name)
    finally:
        kernel.write_text(before)
        write_build(made, build)
