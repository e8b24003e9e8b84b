"""Packages whose kernels really score: bundles with a random head on the embedded base, which needs no other file."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from wheels_support import freeze_here

from pairclf.config import Config, parse_yaml, resolve
from pairclf.data.rows import read_rows, to_rows
from pairclf.demo.arena import generate, write_lmsys
from pairclf.inference.predict import predict
from pairclf.own_files import shipped
from pairclf.packaging import build
from pairclf.packaging.build import package
from pairclf.packaging.wheelhouse import Wheel, Wheelhouse
from pairclf.rehearsal.report import RehearsalReport
from pairclf.runs.fit import fit

RUNNING = f"{sys.version_info.major}.{sys.version_info.minor}"
TEST_ROWS = 24
_WHEEL = "pairclf-0.1.0-py3-none-any.whl"


def hollow_wheelhouse(patch: pytest.MonkeyPatch) -> None:
    """Have `package` fill its wheelhouse at no cost, with a wheel that is none."""

    def fill(folder: Path, pythons: list[str], images: Path | None, extra: list[str]) -> Wheelhouse:
        folder.mkdir(parents=True)
        (folder / _WHEEL).write_text("a wheel")
        requirements = {python: ["pairclf==0.1.0"] for python in pythons}
        return Wheelhouse([Wheel.parse(_WHEEL)], requirements, ["a note"])

    patch.setattr(build, "fill_wheelhouse", fill)
    patch.setattr(build, "check_wheels_suffice", lambda folder, requirements, images: {"3.12": "by a test"})


def random_package(
    folder: Path, folds: Sequence[int] = (0,), model: dict[str, object] | None = None, **settings: object
) -> Path:
    """Package bundles that were never trained; `settings` are those of the config's section `package`."""
    from support.runs import random_bundle  # it loads torch, which a classical package must do without

    config = _package_config(folder, settings, inputs={"max_length": 128}, model=model or {})
    rows = to_rows(read_rows([folder / "data" / "train.csv"], config.task, labelled=True), config.task)
    bundles = [
        random_bundle(folder / "run" / f"fold{fold}" / "bundle", config, seed=fold, fold=fold, rows=rows[:8])
        for fold in folds
    ]
    return package(config, bundles, folder / "package")


def classical_package(folder: Path, **settings: object) -> Path:
    """Package a bundle of the config for arena3, on few rows of its form; `settings` as in `random_package`."""
    return _trained_package(folder, "configs/arena3/classical.yaml", settings, classical={"n_estimators": 20})


def encoder_package(folder: Path, base: Path, **settings: object) -> Path:
    """Package a bundle of the recipe for MiniLM, after three steps on this BERT, whose weights are in the bundle."""
    few = {"max_steps": 3, "global_batch_size": 4}
    recipe = "configs/recipes/minilm-cpu.yaml"
    return _trained_package(folder, recipe, settings, inputs={}, model={"base": str(base)}, train=few)


def _trained_package(folder: Path, shipped_config: str, settings: dict[str, object], **changes: dict[str, Any]) -> Path:
    """Train fold 0 by sections of a config in the repository, with changes in them, and package it for its machine."""
    path = shipped(shipped_config)
    tree = parse_yaml(path.read_text(encoding="utf-8"), path)
    sections = {name: {**tree[name], **change} for name, change in changes.items()}
    if "approach" in tree:
        sections["approach"] = tree["approach"]
    settings = {"machine_shape": tree["package"]["machine_shape"], **settings}
    config = _package_config(folder, settings, **sections, folds={"n_splits": 2})
    return package(config, [fit(config, 0)], folder / "package")


def prompt_package(folder: Path, prompt: dict[str, object], model: dict[str, object]) -> Path:
    """Package the embedded base and what it is shown of few rows; `prompt` is that section."""
    sections: dict[str, object] = {"approach": "prompt", "prompt": prompt, "model": model, "folds": {"n_splits": 2}}
    config = _package_config(folder, {}, inputs={"max_length": 512}, **sections)
    return package(config, [fit(config, 0)], folder / "package")


def _package_config(folder: Path, settings: dict[str, object], **sections: object) -> Config:
    data = folder / "data"
    if not data.exists():
        write_lmsys(generate(48, seed=1), data, n_test=TEST_ROWS)
    tree = {
        "output_dir": str(folder / "run"),
        "data": {"folder": str(data), "train": ["train.csv"], "test": str(data / "test.csv")},
        "predict": {"tokens_per_batch": 512},
        "package": {
            "owner": "someone",
            "name": "a-notebook",
            "python_versions": [RUNNING],
            "image_freezes": str(freeze_here(folder / "images", [RUNNING], without=())),
            **settings,
        },
    }
    return resolve({**tree, **sections})


def files_of(folder: Path) -> tuple[Path, Path]:
    """Its test file and sample submission."""
    return folder / "data" / "test.csv", folder / "data" / "sample_submission.csv"


def alike(first: Path, second: Path, tolerance: float = 1e-6) -> bool:
    """Whether two submissions have the same rows, and probabilities within the tolerance."""
    left, right = pl.read_csv(first), pl.read_csv(second)
    if left["id"].to_list() != right["id"].to_list():
        return False
    differences = [(left[name] - right[name]).abs().max() for name in left.columns[1:]]
    return all(float(largest) <= tolerance for largest in differences)  # type: ignore[arg-type]


def predicted(package: Path, out: Path, folds: Sequence[int]) -> Path:
    """The submission of `predict` in this process, written into the folder `out`."""
    test, sample = files_of(package.parent)
    bundles = [package.parent / "run" / f"fold{fold}" / "bundle" for fold in folds]
    predict(bundles, test, out / "here.csv", sample=sample)
    return out / "here.csv"


def assert_scores_as_here(
    package: Path, report: RehearsalReport, out: Path, folds: Sequence[int] = (0,), tolerance: float = 1e-4
) -> None:
    """The rehearsal passed, and its submission is that of `predict` in this process."""
    assert report.passed
    assert len(report.parity) == len(folds)
    assert alike(predicted(package, out, folds), package / "rehearsal" / "submission.csv", tolerance)
    assert report.scored is not None
    assert report.scored.both_orders == TEST_ROWS
