"""The demo's blend: a classical model on the run's own folds, and an ensemble's file of both."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from pairclf.config import resolve
from pairclf.demo.arena import generate, write_lmsys
from pairclf.demo.demo import ENSEMBLE, blend_with_classical
from pairclf.inference.ensemble import open_ensemble
from pairclf.run import FOLDS, OOF
from pairclf.runs.cv import cross_validate


def test_a_run_is_blended_with_trees_on_its_own_folds(tmp_path: Path) -> None:
    write_lmsys(generate(154, seed=1), tmp_path / "data", n_test=4)
    tree = {
        "approach": "classical",
        "output_dir": str(tmp_path / "run"),
        "seed": 3,
        "data": {"folder": str(tmp_path / "data"), "train": ["train.csv"]},
        "folds": {"n_splits": 2},
        "classical": {"n_features": 1024},
    }
    config = resolve(tree)
    cross_validate(config)
    blended = blend_with_classical(config, tmp_path / "trees")
    again = blend_with_classical(config, tmp_path / "trees")
    assert blended.as_dict() == again.as_dict(), "the demo may run twice in a folder"
    assert blended.runs == ["run", "trees"]
    assert (tmp_path / "run" / FOLDS).read_text() == (tmp_path / "trees" / FOLDS).read_text()
    scores = [pl.read_parquet(tmp_path / name / OOF).sort("id") for name in ("run", "trees")]
    assert scores[0]["id"].equals(scores[1]["id"])
    ensemble = open_ensemble([tmp_path / ENSEMBLE], None, [])
    assert {member.bundle.folder.parents[1].name for member in ensemble.members} <= {"run", "trees"}
