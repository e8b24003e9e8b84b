"""The demo really learns, and its last stage is the packaged notebook, executed offline."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from pairclf.demo.demo import demo


@pytest.mark.slow
def test_demo_learns_and_ends_with_a_submission(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # `make demo` trains the other fold too.
    judged = demo(tmp_path / "demo", ["folds.run=[0]"])
    folder = tmp_path / "demo"
    assert judged.best is not None
    assert judged.best < judged.model["log_loss"] < judged.prior["log_loss"]
    assert judged.way is not None
    assert judged.way >= 0.5
    assert judged.swap_gain is not None
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["test_log_loss"] < (judged.prior["log_loss"] + judged.best) / 2
    sample = pl.read_csv(folder / "data" / "sample_submission.csv", infer_schema=False)
    submission = pl.read_csv(folder / "kaggle" / "rehearsal" / "submission.csv", infer_schema=False)
    assert submission["id"].to_list() == sample["id"].to_list()
    printed = capsys.readouterr().out
    for words in ("class prior", "best possible", "gained by the swap", "accuracy", "seconds: training", "submission"):
        assert words in printed
