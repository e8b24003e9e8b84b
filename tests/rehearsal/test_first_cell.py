"""The first cell of a packaged notebook, in rehearsals of the faults that it is there to find; its bundle is hollow."""

from __future__ import annotations

from pathlib import Path

import nbformat
import polars as pl
import pytest
from support.kernels import forecast_nothing, use_light_image
from support.packages import RUNNING, hollow_wheelhouse
from tests_support import hollow_bundle, make_rows, write_csv
from wheels_support import freeze_here

from pairclf.config import Config, resolve
from pairclf.errors import PackagingError
from pairclf.packaging.build import package
from pairclf.packaging.build_record import identity_of, read_build, write_build
from pairclf.rehearsal.rehearse import Options, rehearse
from pairclf.rehearsal.report import RehearsalReport
from pairclf.task import LMSYS

ROWS = 4


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package as `package` builds it, with a wheel that is none."""
    hollow_wheelhouse(monkeypatch)
    use_light_image(monkeypatch)
    forecast_nothing(monkeypatch)
    write_csv(tmp_path / "train.csv", make_rows(ROWS))
    rows = pl.read_csv(tmp_path / "train.csv", infer_schema=False)
    rows.drop(LMSYS.classes).write_csv(tmp_path / "test.csv")
    rows.select("id", *LMSYS.classes).write_csv(tmp_path / "sample_submission.csv")
    images = freeze_here(tmp_path / "images", [RUNNING], without=())
    settings = {"owner": "someone", "name": "a-notebook", "python_versions": [RUNNING], "image_freezes": str(images)}
    config: Config = resolve({"package": settings})
    return package(config, [hollow_bundle(tmp_path / "bundle", config, "fold0")], tmp_path / "package")


def run(package: Path, fault: str) -> RehearsalReport:
    test, sample = (package.parent / name for name in ("test.csv", "sample_submission.csv"))
    (report,) = rehearse(package, Options(test=test, sample=sample, layouts=("flat",), inject=(fault,))).runs
    assert report.passed
    return report


def test_first_cell_leaves_priors_where_the_bundles_never_come(packaged: Path) -> None:
    report = run(packaged, "missing-model")
    assert report.scored is None
    assert report.submission["rows"] == ROWS
    submission = pl.read_csv(packaged / "rehearsal" / "submission-missing-model.csv")
    assert submission.drop("id").unique().height == 1


def test_first_cell_fails_at_a_changed_bundle(packaged: Path) -> None:
    report = run(packaged, "corrupt-bundle")
    assert report.failed == "check"
    assert [name for name in report.seconds if name.startswith("cell")] == ["cell check"]
    assert read_build(packaged).bundles[0].folder in report.last_output


def test_first_cell_fails_in_another_python(packaged: Path) -> None:
    report = run(packaged, "wrong-python")
    assert report.failed == "check"
    assert "and this image has 3.99" in report.last_output


@pytest.mark.parametrize(
    ("fault", "old", "new", "says"),
    [
        ("corrupt-bundle", "return sha256(path) == expected", "return True", "the first cell did not detect the fault"),
        (
            "wrong-python",
            "if here not in PYTHONS",
            "if False",
            "the first cell did not detect the fault, and the kernel continued",
        ),
        ("missing-model", "if not RERUN:", "if True:", "the cell check failed"),
    ],
    ids=["corrupt-bundle", "wrong-python", "missing-model"],
)
def test_first_cell_without_a_precaution_does_not_pass(
    packaged: Path, fault: str, old: str, new: str, says: str
) -> None:
    build = read_build(packaged)
    kernel = packaged / "kernel" / build.code_file
    notebook = nbformat.reads(kernel.read_text(), as_version=4)
    notebook.cells = [cell for cell in notebook.cells if cell.cell_type == "code"][:1]
    (cell,) = notebook.cells
    assert old in cell.source, "the kernel has other words for it now"
    cell.source = cell.source.replace(old, new)
    kernel.write_text(nbformat.writes(notebook))
    write_build(packaged, build.model_copy(update={"identity": identity_of(packaged, build.code_file, build.parts)}))
    with pytest.raises(PackagingError, match=says):
        run(packaged, fault)
