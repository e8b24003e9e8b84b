"""Other kinds of kernel, on Kaggle's own versions of Python where this machine has them."""

from __future__ import annotations

from pathlib import Path

import pytest
from rehearsal_support import RUNNING, TEST_ROWS, alike, files_of, tiny_package

from pairclf.jobs.predict import predict
from pairclf.packaging.interpreters import find_interpreter
from pairclf.rehearsal.rehearse import Options, rehearse


@pytest.fixture(autouse=True)
def machine() -> None:
    """The user's own cache: an environment with an image's versions takes minutes to make."""


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "python", "folds"), [("script", "3.12", (0, 1)), ("server", "3.13", (0,))])
def test_other_kinds_of_kernel_give_the_same(tmp_path: Path, kernel: str, python: str, folds: tuple[int, ...]) -> None:
    """With the image's own versions of torch, transformers and all else, and wheels from the registry.

    Without such an interpreter, on this one: tags and stubs prove then that the wheels suffice (test_closure.py).
    """
    found = find_interpreter(python) is not None
    settings = {"kernel": kernel, "pythons": [python], "images": None} if found else {"kernel": kernel}
    package = tiny_package(tmp_path, folds, **settings)
    test, sample = files_of(tmp_path)
    bundles = [tmp_path / "run" / f"fold{fold}" / "bundle" for fold in folds]
    predict(bundles, test, tmp_path / "here.csv", sample=sample)
    image = python if found else "here"
    (report,) = rehearse(package, Options(test=test, sample=sample, layouts=("flat",), image=image)).runs
    assert report.passed
    assert report.python.startswith(python if found else RUNNING)
    assert len(report.parity) == len(folds)
    assert alike(tmp_path / "here.csv", package / "rehearsal" / "submission.csv", tolerance=1e-4)
    assert report.scored is not None
    assert report.scored.both == TEST_ROWS
