from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from pairclf.errors import PackagingError, PairclfError
from pairclf.own_files import shipped
from pairclf.packaging.image_profiles import is_stub, profile_path, read_profile, stub_version, write_stubs
from pairclf.packaging.notebook import make_notebook

FREEZE = """
# a comment
absl-py==1.4.0
Typing_Extensions==4.15.0
torch==2.11.0+cu128
cucim-cu12 @ https://pypi.nvidia.com/cucim-cu12/cucim_cu12-26.2.0-cp312-cp312-manylinux_2_28_x86_64.whl
en_core_web_sm @ https://some.where/en_core_web_sm-3.8.0-py3-none-any.whl#sha256=1932429d
google-colab @ file:///colabtools/dist/google_colab-1.0.0.tar.gz
segment_anything @ git+https://github.com/facebookresearch/segment-anything.git@dca509fe
-e git+https://github.com/SohierDane/BigQuery_Helper@8615a7f6#egg=bq_helper
# Editable install with no version control (learntools==0.3.4)
-e /src/learntools
-e /src/nameless
ancient===2004d
"""


@pytest.fixture
def freeze(tmp_path: Path) -> Path:
    path = tmp_path / "python3.12.txt"
    path.write_text(FREEZE)
    return path


def test_every_kind_of_line_that_pip_freeze_writes_is_read(freeze: Path) -> None:
    profile = read_profile("3.12", freeze)
    assert {name: str(found) for name, found in profile.versions.items()} == {
        "absl-py": "1.4.0",
        "typing-extensions": "4.15.0",
        "torch": "2.11.0+cu128",
        "cucim-cu12": "26.2.0",
        "en-core-web-sm": "3.8.0",
        "google-colab": "1.0.0",
        "learntools": "0.3.4",
    }
    assert profile.unknown == {"segment-anything", "bq-helper", "ancient"}


def test_later_lines_win_over_included_ones(freeze: Path, tmp_path: Path) -> None:
    newer = tmp_path / "python3.13.txt"
    newer.write_text("-r python3.12.txt\nabsl-py==2.0\nTorch @ git+https://github.com/pytorch/pytorch\nancient==3\n")
    profile = read_profile("3.13", newer)
    assert profile.versions["absl-py"] == Version("2.0")
    assert profile.versions["ancient"] == Version("3")
    assert profile.versions["typing-extensions"] == Version("4.15.0")
    assert "torch" not in profile.versions
    assert profile.unknown == {"segment-anything", "bq-helper", "torch"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("numpy==2.0\nnumpy>=2\n", r"'numpy>=2' pins no version[\s\S]*line 2"),
        ("numpy==2.0\n\n!! broken\n", r"no line of a freeze[\s\S]*line 3"),
        ("# nothing\n", "lists no package"),
        ("-r other.txt\n", r"other\.txt is no file"),
        ("-r python3.12.txt\n", "included by itself"),
    ],
)
def test_what_is_no_freeze_is_refused(text: str, words: str, freeze: Path) -> None:
    freeze.write_text(text)
    with pytest.raises(PackagingError, match=words):
        read_profile("3.12", freeze)


def test_python_without_a_profile_is_refused(freeze: Path) -> None:
    assert profile_path("3.12", freeze.parent) == freeze
    with pytest.raises(PackagingError, match=r"no python3\.14\.txt[\s\S]*3\.12[\s\S]*freeze\.ipynb"):
        profile_path("3.14", freeze.parent)


