"""Bundles and rows that tests of `import pairclf` share."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from support.faults import quick
from support.runs import shared_folder

from pairclf.inference import pool
from pairclf.task import LMSYS

FIELDS = list(LMSYS.fields)


@pytest.fixture(scope="session")
def pairs_of_words() -> tuple[pl.DataFrame, np.ndarray]:
    """36 rows whose winner can be read from the text, and their labels."""
    rng = np.random.default_rng(0)
    texts = [["good answer", "bad answer"], ["bad answer", "good answer"], ["good answer", "good answer"]]
    labels = rng.permutation(np.repeat(np.arange(3), 12))
    rows = [[f"prompt {number}", *texts[label]] for number, label in enumerate(labels)]
    return pl.DataFrame(rows, schema=FIELDS, orient="row"), np.array(LMSYS.classes)[labels]


@pytest.fixture(scope="session")
def classical_config(pairs_of_words: tuple[pl.DataFrame, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Settings of a classical run with two trained folds, as a dict."""
    import pairclf

    frame, labels = pairs_of_words
    columns = [pl.Series(name, (labels == name).astype(int)) for name in LMSYS.classes]

    def config_in(folder: Path) -> dict:
        return {
            "approach": "classical", "output_dir": str(folder / "run"),
            "data": {"folder": str(folder), "train": "train.parquet", "rules": {"undecodable": "fix"}},
            "folds": {"n_splits": 2, "near_duplicate_threshold": None}, "classical": {"n_features": 512},
        }  # fmt: skip

    def fill(folder: Path) -> None:
        frame.with_row_index("id").with_columns(columns).write_parquet(folder / "train.parquet")
        pairclf.cross_validate(config_in(folder))

    return config_in(shared_folder(tmp_path_factory, "api-classical", fill))


@pytest.fixture(scope="session")
def classical_bundles(classical_config: dict) -> list[Path]:
    return [Path(classical_config["output_dir"]) / f"fold{fold}" / "bundle" for fold in (0, 1)]


@pytest.fixture(scope="module", autouse=True)
def _quick_workers() -> Iterator[None]:
    """As `quick_workers`, for models that stay loaded, too."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("predict", "resident"):
            patch.setattr(f"pairclf.inference.{module}.ProcessPool", partial(pool.ProcessPool, load=quick))
        yield
