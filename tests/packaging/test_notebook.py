from __future__ import annotations

import ast
import hashlib
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import nbformat
import pytest

from pairclf.errors import PackagingError
from pairclf.packaging.notebook import make_notebook
from pairclf.packaging.sources import shipped

VALUES: dict[str, Any] = {
    "title": "a-notebook",
    "version": "0.1.0",
    "competition": "lmsys-chatbot-arena",
    "base": "google/gemma-2-9b-it",
    "base_model": "google/gemma-2/Transformers/gemma-2-9b-it/2",
    "bundles": ["fold0", "fold1"],
    "bundle_table": "| `fold0` | fold 0 |",
    "pythons": ["3.12"],
    "requirements": ["pairclf==0.1.0"],
    "bundle_sha256": "b" * 64,
    "wheels_sha256": "w" * 64,
}


def real(**changed: Any) -> str:
    return make_notebook(shipped("kaggle/notebook.py").read_text(encoding="utf-8"), VALUES | changed)


def code(notebook: str, identity: str) -> str:
    return next(str(cell.source) for cell in nbformat.reads(notebook, as_version=4).cells if cell.id == identity)


def test_same_bytes_each_time_and_an_id_of_its_own_for_each_cell() -> None:
    assert real() == real()
    cells = json.loads(real())["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells) >= 12
    assert not re.search(r"\{\{\w+\}\}", real())
    for cell in cells:
        if cell["cell_type"] == "code":
            ast.parse("".join(cell["source"]))


def test_commands_are_run_so_that_their_failure_stops_the_notebook() -> None:
    sources = "\n".join("".join(cell["source"]) for cell in json.loads(real())["cells"])
    assert not re.search(r"^[!%]", sources, re.MULTILINE)
    assert "--no-index" in sources
    assert [line.partition(",")[0] for line in sources.splitlines() if line.startswith("run(")] == [
        'run("pip"',
        'run("pairclf"',
        'run("pairclf"',
    ]


def test_failed_command_raises() -> None:
    seen: dict[str, Any] = {}
    exec(code(real(), "settings"), seen)
    seen["run"]("json.tool", "--help")
    with pytest.raises(subprocess.CalledProcessError):
        seen["run"]("no_such_module")


def test_values_arrive_in_code_as_python_whatever_they_hold() -> None:
    settings: dict[str, Any] = {}
    exec(code(real(title='"quoted"', bundles=['a"b', "c\\d"], base_model=""), "settings"), settings)
    assert settings["BUNDLES"] == ['a"b', "c\\d"]
    assert settings["BASE_MODEL"] == ""
    assert settings["MARKERS"] == {"bundle": "b" * 64, "wheels": "w" * 64}


def test_template_without_a_value_or_a_cell_is_refused() -> None:
    with pytest.raises(PackagingError, match="colour"):
        make_notebook('# %% first\nprint("{{colour}}")\n', {})
    with pytest.raises(PackagingError, match="no cell"):
        make_notebook("print()\n", {})


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the notebook's functions see, with an input folder in which each mount layout of Kaggle's occurs."""
    root = tmp_path / "input"
    competition = root / "competitions" / "lmsys-chatbot-arena"
    other = root / "another-competition"
    base = root / "models" / "google" / "gemma-2" / "transformers" / "gemma-2-9b-it" / "2"
    for folder in (competition, other, base):
        folder.mkdir(parents=True)
    for folder in (competition, other):
        (folder / "sample_submission.csv").write_text("id\n")
        (folder / "test.parquet").write_text("")
    (base / "config.json").write_text("{}")
    hashes = {}
    for kind, folder in (("bundle", root / "datasets" / "someone" / "a-bundle"), ("wheels", root / "a-wheels")):
        (folder / "part").mkdir(parents=True)
        (folder / "part" / "file").write_text(kind)
        files = {"part/file": hashlib.sha256(kind.encode()).hexdigest()}
        (folder / f"pairclf-{kind}.json").write_text(json.dumps({"files": files}))
        hashes[f"{kind}_sha256"] = hashlib.sha256((folder / f"pairclf-{kind}.json").read_bytes()).hexdigest()
    monkeypatch.setenv("PAIRCLF_KAGGLE_INPUT", str(root))
    notebook = real(**hashes)
    seen: dict[str, Any] = {}
    exec(code(notebook, "settings"), seen)
    seen["cell"] = code(notebook, "inputs")
    return seen


def test_inputs_are_found_wherever_they_are_mounted(names: dict[str, Any]) -> None:
    exec(names["cell"], names)
    root = names["INPUT"]
    assert names["bundles"] == [root / "datasets/someone/a-bundle" / name for name in ("fold0", "fold1")]
    assert names["wheels"] == root / "a-wheels"
    assert names["test"] == root / "competitions/lmsys-chatbot-arena/test.parquet"
    assert names["base"] == ["--base", root / "models/google/gemma-2/transformers/gemma-2-9b-it/2"]


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda root: (root / "a-wheels/part/file").write_text("wheelz"), "was changed"),
        (lambda root: (root / "a-wheels/part/file").unlink(), "is missing"),
        (lambda root: (root / "a-wheels/pairclf-wheels.json").write_text("{}"), "no pairclf-wheels.json"),
        (lambda root: (root / "competitions/lmsys-chatbot-arena/test.parquet").unlink(), "no lmsys-chatbot-arena"),
        (lambda root: next(root.rglob("config.json")).unlink(), "attach the model"),
    ],
)
def test_what_is_missing_or_changed_is_named(names: dict[str, Any], spoil: Any, complaint: str) -> None:
    spoil(names["INPUT"])
    with pytest.raises(AssertionError, match=complaint):
        exec(names["cell"], names)
