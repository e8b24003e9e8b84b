"""Rehearsals without a model: an image that costs nothing, and a report."""

from __future__ import annotations

import os
import subprocess
import sysconfig
import tempfile
import venv
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from pairclf.hardware import MACHINES
from pairclf.rehearsal import projection, workspace
from pairclf.rehearsal.rehearse import Options, rehearse
from pairclf.rehearsal.report import Parity, Projection, RehearsalReport, ScoredRows


def make_light_image(folder: Path, hidden: Collection[str]) -> Path:
    """An environment with links to what lies in this one's site-packages, but to pairclf: pip can install that."""
    venv.EnvBuilder(symlinks=True, with_pip=False).create(folder)
    site = next(folder.glob("lib/python*/site-packages"))
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if "pairclf" not in path.name:
            (site / path.name).symlink_to(path)
    return folder / "bin" / "python"


HEAVY = ("torch", "transformers", "accelerate", "peft")
"""Packages of language models, which a classical model does without."""


def block(site: Path) -> None:
    """Have an import of torch, and of what imports it, fail from this folder, and leave a file `imported` if it can."""
    touch = 'with suppress(OSError):\n    Path(__file__).parents[1].joinpath("imported").touch()'
    code = f"from contextlib import suppress\nfrom pathlib import Path\n{touch}\nraise ImportError\n"
    for name in HEAVY:
        (site / name).unlink(missing_ok=True)
        (site / name).mkdir(parents=True)
        (site / name / "__init__.py").write_text(code)


def make_image_without_torch(folder: Path, hidden: Collection[str]) -> Path:
    """As `make_light_image`; torch is listed there, as on Kaggle, and can't be imported."""
    python = make_light_image(folder, hidden)
    block(next(folder.glob("lib/python*/site-packages")))
    assert subprocess.run([python, "-I", "-c", "import torch"], capture_output=True, check=False).returncode
    return python


def use_light_image(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(workspace, "make_image", make_light_image)


def forecast_nothing(patch: pytest.MonkeyPatch) -> None:
    """There is no model, and how long more rows would take says something about this machine."""
    unknown = {name: replace(machine, profile=None) for name, machine in MACHINES.items()}
    patch.setattr(projection, "MACHINES", unknown)
    patch.setattr(projection, "hidden_rows", lambda slug: 0)


def rehearse_lightly(package: Path, isolation: str, environment: Mapping[str, str]) -> None:
    """Rehearse in a process of its own, with these variables."""
    os.environ.update(environment)
    tempfile.tempdir = None  # of which another process may have asked before
    workspace.make_image = make_light_image
    if isolation == "guards":
        workspace.namespaces = lambda view, folder, python: None
    rehearse(package, Options(layouts=("flat",), late=0.0))


def make_report(**changes: object) -> RehearsalReport:
    """The report of a rehearsal that passed, with changes."""
    fields: dict[str, object] = {
        "pairclf": "0.1.0", "build": "a" * 64, "kernel": "a-notebook.ipynb", "inputs": "b" * 64, "rows": 40,
        "rerun": True, "image": "versions of this environment", "layouts": ["typed", "flat"], "speed": 1.0,
        "hours": 9.0, "deadline": 30_600.0, "memory_limit": 29_000_000_000, "memory_peak": 2_900_000_000,
        "disk_limit": 20_000_000_000,
        "seconds": {"input": 1.0, "cell check": 4.0, "cell predict": 320.0},
        "parity": [Parity(bundle="fold0-01234567", rows=4, difference=1e-7, tolerance=1e-5)],
        "scored": ScoredRows(both_orders=39, one_order=1, prior=0), "passed": True,
        "submission": {"rows": 40, "means": {"winner_model_a": 0.5, "winner_model_b": 0.25, "winner_tie": 0.25}},
        "projections": [
            Projection(machine="2 x Tesla T4", rows=25_000, predict=15_000.0, rest=300.0, source="", judged=True)
        ],
    }  # fmt: skip
    return RehearsalReport.model_validate(fields | changes)
