from __future__ import annotations

import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest

from pairclf.errors import PackagingError
from pairclf.packaging import image
from pairclf.packaging.image import make_image


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small site-packages: an ordinary package, an editable install, a neighbour, byte code."""
    site, project = tmp_path / "site-packages", tmp_path / "project"
    (project / "edited").mkdir(parents=True)
    (project / "edited" / "__init__.py").touch()
    for name, files in (
        ("plain", {"plain/__init__.py": "", "plain/__pycache__/__init__.cpython.pyc": "", "plain/data.h": ""}),
        ("edited", {"_edited.pth": f"{project}\n"}),
        ("Neigh_Bour", {"neigh_bour.py": "answer = 42\n"}),
    ):
        files = files | {f"{name}-1.0.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"}
        for path, text in files.items():
            (site / path).parent.mkdir(parents=True, exist_ok=True)
            (site / path).write_text(text)
        record = [f"{path},,\n" for path in files if "__pycache__" not in path] + [f"{name}-1.0.dist-info/RECORD,,\n"]
        (site / f"{name}-1.0.dist-info" / "RECORD").write_text("".join(record))
    monkeypatch.setattr(image, "_site_folders", lambda: iter([site]))
    return site


def imports(python: Path, name: str) -> bool:
    return subprocess.run([python, "-I", "-c", f"import {name}"], capture_output=True, check=False).returncode == 0


def test_hidden_projects_are_gone_and_the_others_are_there(site: Path, tmp_path: Path) -> None:
    python = make_image(tmp_path / "image", {"plain", "Edited"})
    assert not imports(python, "plain")
    assert not imports(python, "edited")
    assert imports(python, "neigh_bour")
    everything = make_image(tmp_path / "everything", set())
    assert imports(everything, "plain")
    assert imports(everything, "edited")


def test_what_happens_in_the_image_stays_there(site: Path, tmp_path: Path) -> None:
    python = make_image(tmp_path / "image", {"plain"})
    linked = next((tmp_path / "image").rglob("neigh_bour.py"))
    assert linked.stat().st_ino == (site / "neigh_bour.py").stat().st_ino
    linked.unlink()  # as pip does before it writes a file anew
    linked.write_text("answer = 0\n")
    assert (site / "neigh_bour.py").read_text() == "answer = 42\n"
    assert subprocess.check_output([python, "-c", "import sys; print(sys.prefix)"], text=True).strip() == str(
        tmp_path / "image"
    )


def test_project_that_can_not_be_hidden_is_told(site: Path, tmp_path: Path) -> None:
    (site / "by_hand").mkdir()
    (site / "by_hand" / "__init__.py").touch()
    with pytest.raises(PackagingError, match="by-hand can still be imported"):
        make_image(tmp_path / "image", {"by-hand"})


def test_symbolic_links_where_hard_ones_can_not_be(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("another file system")

    monkeypatch.setattr(image.os, "link", refuse)
    python = make_image(tmp_path / "image", {"plain"})
    assert imports(python, "neigh_bour")
    assert not imports(python, "plain")
    next((tmp_path / "image").rglob("neigh_bour.py")).unlink()
    assert (site / "neigh_bour.py").is_file()


def test_running_environment_is_seen_through_its_own_paths() -> None:
    assert Path(str(distribution("polars").locate_file(""))) in list(image._site_folders())
    assert all(str(path) in sys.path for path in image._site_folders())
