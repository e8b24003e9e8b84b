from __future__ import annotations

from pathlib import Path

import pytest

from pairclf.errors import PackagingError
from pairclf.packaging import own_files
from pairclf.packaging.own_files import checkout, shipped


def test_checkout_is_read_from_itself() -> None:
    top = checkout()
    assert top is not None
    assert shipped("kaggle/notebook.py") == top / "kaggle" / "notebook.py"


def test_installed_wheel_is_read_from_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "pairclf"
    (package / "_shipped" / "kaggle").mkdir(parents=True)
    (package / "_shipped" / "kaggle" / "notebook.py").touch()
    monkeypatch.setattr(own_files, "_PACKAGE", package)
    assert checkout() is None
    assert shipped("kaggle/notebook.py").is_relative_to(package)
    with pytest.raises(PackagingError, match=r"configs/missing\.yaml is missing"):
        shipped("configs/missing.yaml")


def test_project_around_it_is_not_its_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pairclf vendored into another project's folder is not built from that project's pyproject.toml."""
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "another"\n')
    monkeypatch.setattr(own_files, "_PACKAGE", tmp_path / "pairclf")
    assert checkout() is None
