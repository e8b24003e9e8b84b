"""Each fault against the real kernel with a real bundle; kernels that lack a precaution must be found out."""

from __future__ import annotations

import json
import sys
import venv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import nbformat
import polars as pl
import pytest
from rehearsal_support import TEST_ROWS, alike, files_of, tiny_package

from pairclf.errors import PackagingError
from pairclf.packaging.record import read_build
from pairclf.rehearsal import faults, stage
from pairclf.rehearsal.faults import CELLS, FAULTS, Fault
from pairclf.rehearsal.image import make_image
from pairclf.rehearsal.mounts import Mount
from pairclf.rehearsal.rehearse import Options, rehearse
from pairclf.rehearsal.report import Report
from pairclf.task import LMSYS


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A package, rehearsed without faults."""
    folder = tmp_path_factory.mktemp("faults")
    with pytest.MonkeyPatch.context() as patch:
        linked = make_image(folder / "image", {"pairclf"})
        patch.setattr(stage, "make_image", lambda target, hidden: beside(target, linked))
        package = tiny_package(folder)
        inject(package)
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


def test_every_fault_of_the_issue_is_there() -> None:
    asked = "oom,kill,slow,null-rows,missing-model,corrupt-bundle,wrong-python,extra-columns"
    assert ",".join(FAULTS) == asked


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
    assert report.notebook < report.deadline / report.speed + 5
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
    ("name", "old", "new", "cells", "says"),
    [
        ("kill", "code < 0 or code == 137", "False", None, "kill: "),
        (
            "corrupt-bundle",
            "return sha256(path) == expected",
            "return True",
            1,
            "the kernel went on as if nothing was wrong",
        ),
        ("wrong-python", "if here not in PYTHONS", "if False", 1, "the kernel went on as if nothing was wrong"),
        ("missing-model", "if not RERUN:", "if True:", 1, "the cell check failed"),
    ],
)
def test_kernel_that_lacks_a_precaution_does_not_pass(
    made: Path, name: str, old: str, new: str, cells: int | None, says: str
) -> None:
    kernel = made / "kernel" / read_build(made).code_file
    before = kernel.read_text()
    notebook = nbformat.reads(before, as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace(old, new)
    changed = [cell.source for cell in notebook.cells] != [cell.source for cell in nbformat.reads(before, 4).cells]
    assert changed, "the kernel has other words for it now"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    notebook.cells = code[:cells]
    kernel.write_text(nbformat.writes(notebook))
    try:
        with pytest.raises(PackagingError, match=says):
            inject(made, name)
    finally:
        kernel.write_text(before)


# --- what is spoiled -------------------------------------------------------------------------------------------------


def test_every_third_row_is_spoiled_in_every_field_and_ids_stay(tmp_path: Path) -> None:
    fault = FAULTS["null-rows"]
    assert fault.spoil_rows is not None
    frame = pl.DataFrame({"id": list(range(30)), **{name: [f'["{name}"]'] * 30 for name in LMSYS.fields}})
    spoiled = fault.spoil_rows(frame, LMSYS.fields)
    assert spoiled["id"].equals(frame["id"])
    for name in LMSYS.fields:
        same = [number for number in range(30) if spoiled[name][number] == frame[name][number]]
        assert same == [number for number in range(30) if number % 3]
        assert set(spoiled[name][::3].to_list()) == set(CELLS)
    lists = frame.with_columns(pl.Series("prompt", [["a", "b"]] * 30))
    assert fault.spoil_rows(lists, LMSYS.fields).schema == lists.schema


def test_byte_is_flipped_in_a_copy(tmp_path: Path) -> None:
    files: Mapping[str, Path] = {"a/config.yaml": tmp_path / "config.yaml", "a/big.bin": tmp_path / "big.bin"}
    for name, path in files.items():
        path.write_bytes(name.encode() * (100 if "big" in name else 1))
    before = files["a/big.bin"].read_bytes()
    mounts = [Mount("dataset", "x/wheels", {}, "wheels"), Mount("dataset", "x/bundle", files, "bundle")]
    (tmp_path / "props").mkdir()
    (_, changed), name = faults._flip_byte(mounts, tmp_path / "props")
    assert name == "a/big.bin"
    after = changed.files["a/big.bin"].read_bytes()
    assert sum(one != other for one, other in zip(before, after, strict=True)) == 1
    assert files["a/big.bin"].read_bytes() == before
    assert changed.files["a/config.yaml"] == files["a/config.yaml"]


def test_base_model_is_missing_before_the_bundles_are() -> None:
    base, bundle = Mount("model", "a/b/c/d/1", {"x": Path()}, "base"), Mount("dataset", "a/b", {"x": Path()}, "bundle")
    assert [bool(one.files) for one in faults._leave_empty([base, bundle], Path())[0]] == [False, True]
    assert [bool(one.files) for one in faults._leave_empty([bundle], Path())[0]] == [False]


@pytest.mark.parametrize("fault", FAULTS.values(), ids=list(FAULTS))
def test_hooks_are_python_and_every_fault_says_what_must_come(fault: Fault) -> None:
    assert fault.what
    assert fault.must.startswith("the first cell fails" if fault.says else "a valid submission")
    if fault.hook:
        assert fault.strikes
        compile(fault.module(limit=96, seconds=1.5), "hook", "exec")
    compile(fault.prelude, "prelude", "exec")
