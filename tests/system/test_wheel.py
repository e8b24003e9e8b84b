"""pairclf as it is installed from its wheel, away from the checkout: everything that a user does is in it."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import polars as pl
import pytest
from wheels_support import freeze_here

from pairclf.packaging.wheelhouse import _own_wheel

ROOT = Path(__file__).parents[2]
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"

SCRIPT = """
import pairclf, polars
assert str(pairclf.__file__).startswith(PREFIX), pairclf.__file__
rows = polars.read_csv("data/verdicts/train.csv")
with pairclf.load("runs/examples/verdicts/fold0/bundle", device="cpu") as judge:
    print(judge.rank("What is it?", ["It is.", "It is not, as everyone knows.", ""]).height)
folds = pairclf.cross_validate("configs/examples/verdicts.yaml", "classical.C=0.5", "output_dir=again")
assert 0 < pairclf.evaluate("configs/examples/verdicts.yaml", "output_dir=again").model["log_loss"] < 2
X = rows.select("question", "answer_1", "answer_2").to_numpy()
model = pairclf.PairClassifier(task=folds.task.model_dump(mode="json")).fit(X, rows["verdict"].to_numpy())
print(model.predict_proba(X).shape)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _own_wheel(tmp_path_factory.mktemp("wheel"))


def test_the_wheel_holds_every_file_that_is_read(wheel: Path) -> None:
    """Templates, configs, embedded models and lists of packages; not the tests, and nothing that git ignores."""
    listing = subprocess.run(
        ["git", "ls-files", "pairclf", "configs", "kaggle"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listing.returncode:
        pytest.skip("no checkout by git")
    tracked = {name if name.startswith("pairclf/") else f"pairclf/_shipped/{name}" for name in listing.stdout.split()}
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == {name for name in tracked if (ROOT / name.replace("pairclf/_shipped/", "")).is_file()}
    assert {"pairclf/py.typed", "pairclf/_shipped/kaggle/notebook.py"} <= held


def make_environment(folder: Path, wheel: Path, registry: bool) -> Path:
    """A virtual environment in which pairclf was installed from its wheel; returns its folder of programs.

    Args:
        registry: install all that it asks for, too; else the packages of this environment are seen from within, but for
            its pairclf, as nothing executes its .pth files.
    """
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip, asked = [str(folder / "bin/python"), "-m", "pip", "--quiet", "install"], [str(wheel), "--no-deps"]
    if registry:
        asked = [f"{wheel}[kaggle]", f"torch=={version('torch')}"]  # not another build of gigabytes
    else:
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "installed.pth").write_text("".join(f"{path}\n" for path in sys.path if path.endswith("-packages")))
    subprocess.run([*pip, *asked], check=True)
    return folder / "bin"


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.parametrize("registry", [False, True], ids=["linked", "registry"])
def test_an_installed_pairclf_does_all_of_it(tmp_path: Path, wheel: Path, registry: bool) -> None:
    """From rows to a notebook, and from Python; with `registry`, from an empty environment on, and rehearsed."""
    programs, work = make_environment(tmp_path / "env", wheel, registry), tmp_path / "work"
    work.mkdir()
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    settings = {"PATH": f"{programs}:{os.environ['PATH']}", "XDG_STATE_HOME": str(tmp_path / "state"), "COLUMNS": "200"}

    def run(*arguments: str, program: str = "pairclf") -> str:
        command = [str(programs / program), *arguments]
        done = subprocess.run(
            command,
            cwd=work,
            env=kept | settings,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        assert done.returncode == 0, f"{arguments}\n{done.stdout}{done.stderr}"
        return done.stdout

    assert "rehearse" in run("--help")
    run("example", "verdicts", "--rows", "120")
    config = "configs/examples/verdicts.yaml"
    assert "Audit" in run("check", "data/verdicts/train.csv", "--task", config)
    run("cv", config)
    assert "log loss" in run("evaluate", config)
    said = run("-c", f"PREFIX = {str(tmp_path / 'env')!r}\n{SCRIPT}", program="python")
    assert said.split() == ["3", "(120,", "3)"]
    bundle, scored = "runs/examples/verdicts/fold0/bundle", ["--data", "data/verdicts/test.csv", "--out", "out.csv"]
    run("predict", bundle, *scored)
    assert pl.read_csv(work / "out.csv").height == 150
    few = ["train.max_steps=2", "folds.n_splits=2", "inputs.max_length=128", "output_dir=runs/tiny"]
    run("train", config, "--fold", "0", "approach=finetune", "model.base=embedded:gemma2-tiny", *few)
    run("verify", "runs/tiny/fold0/bundle")
    images = [] if registry else [f"package.image_freezes={freeze_here(tmp_path / 'images', [PYTHON], without=())}"]
    run("package", config, "package.owner=somebody", f"package.python_versions=[{PYTHON}]", *images, "--fold", "0")
    if registry:  # the image of a linked environment would have this one's pairclf
        assert "passed" in run("rehearse", "kaggle/build/verdicts")
