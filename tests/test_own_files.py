from __future__ import annotations

from pathlib import Path

import pytest

from pairclf import own_files
from pairclf.config import load_config
from pairclf.errors import PackagingError, PairclfError
from pairclf.own_files import checkout, or_shipped, shipped
from pairclf.reports import report
from pairclf.runs import sweep


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
    mine = tmp_path / "mine/first.yaml"
    mine.parent.mkdir()
    mine.write_text(f"extends: {name}\n")
    assert load_config(mine).approach == "classical"
    (mine.parent / "configs/lmsys").mkdir(parents=True)
    (mine.parent / name).write_text("seed: 7\n")  # one that lies beside it comes first
    assert load_config(mine).seed == 7
    (tmp_path / "configs/lmsys").mkdir(parents=True)
    name.write_text("extends: base.yaml\nseed: 7\n")
    assert or_shipped(name) == name
    assert load_config(name).seed == 7


def test_a_config_of_the_user_extends_pairclfs_own_from_wherever_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs/mine").mkdir(parents=True)
    mine = Path("configs/mine/classical.yaml")
    mine.write_text("extends: ../lmsys/classical.yaml\nseed: 7\n")
    for path in (mine, tmp_path / mine, Path("configs/../configs/mine/classical.yaml")):
        assert (load_config(path).approach, load_config(path).seed) == ("classical", 7)
    assert or_shipped(Path("configs/../pyproject.toml")) == Path("configs/../pyproject.toml")
    elsewhere = tmp_path.parent / "configs/lmsys/classical.yaml"
    assert or_shipped(elsewhere) == elsewhere


def test_it_is_said_whose_config_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A user who stands in another folder than that of an edited config would train the other one unawares."""
    monkeypatch.chdir(tmp_path)
    own_files._note.cache_clear()
    for _ in range(2):
        load_config(Path("configs/lmsys/classical.yaml"))
    assert capsys.readouterr().err == (
        "note: configs/lmsys/classical.yaml is pairclf's own config, as this folder has no such file\n"
    )


def test_every_command_that_reads_a_config_finds_pairclfs_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, asked = Path("configs/lmsys/classical.yaml"), list[Path]()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "check_training", lambda *_: None)  # there are no rows
    planned = sweep.plan_sweep(name, ["seed=0,1"])
    assert (planned.path, planned.folder) == (name, Path("runs/lmsys/classical/sweep"))
    assert len(sweep.plan_sweep(Path("configs/sweeps/arxiv-2512.12677-rank.yaml")).arms) > 1
    monkeypatch.setattr(report, "check_file_target", lambda path, ending: asked.append(path))
    with pytest.raises(PairclfError):  # nothing is trained
        report.write_report([name])
    assert asked == [Path("runs/lmsys/classical/report.html")]
