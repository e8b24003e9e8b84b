"""Finished runs that tests of comparing, blending and sweeping share, to read only."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.runs import shared_folder

from pairclf.config import Config, dump_config, resolve
from pairclf.demo.arena import generate, write_lmsys
from pairclf.run import FOLDS
from pairclf.runs.cv import cross_validate

ARMS: dict[str, dict[str, object]] = {
    "plain": {},
    "other-seed": {"seed": 1},
    "strong": {"classical": {"C": 0.01}},
    "renamed": {"task": {"classes": ["winner_tie", "winner_model_b", "winner_model_a"]}},
}
"""Classical runs on the same rows and folds, and what they change; the last has its classes in another order."""


def arm_config(folder: Path, name: str) -> Config:
    from pairclf.task import LMSYS

    change = ARMS[name]
    task = LMSYS.model_dump(mode="json") | (change.get("task") or {})  # type: ignore[operator]
    return resolve(
        {
            "approach": "classical",
            "output_dir": str(folder / "runs" / name),
            "data": {"folder": str(folder), "train": ["train.csv"], "test": str(folder / "test.csv")},
            "folds": {"n_splits": 2},
            **change,
            "task": task,
            "classical": {"n_features": 256, "dense": False, **change.get("classical", {})},  # type: ignore[dict-item]
        }
    )


@pytest.fixture(scope="session")
def arms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an arena, a config `plain.yaml`, and the runs of `ARMS` below `runs`."""

    def fill(folder: Path) -> None:
        write_lmsys(generate(160, seed=1), folder, n_test=12)
        for name in ARMS:
            config = arm_config(folder, name)
            first, own = (folder / "runs" / run / FOLDS for run in ("plain", name))
            if own != first:
                own.parent.mkdir(parents=True)
                shutil.copyfile(first, own)
            cross_validate(config)
            (folder / f"{name}.yaml").write_text(dump_config(config), encoding="utf-8")

    return shared_folder(tmp_path_factory, "arms", fill)
