from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from packaging.version import Version
from wheels_support import LINUX, fake_wheel, only_registry

from pairclf.errors import PackagingError
from pairclf.packaging import install_check, interpreters
from pairclf.packaging.image_profiles import read_profile
from pairclf.packaging.install_check import BY_TAGS, check_wheels_suffice, resolve
from pairclf.packaging.interpreters import find_interpreter, full_version

HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
OTHER = "3.13" if HERE != "3.13" else "3.12"

Found = tuple[dict[str, str], dict[str, str], list[str]]
Resolve = Callable[..., Found]


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "registry"
    for name, version, needs in (
        ("alone", "1.0", ()),
        ("alone", "2.0", ()),
        ("alone", "3.0", ()),
        ("needy", "1.0", ("alone>=1", "torch>=2")),
        ("needy", "2.0", ("alone>=2", "torch>=2")),
        ("greedy", "1.0", ("nvidia-thing",)),
        ("nvidia-thing", "1.0", ()),
        ("torch", "2.99", ()),
    ):
        fake_wheel(folder, name, version, needs)
    fake_wheel(folder, "compiled", "1.0", tags=f"cp311-cp311-{LINUX}")
    fake_wheel(folder, "compiled", "1.1", tags=f"cp312-cp312-{LINUX}")
    only_registry(folder, monkeypatch)
    return folder


