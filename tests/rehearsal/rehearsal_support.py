"""A real package, of models that were trained for two steps, for rehearsals of the real kernel."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path

import polars as pl

from pairclf.config import Config, resolve
from pairclf.data.arena import generate, write_lmsys
from pairclf.jobs.fit import fit
from pairclf.packaging.build import package

RUNNING = f"{sys.version_info.major}.{sys.version_info.minor}"
TEST_ROWS = 40


def running_profile(folder: Path) -> Path:
    """An image that has all that this environment has, so that pairclf's own wheel is all that is carried."""
    found = {one.name: one.version for one in distributions() if one.name != "pairclf"}
    folder.mkdir(parents=True, exist_ok=True)
    freeze = "".join(f"{name}=={version}\n" for name, version in sorted(found.items()))
    (folder / f"python{RUNNING}.txt").write_text(freeze)
    return folder


def tiny_config(folder: Path, **settings: object) -> Config:
    """Its run, and its rows, lie in `folder`."""
    data = folder / "data"
    if not data.exists():
        write_lmsys(generate(80, seed=1), data, n_test=TEST_ROWS)
    return resolve(
        {
            "output": str(folder / "run"),
            "data": {"folder": str(data), "train": ["train.csv"], "test": str(data / "test.csv")},
            "folds": {"n": 2},
            "inputs": {"max_length": 128},
            "train": {"max_steps": 2, "rows_per_step": 8},
            "predict": {"tokens_per_batch": 512},
            "package": {
                "owner": "someone",
                "name": "end-to-end",
                "pythons": [RUNNING],
                "images": str(running_profile(folder / "images")),
                **settings,
            },
        }
    )


def tiny_package(folder: Path, folds: Sequence[int] = (0,), **settings: object) -> Path:
    """Train and package."""
    config = tiny_config(folder, **settings)
    return package(config, [fit(config, fold) for fold in folds], folder / "package")


def files_of(folder: Path) -> tuple[Path, Path]:
    """Its test file and sample submission."""
    return folder / "data" / "test.csv", folder / "data" / "sample_submission.csv"


def alike(one: Path, other: Path, tolerance: float = 1e-6) -> bool:
    """Whether two submissions have the same rows, and probabilities within the tolerance."""
    here, there = pl.read_csv(one), pl.read_csv(other)
    if here["id"].to_list() != there["id"].to_list():
        return False
    return all(float((here[name] - there[name]).abs().max()) <= tolerance for name in here.columns[1:])  # type: ignore[arg-type]
