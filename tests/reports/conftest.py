"""A run whose every text is hostile, and what a report gathers of it; to read only."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
from support.hostile import CLASSES, HOSTILE
from support.runs import shared_folder

from pairclf.config import resolve
from pairclf.reports.contents import Contents, gather
from pairclf.runs.cv import cross_validate

NAME = "<img src=x onerror=alert(8)>"
"""Name of the run and of its files."""

ROWS = 84


def hostile_rows() -> pl.DataFrame:
    """Rows of a prompt and two answers, whose label follows the length of the answers a little."""
    texts = [f"{HOSTILE[row % len(HOSTILE)]} {row}" for row in range(ROWS)]
    labels = [CLASSES[row % 3 if row % 4 else 0] for row in range(ROWS)]
    return pl.DataFrame(
        {
            "id": [f"{HOSTILE[row % len(HOSTILE)][:40]} {row}" for row in range(ROWS)],
            "prompt": texts,
            "a": [texts[(row + 1) % ROWS] + " long" * (9 * (labels[row] == CLASSES[0])) for row in range(ROWS)],
            "b": texts[2:] + texts[:2],
            "winner": labels,
        }
    )


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a classical run on two files of hostile rows."""

    def fill(folder: Path) -> None:
        rows = hostile_rows()
        rows[::2].write_parquet(folder / f"{NAME}.parquet")
        rows[1::2].write_parquet(folder / "other.parquet")
        task = {
            "name": "hostile", "fields": ["prompt", "a", "b"], "classes": CLASSES, "label_column": "winner",
            "swap_fields": ["a", "b"], "swap_classes": CLASSES[:2],
        }  # fmt: skip
        tree = {
            "task": task,
            "approach": "classical",
            "output_dir": str(folder / NAME),
            "data": {"folder": str(folder), "train": [f"{NAME}.parquet", "other.parquet"]},
            "folds": {"n_splits": 2, "near_duplicate_threshold": None},
            "classical": {"n_features": 256, "dense": True},
        }
        cross_validate(resolve(tree))

    return shared_folder(tmp_path_factory, "hostile", fill) / NAME


@pytest.fixture(scope="session")
def contents(hostile: Path) -> Contents:
    return gather([hostile])