@pytest.fixture
def solve(registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Resolve:
    """`solve(needs, image, here)`: carried, kept and notes, where pairclf has these needs."""

    def solve(
        needs: Sequence[str], image: str, here: dict[str, str], extra: Sequence[str] = (), python: str = "3.12"
    ) -> Found:
        own = fake_wheel(tmp_path / "own", "pairclf", "0.1.0", needs)
        profile = tmp_path / "profile.txt"
        profile.write_text(image)
        monkeypatch.setattr(
            install_check, "_installed_here", lambda: {name: Version(text) for name, text in here.items()}
        )
        found = resolve(own, extra, read_profile(python, profile))
        carried, kept = ({n: str(v) for n, v in one.items()} for one in (found.carried, found.kept))
        return carried, kept, list(found.notes)

    return solve


TORCH = "torch==2.11.0+cu128\n"


@pytest.mark.parametrize(
    ("needs", "image", "here", "carried", "kept", "notes"),
    [
        (
            ["torch>=2.6", "alone>=1"], "alone==1.0", {"alone": "2.0"},
            {}, {"torch": "2.11.0+cu128", "alone": "1.0"}, [],
        ),
        (
            ["needy>=1"], "alone==2.0", {"needy": "1.0"},
            {"needy": "1.0"}, {"torch": "2.11.0+cu128", "alone": "2.0"}, [],
        ),
        (
            ["alone>=2"], "alone==1.0", {"alone": "2.0"},
            {"alone": "2.0"}, {}, ["Python 3.12: alone 2.0 is carried: the image's 1.0 will not do"],
        ),
        (
            ["needy>=2"], "alone==1.0", {"needy": "2.0", "alone": "2.0"},
            {"needy": "2.0", "alone": "2.0"}, {"torch": "2.11.0+cu128"},
            ["Python 3.12: alone 2.0 is carried: the image's 1.0 will not do"],
        ),
    ],
    ids=["has all", "lacks one", "has one too old", "needs of what is carried"],
)  # fmt: skip
def test_the_image_keeps_its_own_and_gets_what_it_lacks(
    solve: Resolve,
    needs: list[str],
    image: str,
    here: dict[str, str],
    carried: dict[str, str],
    kept: dict[str, str],
    notes: list[str],
) -> None:
    assert solve(needs, f"{TORCH}{image}\n", here) == (carried, kept, notes)


def test_newest_comes_where_the_version_of_here_does_not_run(solve: Resolve) -> None:
    carried, _, notes = solve(["compiled"], TORCH, {"compiled": "1.0"})
    assert carried == {"compiled": "1.1"}
    assert "and not 1.0, which is installed here" in notes[0]
    assert solve(["compiled"], TORCH, {"compiled": "1.0"}, python="3.11")[0] == {"compiled": "1.0"}


def test_newest_comes_of_what_is_not_installed_here(solve: Resolve) -> None:
    carried, _, notes = solve(["alone"], "torch==2.11.0\nalone @ git+https://some.where/alone\n", {})
    assert carried == {"alone": "3.0"}
    assert "its profile does not say" in notes[0]
    assert "nothing was validated with it" in notes[1]


def test_extra_projects_come_even_where_the_image_has_them(solve: Resolve) -> None:
    assert solve([], f"{TORCH}alone==2.0\n", {"alone": "1.0"}, extra=["alone"])[0] == {"alone": "1.0"}


def test_markers_are_those_of_the_images_python(solve: Resolve) -> None:
    needs = ['alone; python_version < "3.12"']
    assert solve(needs, TORCH, {}, python="3.11")[0] == {"alone": "3.0"}
    assert solve(needs, TORCH, {}, python="3.12")[0] == {}


def test_torch_is_the_images_or_nothing(solve: Resolve) -> None:
    with pytest.raises(PackagingError, match="torch"):
        solve(["torch>=2.12"], TORCH, {})
    with pytest.raises(PackagingError, match=r"torch would have to come along"):
        solve(["torch>=2.12"], "alone==1.0\n", {})
    with pytest.raises(PackagingError, match=r"nvidia-thing would have to come along"):
        solve(["greedy"], TORCH, {})


def test_no_answer_is_told_in_the_resolvers_words(solve: Resolve) -> None:
    with pytest.raises(PackagingError, match=r"Python 3\.13 there is no set[\s\S]*compiled"):
        solve(["compiled"], TORCH, {}, python="3.13")


@pytest.fixture(params=["pip", "uv"])
def prover(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the running interpreter, and as where there is none of that Python."""
    if request.param == "uv":
        monkeypatch.setattr(install_check, "find_interpreter", lambda python: None)
    return str(request.param)


Prove = Callable[..., dict[str, str]]


@pytest.fixture
def prove(tmp_path: Path) -> Prove:
    def prove(
        pins: Sequence[str], image: str = "torch==2.11.0+cu128\nold==1.0\n", python: str = HERE
    ) -> dict[str, str]:
        (tmp_path / f"python{python}.txt").write_text(image)
        return check_wheels_suffice(tmp_path / "wheels", {python: pins}, tmp_path)

    return prove


def test_closed_wheelhouse_is_proven(prover: str, prove: Prove, tmp_path: Path) -> None:
    fake_wheel(tmp_path / "wheels", "pairclf", "0.1.0", ["other>=2", "torch>=2.6", 'never; python_version < "3"'])
    fake_wheel(tmp_path / "wheels", "other", "2.0", ["old<2"], f"cp38-abi3-{LINUX}")
    proofs = prove(["pairclf==0.1.0", "other==2.0"])
    assert proofs == {HERE: full_version(Path(sys.executable)) if prover == "pip" else BY_TAGS}
    assert not list(tmp_path.rglob("*.dist-info"))


@pytest.mark.parametrize(
    ("prover", "needs", "wheel", "words"),
    [
        pytest.param("pip", "other>=2", None, "other", id="pip-nothing"),
        pytest.param("uv", "other>=2", None, "other", id="uv-nothing"),
        pytest.param("uv", "other>=2", ("other", "1.0", "py3-none-any"), "other", id="uv-too-old"),
        pytest.param("pip", "other>=2", ("other", "2.0", f"cp310-cp310-{LINUX}"), "other", id="pip-other-python"),
        pytest.param("uv", "other>=2", ("other", "2.0", f"cp310-cp310-{LINUX}"), "other", id="uv-other-python"),
        pytest.param("uv", "other>=2", ("other", "2.0", "py3-none-macosx_11_0_arm64"), "other", id="uv-other-machine"),
        pytest.param("pip", "old>=2", ("other", "2.0", "py3-none-any"), "old", id="pip-contradicts-the-image"),
        pytest.param("uv", "torch>=2.12", ("other", "2.0", "py3-none-any"), "torch", id="uv-contradicts-its-torch"),
    ],
    indirect=["prover"],
)
def test_open_wheelhouse_is_refused_by_name(
    needs: str, wheel: tuple[str, str, str] | None, words: str, prover: str, prove: Prove, tmp_path: Path
) -> None:
    fake_wheel(tmp_path / "wheels", "pairclf", "0.1.0", [needs])
    if wheel is not None:
        fake_wheel(tmp_path / "wheels", wheel[0], wheel[1], tags=wheel[2])
    with pytest.raises(PackagingError, match=words):
        prove(["pairclf==0.1.0"])


def test_image_does_not_prove_what_is_carried(prover: str, prove: Prove, tmp_path: Path) -> None:
    """It has the very version, and the notebook could not install it: the wheel is not there."""
    fake_wheel(tmp_path / "wheels", "pairclf", "0.1.0", ["old"])
    assert prove(["pairclf==0.1.0"])
    with pytest.raises(PackagingError, match="old"):
        prove(["pairclf==0.1.0", "old==1.0"])


def test_wheel_that_is_there_and_not_installed_is_refused(prover: str, prove: Prove, tmp_path: Path) -> None:
    fake_wheel(tmp_path / "wheels", "pairclf", "0.1.0", ["other"])
    fake_wheel(tmp_path / "wheels", "other", "2.0")
    with pytest.raises(PackagingError, match="need other too, which is not installed"):
        prove(["pairclf==0.1.0"])


def test_settings_of_this_machine_close_nothing(
    prove: Prove, registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip and uv know of a registry that has what the wheelhouse lacks."""
    fake_wheel(tmp_path / "wheels", "pairclf", "0.1.0", ["alone"])
    with pytest.raises(PackagingError, match="alone"):
        prove(["pairclf==0.1.0"])
    monkeypatch.setattr(install_check, "find_interpreter", lambda python: None)
    with pytest.raises(PackagingError, match="alone"):
        prove(["pairclf==0.1.0"])


def test_other_python_is_proven_with_what_this_machine_has_of_it(prove: Prove, tmp_path: Path) -> None:
    fake_wheel(tmp_path / "wheels", "pairclf", "0.1.0", ["other"])
    interpreter = f"cp{OTHER.replace('.', '')}"
    fake_wheel(tmp_path / "wheels", "other", "2.0", tags=f"{interpreter}-{interpreter}-{LINUX}")
    (how,) = prove(["pairclf==0.1.0", "other==2.0"], python=OTHER).values()
    assert how.startswith(f"CPython {OTHER}." if find_interpreter(OTHER) else BY_TAGS)
    with pytest.raises(PackagingError, match="other"):
        prove(["pairclf==0.1.0", "other==2.0"], python=HERE)


def test_interpreter_is_one_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_interpreter(HERE) == Path(sys.executable)
    assert find_interpreter("3.99") is None
    shims, versions = tmp_path / "shims", tmp_path / "pyenv" / "versions"
    for folder, body in (
        (shims, "echo 'not there' >&2; exit 127"),
        (versions / "pypy3.98", "echo 3.98 3.98.0 pypy"),
        (versions / "z3.98.1", "echo 3.98 3.98.1 cpython"),
    ):
        path = folder / "python3.98" if folder == shims else folder / "bin" / "python3.98"
        path.parent.mkdir(parents=True)
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{shims}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    found = interpreters.find_interpreter("3.98")
    assert found == versions / "z3.98.1" / "bin" / "python3.98"
    assert full_version(found) == "CPython 3.98.1"
