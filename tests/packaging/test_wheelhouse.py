from __future__ import annotations

import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from wheels_support import LINUX, fake_wheel, freeze_here, registry_of

from pairclf import __version__
from pairclf.errors import PackagingError
from pairclf.packaging import wheelhouse
from pairclf.packaging.wheelhouse import PLATFORMS, Wheel, fill_wheelhouse, repack

BOTH = ["3.12", "3.13"]
SMALL = "iniconfig"
OWN = f"pairclf=={__version__}"


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return registry_of(tmp_path / "registry", SMALL, monkeypatch)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return freeze_here(tmp_path / "images", ["3.11", *BOTH], {SMALL, "thing"})


@pytest.fixture
def needs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What pairclf asks for; its own wheel is made in no time."""
    needs: list[str] = []
    monkeypatch.setattr(wheelhouse, "_own_wheel", lambda folder: fake_wheel(folder, "pairclf", __version__, needs))
    return needs


def test_wheels_come_in_the_installed_versions_and_the_same_bytes(tmp_path: Path, registry: Path, images: Path) -> None:
    first, second = (fill_wheelhouse(tmp_path / name, BOTH, images, [SMALL]) for name in ("first", "second"))
    assert first.requirements == {python: [f"{SMALL}=={version(SMALL)}", OWN] for python in BOTH}
    assert [wheel.requirement for wheel in first.wheels] == [f"{SMALL}=={version(SMALL)}", OWN]
    assert all(wheel.runs_on(python) for wheel in first.wheels for python in ("3.11", *BOTH))
    assert first.notes == []
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()
    (own,) = (tmp_path / "first").glob("pairclf-*.whl")
    with zipfile.ZipFile(own) as archive:
        names = archive.namelist()
        assert {
            "pairclf/_shipped/kaggle/notebook.py",
            "pairclf/_shipped/kaggle/images/python3.12.txt",
            "pairclf/page/style.css",
            "pairclf/reports/report.css",
            "pairclf/reports/report.js",
        } <= {*names}
        assert not [name for name in names if "/build/" in name or name.endswith(".pyc")]
        here = str(Path(wheelhouse.__file__).parents[2]).encode() + b"/"
        assert not [name for name in names if here in archive.read(name)]
    assert second == first


def test_what_is_compiled_comes_for_each_python(tmp_path: Path, registry: Path, images: Path, needs: list[str]) -> None:
    needs += ["compiled", 'old-python-only; python_version < "3.12"', f"{SMALL}>=1"]
    for python in ("cp311", "cp312", "cp313"):
        fake_wheel(registry, "compiled", "1.0", tags=f"{python}-{python}-{LINUX}")
    fake_wheel(registry, "compiled", "1.1", tags=f"cp313-cp313-{LINUX}")
    fake_wheel(registry, "old-python-only", "1.0")
    found = fill_wheelhouse(tmp_path / "wheels", ["3.11", "3.13"], images, [])
    small = f"{SMALL}=={version(SMALL)}"
    assert found.requirements == {
        "3.11": ["compiled==1.0", small, "old-python-only==1.0", OWN],
        "3.13": ["compiled==1.1", small, OWN],
    }
    assert len(found.wheels) == 5
    assert len(found.notes) == 3  # nothing was validated with what is not installed here


def test_pip_takes_an_old_version_with_one_platform_tag_and_that_is_refused(
    tmp_path: Path, registry: Path, images: Path, needs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    needs.append("thing")
    fake_wheel(registry, "thing", "0.42", tags="py3-none-any")
    fake_wheel(registry, "thing", "0.50", tags="py3-none-manylinux_2_24_x86_64")
    assert fill_wheelhouse(tmp_path / "right", ["3.12"], images, []).requirements["3.12"] == [OWN, "thing==0.50"]

    def download(folder: Path, python: str, pins: object) -> None:
        tag = ("--platform=manylinux2014_x86_64", "--only-binary=:all:", "--no-deps")
        wheelhouse._pip("download", *tag, "--dest", str(folder), "thing")

    with monkeypatch.context() as patch:
        patch.setattr(wheelhouse, "_download", download)
        with pytest.raises(PackagingError, match=r"found no thing 0\.50 .*only 0\.42 for py3-none-any"):
            fill_wheelhouse(tmp_path / "old", ["3.12"], images, [])
    monkeypatch.setattr(wheelhouse, "PLATFORMS", ["manylinux2014_x86_64"])
    with pytest.raises(PackagingError, match=r"No matching distribution found for thing==0\.50"):
        fill_wheelhouse(tmp_path / "none", ["3.12"], images, [])


@pytest.mark.parametrize("tags", ["cp312-cp312-macosx_11_0_arm64", "cp311-cp311-linux_x86_64"])
def test_wheel_that_does_not_run_there_is_refused(
    tags: str, tmp_path: Path, registry: Path, images: Path, needs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        wheelhouse, "_download", lambda folder, python, pins: fake_wheel(folder, SMALL, version(SMALL), tags=tags)
    )
    with pytest.raises(PackagingError, match=f"{SMALL} .* for Python 3.12 .*{tags}"):
        fill_wheelhouse(tmp_path / "wheels", ["3.12"], images, [SMALL])


def test_wheel_that_nobody_asked_for_is_refused(tmp_path: Path, registry: Path, images: Path, needs: list[str]) -> None:
    fake_wheel(tmp_path / "wheels", "stray", "1.0")
    with pytest.raises(PackagingError, match=r"downloaded stray==1\.0"):
        fill_wheelhouse(tmp_path / "wheels", ["3.12"], images, [])


def test_tags_say_what_runs_on_kaggles_machines() -> None:
    def runs(tags: str) -> list[str]:
        wheel = Wheel.parse(f"Some_Thing-1.0-{tags}.whl")
        assert wheel.requirement == "some-thing==1.0"
        return [python for python in ("3.11", "3.12", "3.13") if wheel.runs_on(python)]

    assert runs("py3-none-any") == ["3.11", "3.12", "3.13"]
    assert runs("1-cp312-cp312-manylinux_2_17_x86_64.manylinux2014_x86_64") == ["3.12"]
    assert runs("cp38-abi3-manylinux1_x86_64.manylinux_2_5_x86_64") == ["3.11", "3.12", "3.13"]
    assert runs("cp312-abi3-manylinux_2_34_x86_64") == ["3.12", "3.13"]
    assert runs("py3-none-manylinux_2_35_x86_64") == []
    assert runs("cp313-cp313t-manylinux_2_17_x86_64") == []
    assert runs("py3-none-win_amd64") == []
    assert len(set(PLATFORMS)) == len(PLATFORMS)


@pytest.mark.parametrize("project", ["torch", "Triton", "nvidia_cublas-cu12"])
def test_what_belongs_to_the_driver_is_refused(project: str, tmp_path: Path, images: Path) -> None:
    with pytest.raises(PackagingError, match=f"package.extra_packages names {project.lower().replace('_', '-')}"):
        fill_wheelhouse(tmp_path / "wheels", BOTH, images, [project])


def test_package_that_is_not_installed_is_refused(tmp_path: Path, images: Path) -> None:
    with pytest.raises(PackagingError, match="no-such-package"):
        fill_wheelhouse(tmp_path / "wheels", BOTH, images, ["no-such-package"])


def test_python_without_a_profile_is_refused(tmp_path: Path, images: Path, needs: list[str]) -> None:
    with pytest.raises(PackagingError, match=r"python3\.14\.txt"):
        fill_wheelhouse(tmp_path / "wheels", ["3.14"], images, [])


def test_package_that_can_not_be_had_is_told_in_the_resolvers_words(
    tmp_path: Path, registry: Path, images: Path, needs: list[str]
) -> None:
    next(registry.iterdir()).unlink()
    with pytest.raises(PackagingError, match=rf"no set of wheels[\s\S]*{SMALL}"):
        fill_wheelhouse(tmp_path / "wheels", ["3.12"], images, [SMALL])


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
    wheelhouse._own_wheel(tmp_path)
    assert packed == ["pairclf"]
