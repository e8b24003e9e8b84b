"""The gateway of rehearsals refuses what Kaggle's would, and writes what `predict` answered."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from threading import Event, current_thread, main_thread
from typing import Any

import pandas as pd
import polars as pl
import psutil
import pytest
from polars.testing import assert_frame_equal

from pairclf.rehearsal import gateway
from pairclf.rehearsal.gateway import DefaultInferenceServer, GatewayError

CLASSES = ["winner_model_a", "winner_model_b", "winner_tie"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A competition's folder whose sample stands in another order than its rows; the working folder is beside it."""
    made = tmp_path / "competition"
    made.mkdir()
    ids = list(range(2 * gateway.ROWS + 1))
    pl.DataFrame({"id": ids, "prompt": [f"question {row}" for row in ids]}).write_csv(made / "test.csv")
    thirds = {name: [1 / 3] * len(ids) for name in CLASSES}
    pl.DataFrame({"id": ids[::-1], **thirds}).write_csv(made / "sample_submission.csv")
    (tmp_path / "working").mkdir()
    monkeypatch.chdir(tmp_path / "working")
    return made


def server(listener: Callable[..., Any], age: float = 0.0, clock: Callable[[], float] = lambda: 0.0) -> Any:
    """That of a notebook which began `age` seconds ago."""
    return DefaultInferenceServer(listener, age=lambda: age, clock=clock)


def predict(test: pl.DataFrame, sample: pl.DataFrame) -> pl.DataFrame:
    return test.select("id").with_columns(
        winner_model_a=pl.col("id") / 1000, winner_model_b=pl.lit(0.5), winner_tie=0.5 - pl.col("id") / 1000
    )


def test_all_rows_are_asked_for_in_batches_from_another_thread_and_written(folder: Path) -> None:
    sizes = []

    def noting(test: pl.DataFrame, sample: pl.DataFrame) -> pd.DataFrame:
        sizes.append(len(test))
        assert current_thread() is not main_thread()
        assert test["id"].to_list() == sample["id"].to_list()
        return predict(test, sample).to_pandas()

    noting.__name__ = "predict"
    server(noting).run_local_gateway((folder,))
    assert sizes == [gateway.ROWS, gateway.ROWS, 1]
    rows = pl.read_csv(folder / "test.csv")
    assert_frame_equal(pl.read_csv("submission.csv"), predict(rows, rows))


def test_files_are_found_by_where_the_gateway_lies_and_parquet_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pl.read_csv(folder / "test.csv").write_parquet(folder / "test.parquet")
    (folder / "test.csv").unlink()
    monkeypatch.setattr(gateway, "__file__", str(folder / "kaggle_evaluation" / "default_inference_server.py"))
    server(predict).serve()
    assert not Path("submission.csv").exists()
    monkeypatch.setenv("KAGGLE_IS_COMPETITION_RERUN", "1")
    server(predict).serve()
    assert len(pl.read_csv("submission.csv")) == 2 * gateway.ROWS + 1


WRONG: dict[str, tuple[Callable[[pl.DataFrame], Any], str]] = {
    "nothing": (lambda good: None, "no prediction"),
    "a list": (lambda good: good.rows(), "is a list"),
    "a row too few": (lambda good: good[1:], "expected 64 rows"),
    "another order": (lambda good: good.reverse(), "values of 'id'"),
    "ids of another dtype": (lambda good: good.with_columns(pl.col("id").cast(pl.String)), "values of 'id'"),
    "an index column": (lambda good: good.with_row_index(), "has columns"),
    "a column too few": (lambda good: good.drop("winner_tie"), "has columns"),
}


@pytest.mark.parametrize("what", WRONG)
def test_an_answer_that_kaggle_would_refuse_is_refused(what: str, folder: Path) -> None:
    spoil, message = WRONG[what]

    def predict_wrongly(test: pl.DataFrame, sample: pl.DataFrame) -> Any:
        return spoil(predict(test, sample))

    predict_wrongly.__name__ = "predict"
    with pytest.raises(GatewayError, match=message):
        server(predict_wrongly).run_local_gateway((folder,))
    assert not Path("submission.csv").exists()


def test_what_predict_raises_ends_the_run(folder: Path) -> None:
    def predict(test: pl.DataFrame, sample: pl.DataFrame) -> pl.DataFrame:
        raise ValueError("a poisoned row")

    with pytest.raises(GatewayError, match="ValueError: a poisoned row"):
        server(predict).run_local_gateway((folder,))


def test_limits_hold_by_an_accelerated_clock(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first answer an hour, of the others five minutes, of the start a quarter of an hour."""
    monkeypatch.setenv("PAIRCLF_CLOCK_SPEED", "1000")
    now, calls = 0.0, 0

    def slow(test: pl.DataFrame, sample: pl.DataFrame) -> pl.DataFrame:
        nonlocal now, calls
        calls += 1
        now += 0.5  # 500 s by that clock
        return predict(test, sample)

    slow.__name__ = "predict"
    with pytest.raises(GatewayError, match="no answer to a batch"):
        server(slow, age=0.8, clock=lambda: now).run_local_gateway((folder,))
    assert calls == 2
    with pytest.raises(GatewayError, match=r"serve\(\) came 1 s after the start"):
        server(predict, age=1.0).serve()
    with pytest.warns(RuntimeWarning, match="starts too late"):
        server(predict, age=1.0).run_local_gateway((folder,))


def test_an_answer_that_never_comes_is_not_waited_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "BATCH_SECONDS", 0.01)
    over, calls = Event(), 0

    def hang(test: pl.DataFrame, sample: pl.DataFrame) -> pl.DataFrame:
        nonlocal calls
        calls += 1
        if calls > 1:
            over.wait()
        return predict(test, sample)

    hang.__name__ = "predict"
    with pytest.raises(GatewayError, match="no answer to a batch"):
        server(hang).run_local_gateway((folder,))
    over.set()


def test_the_start_is_that_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    began = psutil.Process().create_time() - psutil.boot_time()  # seconds after the machine's start
    monkeypatch.setattr(gateway.time, "clock_gettime", lambda _: began + 5.0)
    assert gateway.seconds_since_start() == pytest.approx(5.0, abs=0.02)


def test_other_rows_in_the_sample_and_missing_files_are_named(folder: Path) -> None:
    pl.read_csv(folder / "sample_submission.csv")[1:].write_csv(folder / "sample_submission.csv")
    with pytest.raises(GatewayError, match="different rows"):
        gateway.read((folder,))
    (folder / "test.csv").unlink()
    with pytest.raises(GatewayError, match=r"no test\.csv"):
        gateway.read((folder,))
    with pytest.raises(GatewayError, match="no listener for predict"):
        DefaultInferenceServer(print)


def test_it_needs_nothing_of_ours() -> None:
    tree = ast.parse(Path(gateway.__file__).read_text(encoding="utf-8"))
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert not {name for name in names if str(name).startswith("pairclf")}
