"""The first cell of a packaged kernel, in rehearsals of the faults that it is there to find; its bundle is hollow.

Kernels are scripts where nothing is about a notebook: Jupyter takes a second to start.
"""

from __future__ import annotations

from pathlib import Path

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
from pairclf.rehearsal.cell_runner import HEAD
from pairclf.rehearsal.rehearse import Options, rehearse
from pairclf.rehearsal.report import RehearsalReport
from pairclf.task import LMSYS

ROWS = 4


@pytest.fixture
def kernel_type(request: pytest.FixtureRequest) -> str:
    return getattr(request, "param", "script")


notebook = pytest.mark.parametrize("kernel_type", ["notebook"], indirect=True)


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel_type: str) -> Path:
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
    config: Config = resolve({"package": {**settings, "kernel_type": kernel_type}})
    return package(config, [hollow_bundle(tmp_path / "bundle", config, "fold0")], tmp_path / "package")


def run(package: Path, fault: str) -> RehearsalReport:
    test, sample = (package.parent / name for name in ("test.csv", "sample_submission.csv"))
    (report,) = rehearse(package, Options(test=test, sample=sample, layouts=("flat",), inject=(fault,))).runs
    assert report.passed
    return report


@notebook
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


@notebook
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
    text = kernel.read_text()
    first, second, *_ = HEAD.finditer(text)
    cell = text[first.start() : second.start()]
    assert old in cell, "the kernel has other words for it now"
    kernel.write_text(cell.replace(old, new))
    write_build(packaged, build.model_copy(update={"identity": identity_of(packaged, build.code_file, build.parts)}))
    with pytest.raises(PackagingError, match=says):
        run(packaged, fault)
