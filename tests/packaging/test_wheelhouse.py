from __future__ import annotations

import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from pairclf import __version__
from pairclf.errors import PackagingError
from pairclf.packaging import wheelhouse
from pairclf.packaging.wheelhouse import Wheel, fill_wheelhouse, repack, supported_pythons

SMALL = "iniconfig"


def test_wheels_come_in_the_installed_versions_and_the_same_bytes(tmp_path: Path, registry: Path) -> None:
    first, second = (fill_wheelhouse(tmp_path / name, [SMALL]) for name in ("first", "second"))
    assert [wheel.requirement for wheel in first] == [f"{SMALL}=={version(SMALL)}", f"pairclf=={__version__}"]
    assert supported_pythons(first) == ["3.11", "3.12", "3.13"]
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()
    (own,) = (tmp_path / "first").glob("pairclf-*.whl")
    with zipfile.ZipFile(own) as archive:
        names = archive.namelist()
        assert "pairclf/_shipped/kaggle/notebook.py" in names
        assert not [name for name in names if "/build/" in name or name.endswith(".pyc")]
        here = str(Path(wheelhouse.__file__).parents[2]).encode() + b"/"
        assert not [name for name in names if here in archive.read(name)]
    assert second == first


def test_other_version_than_the_installed_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip's platform tags fetch old versions silently."""

    def pip(command: str, *arguments: str) -> None:
        name = f"pairclf-{__version__}-py3-none-any.whl" if command == "wheel" else f"{SMALL}-0.1-py3-none-any.whl"
        (tmp_path / name).touch()

    monkeypatch.setattr(wheelhouse, "_pip", pip)
    with pytest.raises(PackagingError, match=rf"came are .*'{SMALL}': '0\.1'.*asked for"):
        fill_wheelhouse(tmp_path, [SMALL])


def test_wheel_for_another_system_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(command: str, *arguments: str) -> None:
        tags = "py3-none-any" if command == "wheel" else "cp312-cp312-macosx_11_0_arm64"
        name = "pairclf" if command == "wheel" else SMALL
        (tmp_path / f"{name}-{__version__ if command == 'wheel' else version(SMALL)}-{tags}.whl").touch()

    monkeypatch.setattr(wheelhouse, "_pip", pip)
    with pytest.raises(PackagingError, match="macosx_11_0_arm64"):
        fill_wheelhouse(tmp_path, [SMALL])


def test_compiled_wheel_narrows_the_pythons() -> None:
    anywhere = Wheel.parse("pairclf-0.1.0-py3-none-any.whl")
    compiled = Wheel.parse("Some_Thing-1.0-1-cp312-cp312-manylinux_2_17_x86_64.manylinux2014_x86_64.whl")
    assert compiled.requirement == "some-thing==1.0"
    assert supported_pythons([anywhere, compiled]) == ["3.12"]
    assert supported_pythons([compiled, Wheel("other", "1", ("cp313",), ("any",))]) == []


def test_package_that_is_not_installed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PackagingError, match="no-such-package"):
        fill_wheelhouse(tmp_path, ["no-such-package"])


def test_pip_that_fails_is_told_in_its_own_words(
    tmp_path: Path, registry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    next(registry.iterdir()).unlink()
    monkeypatch.setattr(wheelhouse, "_own_wheel", lambda folder: None)
    with pytest.raises(PackagingError, match=r"pip download failed:[\s\S]*No matching distribution"):
        fill_wheelhouse(tmp_path, [SMALL])


def test_repacked_wheel_holds_what_was_installed(tmp_path: Path) -> None:
    path = repack(SMALL, tmp_path)
    assert path.name == f"{SMALL}-{version(SMALL)}-py3-none-any.whl"
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert f"{SMALL}/__init__.py" in archive.namelist()
        listed = archive.read(f"{SMALL}-{version(SMALL)}.dist-info/RECORD").decode().splitlines()
        assert sorted(line.split(",")[0] for line in listed) == sorted(archive.namelist())


def test_changed_or_editable_install_is_not_repacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    info = site / "thing-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n")
    (info / "WHEEL").write_text("Wheel-Version: 1.0\nTag: py3-none-any\n")
    (info / "RECORD").write_text("thing.py,sha256=AAAA,3\nthing-1.0.dist-info/METADATA,,\n")
    (site / "thing.py").write_text("x=1")
    monkeypatch.syspath_prepend(str(site))
    with pytest.raises(PackagingError, match=r"thing\.py of thing was changed"):
        repack("thing", tmp_path)
    (info / "direct_url.json").write_text('{"dir_info": {"editable": true}, "url": "file:///somewhere"}')
    with pytest.raises(PackagingError, match="not installed from a wheel"):
        repack("thing", tmp_path)


def test_installed_pairclf_is_repacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[str] = []
    monkeypatch.setattr(wheelhouse, "checkout", lambda: None)
    monkeypatch.setattr(wheelhouse, "repack", lambda project, folder: packed.append(project))
    with pytest.raises(PackagingError, match=r"wheels that came are \{\}"):
        fill_wheelhouse(tmp_path, [])
    assert packed == ["pairclf"]
