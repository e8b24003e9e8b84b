from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from importlib.metadata import distribution
from pathlib import Path

import pytest
from wheels_support import fake_wheel, only_registry

from pairclf.errors import PackagingError
from pairclf.rehearsal import image
from pairclf.rehearsal.image import image_environment, make_image

HERE = f"{sys.version_info.major}.{sys.version_info.minor}"


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
    monkeypatch.setattr(image, "_site_folders", lambda python: [site])
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
    assert {path.stat().st_nlink for path in site.rglob("*.py")} == {1}, "a hard link can be written through"
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


def test_folders_that_the_interpreter_needs() -> None:
    needed = image.needed_by(Path(sys.executable))
    assert all(path.exists() for path in needed)
    for module in ("json", "polars"):
        place = Path(str(import_module(module).__file__))
        assert any(place.is_relative_to(path) for path in needed), module
    assert not any(Path(image.__file__).is_relative_to(path) for path in needed), "the checkout is not needed"


def test_running_environment_is_seen_through_its_own_paths() -> None:
    folders = image._site_folders(Path(sys.executable))
    assert Path(str(distribution("polars").locate_file(""))) in folders
    assert all(str(path) in sys.path for path in folders)


@pytest.fixture
def profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small image, a registry that has its packages, and a pairclf that asks for some of them."""
    for name, version, needs in (
        ("alone", "1.0", ["below"]),
        ("alone", "2.0", ["below"]),
        ("below", "1.0", []),
        ("below", "2.0", []),
        ("gone", "2.0", []),
        ("lacking", "1.0", []),
        ("runner", "1.0", []),
        ("unrelated", "1.0", []),
    ):
        fake_wheel(tmp_path / "registry", name, version, needs)
    only_registry(tmp_path / "registry", monkeypatch)
    monkeypatch.setattr(image, "_required_projects", lambda python: {"alone", "gone", "lacking"})
    monkeypatch.setattr(image, "_RUNNER", ("runner",))
    path = tmp_path / "python.txt"
    path.write_text("alone==1.0+cu128\nbelow==1.0\ngone==1.0\nunrelated==1.0\n")
    return path


def test_environment_holds_the_images_own_versions(
    profile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python = image_environment(HERE, profile, tmp_path / "cache")
    pins = (python.parents[1] / "pins.txt").read_text().split()
    assert pins == ["alone==1.0", "below==1.0", "gone==2.0", "runner==1.0"]
    assert all(imports(python, name) for name in ("alone", "below", "runner"))
    assert not any(imports(python, name) for name in ("lacking", "unrelated", "pairclf", "polars"))
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith(f"Python {HERE}: installing the image's packages in ")
    assert "gone 2.0 stands for the image's 1.0, which can't be had" in said
    image_environment(HERE, profile, tmp_path / "cache")
    assert capsys.readouterr().err == ""


def test_modules_that_a_project_claims_and_lacks_are_none(profile: Path, tmp_path: Path) -> None:
    """pyarrow 18's top_level.txt names `__dummy__`; a project without any module is still found out."""
    registry = tmp_path / "registry"
    fake_wheel(registry, "alone", "1.0", ["below"], claims="__dummy__\nalone\n")
    assert imports(image_environment(HERE, profile, tmp_path / "cache"), "alone")
    fake_wheel(registry, "alone", "3.0", ["below"], claims="__dummy__\n")
    profile.write_text(profile.read_text().replace("alone==1.0", "alone==3.0"))
    with pytest.raises(PackagingError, match=r"no module of theirs can be imported: \['alone'\]"):
        image_environment(HERE, profile, tmp_path / "cache")


def test_environment_is_made_once(profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    first = image_environment(HERE, profile, cache)
    (first.parents[1] / "pins.txt").unlink()  # as if killed: what there is may be half of it
    (first.parents[1] / "debris").touch()
    assert image_environment(HERE, profile, cache) == first
    assert not (first.parents[1] / "debris").exists()
    made: list[Path] = []
    monkeypatch.setattr(image, "_install_environment", lambda folder, *_: made.append(folder))
    assert image_environment(HERE, profile, cache) == first
    assert made == []
    profile.write_text(profile.read_text().replace("below==1.0", "below==2.0"))
    assert image_environment(HERE, profile, cache) == made[0] / "bin" / "python" != first


def test_image_of_an_environment_leaves_it_as_it_was(profile: Path, tmp_path: Path) -> None:
    environment = image_environment(HERE, profile, tmp_path / "cache")
    python = make_image(tmp_path / "image", {"lacking"}, environment)
    assert imports(python, "alone")
    assert not imports(python, "polars")
    next((tmp_path / "image").rglob("alone.py")).unlink()
    assert not imports(python, "alone")
    assert imports(environment, "alone")
    next((tmp_path / "cache").rglob("alone.py")).with_name("by_hand.py").touch()
    with pytest.raises(PackagingError, match="by-hand can still be imported"):
        make_image(tmp_path / "other", {"by-hand"}, environment)


def test_environment_of_a_python_that_is_not_here_is_refused(profile: Path, tmp_path: Path) -> None:
    with pytest.raises(PackagingError, match=r"no Python 3\.99 here"):
        image_environment("3.99", profile, tmp_path / "cache")


def test_environment_that_can_not_be_had_is_told(profile: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "registry").glob("below-*"):
        path.unlink()
    with pytest.raises(PackagingError, match="below"):
        image_environment(HERE, profile, tmp_path / "cache")


def test_pairclf_asks_for_what_its_metadata_says() -> None:
    asked = image._required_projects("3.12")
    assert {"torch", "polars", "scikit-learn"} <= asked
    assert not {"kaggle", "pytest", "wandb"} & asked
