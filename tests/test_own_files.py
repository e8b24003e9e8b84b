from __future__ import annotations

from pathlib import Path

import pytest

from pairclf import own_files
from pairclf.config import load_config
from pairclf.errors import PackagingError
from pairclf.own_files import checkout, or_shipped, shipped


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


def test_a_config_that_is_not_in_the_folder_is_pairclfs_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the guides name works outside of a checkout; a file of the user comes first; no other path is meant."""
    monkeypatch.chdir(tmp_path)
    name = Path("configs/lmsys/classical.yaml")
    assert or_shipped(name) == shipped(str(name))
    config = load_config(name)
    assert config.approach == "classical"
    assert config.output_dir == Path("runs/lmsys/classical")
    for other in ("configs/lmsys/none.yaml", "lmsys/classical.yaml", "pyproject.toml"):
        assert or_shipped(Path(other)) == Path(other)
    (tmp_path / "configs/lmsys").mkdir(parents=True)
    name.write_text("extends: base.yaml\nseed: 7\n")
    assert or_shipped(name) == name
    assert load_config(name).seed == 7
