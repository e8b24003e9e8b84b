"""The real chain: a classifier trained here, packaged, and scored by its notebook as it is scored here."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from pairclf.config import resolve
from pairclf.data.arena import generate, write_lmsys
from pairclf.files import sha256_tree
from pairclf.jobs.fit import fit
from pairclf.jobs.predict import predict
from pairclf.packaging.build import package
from pairclf.packaging.rehearse import rehearse
from pairclf.packaging.wheelhouse import repack


@pytest.mark.slow
def test_notebook_gives_the_submission_that_predict_gives_here(tmp_path: Path, registry: Path) -> None:
    repack("bitsandbytes", registry)
    data = tmp_path / "data"
    write_lmsys(generate(160, seed=1), data, n_test=40)
    config = resolve(
        {
            "output": str(tmp_path / "run"),
            "data": {"folder": str(data), "train": ["train.csv"]},
            "folds": {"n": 2},
            "inputs": {"max_length": 128},
            "train": {"max_steps": 2, "rows_per_step": 8},
            "package": {"owner": "someone", "name": "end-to-end"},
        }
    )
    bundles = [fit(config, fold) for fold in (0, 1)]
    test, sample = data / "test.csv", data / "sample_submission.csv"
    predict(bundles, test, tmp_path / "here.csv", sample=sample)

    made = package(config, bundles, tmp_path / "package")
    assert sha256_tree(made) == sha256_tree(package(config, bundles, tmp_path / "again"))
    report = rehearse(made, test, sample, tmp_path / "out")

    here, there = (pl.read_csv(path) for path in (tmp_path / "here.csv", tmp_path / "out" / "submission.csv"))
    assert there["id"].to_list() == pl.read_csv(sample)["id"].to_list()
    assert here.equals(there)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["submission"]["rows"] == len(here) == 40
    assert {"cell install", "cell verify", "cell predict"} <= report.seconds.keys()
    assert report.peak_mb > 200
