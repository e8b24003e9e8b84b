"""Kernels on Kaggle's own versions of Python and of all packages, with wheels from the registry."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.packages import assert_scores_as_here, files_of, random_package

from pairclf.packaging.interpreters import find_interpreter
from pairclf.rehearsal.rehearse import Options, rehearse


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "python", "folds"), [("script", "3.12", (0, 1)), ("server", "3.13", (0,))], ids=["script", "server"]
)
def test_kernel_on_the_images_versions_gives_the_submission_of_predict(
    tmp_path: Path, kernel: str, python: str, folds: tuple[int, ...]
) -> None:
    """In the user's own cache: an environment with an image's versions takes minutes to make."""
    if find_interpreter(python) is None:
        pytest.skip(f"there is no Python {python} here")
    package = random_package(tmp_path, folds, kernel=kernel, pythons=[python], images=None)
    test, sample = files_of(tmp_path)
    (report,) = rehearse(package, Options(test=test, sample=sample, layouts=("flat",), image=python)).runs
    assert report.python.startswith(python)
    assert_scores_as_here(package, report, tmp_path, folds)