def test_stubs_are_wheels_with_a_label_that_no_registry_has(freeze: Path, tmp_path: Path) -> None:
    write_stubs(read_profile("3.12", freeze), tmp_path / "stubs")
    names = {path.name for path in (tmp_path / "stubs").iterdir()}
    assert "torch-2.11.0+cu128.image-py3-none-any.whl" in names
    assert "typing_extensions-4.15.0+image-py3-none-any.whl" in names
    with zipfile.ZipFile(tmp_path / "stubs" / "absl_py-1.4.0+image-py3-none-any.whl") as archive:
        assert archive.testzip() is None
        assert b"Requires-Dist" not in archive.read("absl_py-1.4.0+image.dist-info/METADATA")
    for text in ("2.11.0+cu128", "2.0.2"):
        stub = stub_version(Version(text))
        assert is_stub(stub)
        assert not is_stub(Version(text))
        assert all(stub in Requirement(f"x{bound}{stub.public}").specifier for bound in ("==", ">=", "<=", "~="))


def test_own_profiles_say_what_the_images_are_known_for() -> None:
    for python in ("3.11", "3.12", "3.13"):
        profile = read_profile(python, profile_path(python, None))
        assert profile.versions["torch"] == Version("2.11.0+cu128")
        assert profile.versions["transformers"].major == 5
        assert "bitsandbytes" not in profile.versions
    assert "ASSUMED" in profile_path("3.13", None).read_text()


def test_notebook_that_refreshes_a_profile_is_made_of_its_cell() -> None:
    cell = shipped("kaggle/images/freeze.py").read_text(encoding="utf-8")
    assert shipped("kaggle/images/freeze.ipynb").read_text(encoding="utf-8") == make_notebook(cell, {}, "notebook"), (
        "freeze.ipynb is old: write what make_notebook makes of freeze.py into it"
    )


def test_notebook_that_refreshes_a_profile_writes_one(tmp_path: Path) -> None:
    (cell,) = json.loads(shipped("kaggle/images/freeze.ipynb").read_text(encoding="utf-8"))["cells"]
    subprocess.run([sys.executable, "-c", "".join(cell["source"])], cwd=tmp_path, check=True, capture_output=True)
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    profile = read_profile(python, profile_path(python, tmp_path))
    assert profile.versions["polars"] == Version(version("polars"))
    assert profile.versions["pip"] == Version(version("pip"))


@pytest.mark.parametrize(
    "lines",
    [
        "../../outside/x==1.0",
        "/outside/x===1.0",
        "..==1.0",
        "a b==1.0",
        "==1.0",
        "# Editable install with no version control (../../outside/x==1.0)\n-e /src/x",
        "-e git+https://some.where/x#egg=..",
        "-r ../outside/python3.13.txt",
        "-r /outside/python3.13.txt",
    ],
)
def test_a_line_can_not_name_a_file_elsewhere(tmp_path: Path, lines: str) -> None:
    """A stub is named after its project: what the profile of a stranger names must be names."""
    for name in ("outside", "images", "scratch/stubs"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "outside" / "python3.13.txt").write_text("secret\n")
    path = tmp_path / "images" / "python3.12.txt"
    path.write_text(f"absl-py==1.4.0\n{lines}\n")
    with pytest.raises(PairclfError, match=r"is no name of a package|is a path and no name") as caught:
        write_stubs(read_profile("3.12", path), tmp_path / "scratch" / "stubs")
    assert "line " in str(caught.value), "the line is named"
    assert "secret" not in str(caught.value)
    assert [path.name for path in (tmp_path / "outside").iterdir()] == ["python3.13.txt"]


def test_files_that_include_each_other_twice_are_not_read_for_ever(tmp_path: Path) -> None:
    """Forty files of two lines each stand for a trillion files; so does a chain of thousands for a deep stack."""
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"-r {number + 1}.txt\n" * 2)
    (tmp_path / "40.txt").write_text("torch==2.0\n")
    with pytest.raises(PackagingError, match=r"one file too many"):
        read_profile("3.12", tmp_path / "0.txt")
    assert read_profile("3.12", tmp_path / "37.txt").versions == {"torch": Version("2.0")}


def test_a_profile_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"torch==2.0\n\xff")
    with pytest.raises(PackagingError, match=r"can't be read: 'utf-8'"):
        read_profile("3.12", tmp_path / "a.txt")
