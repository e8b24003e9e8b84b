"""The synthetic arena in the files of WSDM, which knows no ties and joins the turns of a text."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from pairclf.demo.arena import Arena
from pairclf.task import WSDM


def write_wsdm(arena: Arena, folder: Path, *, n_test: int) -> None:
    """Write `train.parquet`, `test.parquet` and `sample_submission.csv`; instead of a tie, a winner is drawn."""
    train, test = arena.split(n_test)
    for part, name in ((train, "train"), (test, "test")):
        texts = {field: ["\n\n".join(map(str, getattr(row, field))) for row in part.rows] for field in WSDM.fields}
        frame = pl.DataFrame({"id": [f"{int(row.id):032x}" for row in part.rows], **texts})
        if part is train:
            labels = [row.label if row.label < 2 else round(row.draw) for row in part.rows]
            frame = frame.with_columns(winner=pl.Series([WSDM.classes[label] for label in labels]))
        else:
            sample = frame.select("id", winner=pl.lit(WSDM.classes[0]))
            sample.write_csv(folder / "sample_submission.csv")
        frame.write_parquet(folder / f"{name}.parquet")
