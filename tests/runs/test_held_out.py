"""Runs and files of scores stand on the same rows, whatever their order; other rows, and seen ones, are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from pairclf.data.scores import class_matrix, read_scores, write_scores
from pairclf.errors import ConfigError, DataError, LeakError, PairclfError
from pairclf.run import FOLDS
from pairclf.runs.held_out import open_runs
from pairclf.task import LMSYS

ROWS = 148


@pytest.fixture
def scores(arms: Path) -> pl.DataFrame:
    return read_scores(arms / "runs" / "strong" / "oof.parquet", LMSYS)


def test_runs_configs_and_files_of_any_order_are_the_same(arms: Path, scores: pl.DataFrame, tmp_path: Path) -> None:
    plain = scores.select("id", *reversed(LMSYS.classes))
    plain.sample(fraction=1, shuffle=True, seed=3).write_csv(tmp_path / "by-hand.csv")
    write_scores(tmp_path / "strong.parquet", scores)
    paths = [arms / "runs" / "plain", arms / "strong.yaml", tmp_path / "strong.parquet", tmp_path / "by-hand.csv"]
    common = open_runs(paths)
    assert [run.name for run in common.runs] == ["plain", str(paths[1]), str(paths[2]), "by-hand"]
    assert len(common.ids) == ROWS
    for run in common.runs[2:]:
        assert run.probabilities == pytest.approx(common.runs[1].probabilities, abs=1e-12)
    assert np.abs(common.runs[0].probabilities - common.runs[1].probabilities).max() > 0.01
    labels = pl.read_csv(arms / "train.csv", schema_overrides={"id": pl.String})
    by_id = dict(zip(labels["id"], labels.select(LMSYS.classes).rows(), strict=True))
    assert [tuple(map(int, row)) for row in common.targets] == [by_id[row] for row in common.ids]
    folds = pl.read_csv(arms / "runs" / "plain" / FOLDS, schema_overrides={"id": pl.String})
    assert common.folds is not None
    assert dict(zip(common.ids, common.folds.tolist(), strict=True)) == dict(folds.select("id", "fold").iter_rows())
    assert dict(zip(common.ids, common.groups.tolist(), strict=True)) == dict(folds.select("id", "group").iter_rows())


def test_classes_are_matched_by_name(arms: Path) -> None:
    common = open_runs([arms / "runs" / "plain", arms / "runs" / "renamed"])
    plain, renamed = (run.probabilities for run in common.runs)
    assert renamed == pytest.approx(plain, abs=1e-3)  # the same model, fitted with its classes in another order
    assert np.abs(renamed[:, ::-1] - plain).max() > 0.05, "matched by position they would differ"
    other = open_runs([arms / "runs" / "renamed", arms / "runs" / "plain"])
    assert other.task.classes[0] == "winner_tie"
    assert other.runs[1].probabilities == pytest.approx(other.runs[0].probabilities, abs=1e-3)
    assert other.targets[:, 0].sum() == common.targets[:, 2].sum()


def test_one_fold_and_flips(arms: Path) -> None:
    common = open_runs([arms / "runs" / "plain", arms / "runs" / "strong"], folds=[1])
    assert common.folds is not None
    assert {*common.folds} == {1}
    assert all(list(run.trained) == [1] for run in common.runs)
    assert common.runs[0].flips is not None
    assert not common.runs[0].flips.any()  # a classical model is equivariant under the swap


def test_other_rows_are_refused_with_their_number(arms: Path, scores: pl.DataFrame, tmp_path: Path) -> None:
    write_scores(tmp_path / "part.parquet", scores[:100])
    paths = [arms / "runs" / "plain", tmp_path / "part.parquet"]
    with pytest.raises(DataError, match=r"has scored 100 rows and .*plain 148: 48 are missing, 0 are in .* alone"):
        open_runs(paths)
    common = open_runs(paths, common=True)
    assert {*common.ids} == {*scores["id"][:100]}
    assert len(common.runs[0].probabilities) == 100


def changed(scores: pl.DataFrame, **columns: object) -> pl.DataFrame:
    """The first row's cells changed."""
    first = [
        pl.when(pl.int_range(pl.len()) == 0).then(pl.lit(value)).otherwise(name).alias(name)
        for name, value in columns.items()
    ]
    return scores.with_columns(first)


SPOILED: dict[str, tuple[Callable[[pl.DataFrame], pl.DataFrame], type[PairclfError], str]] = {
    "sum": (lambda frame: changed(frame, winner_tie=0.999), DataError, "1 row do not sum to one"),
    "nan": (lambda frame: changed(frame, winner_tie=float("nan")), DataError, "1 row are no finite numbers"),
    "repeated": (lambda frame: pl.concat([frame, frame[:1]]), DataError, "ids that are empty or stand twice"),
    "missing id": (lambda frame: changed(frame, id=None), DataError, "ids that are empty or stand twice"),
    "unknown id": (lambda frame: changed(frame, id="nobody"), DataError, "1 are missing, 1 are in"),
    "seen": (
        lambda frame: frame.with_columns(pl.lit(1, pl.UInt16).alias("seen")),
        LeakError,
        "were trained on the prompts of 148 rows that they scored",
    ),
    "other text": (
        lambda frame: frame.with_columns(pl.col("row_hash").shift(1).fill_null(7)),
        DataError,
        "the id of a row here and other texts",
    ),
    "no class": (lambda frame: frame.drop("winner_tie"), DataError, r"columns \['winner_tie'\] are missing"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_scores_that_can_not_be_used(name: str, arms: Path, scores: pl.DataFrame, tmp_path: Path) -> None:
    spoil, kind, words = SPOILED[name]
    frame = spoil(scores)
    frame.write_parquet(tmp_path / "spoiled.parquet")
    with pytest.raises(kind, match=words):
        open_runs([arms / "runs" / "plain", tmp_path / "spoiled.parquet"])


def test_rows_that_foreign_models_have_seen_can_be_left_out(arms: Path, scores: pl.DataFrame, tmp_path: Path) -> None:
    """As the error says."""
    plain, file = arms / "runs" / "plain", tmp_path / "theirs.parquet"
    theirs = scores.with_columns(pl.int_range(pl.len(), dtype=pl.UInt16).lt(9).cast(pl.UInt16).alias("seen"))
    theirs.write_parquet(file)
    with pytest.raises(LeakError, match=r"9 rows that they scored[\s\S]*`seen` is above 0[\s\S]*--common"):
        open_runs([plain, file])
    theirs.filter(pl.col("seen") == 0).write_parquet(file)
    assert len(open_runs([plain, file], common=True).ids) == ROWS - 9


def test_what_can_not_be_compared(arms: Path, scores: pl.DataFrame, tmp_path: Path) -> None:
    plain = arms / "runs" / "plain"
    write_scores(tmp_path / "a.parquet", scores)
    with pytest.raises(ConfigError, match=r"there is no nosuch\.yaml, nosuch"):
        open_runs([Path("nosuch.yaml"), arms / "runs" / "plain", Path("nosuch")])
    with pytest.raises(ConfigError, match="a run is given twice"):
        open_runs([plain, plain])
    with pytest.raises(ConfigError, match="don't say which labels they belong to"):
        open_runs([tmp_path / "a.parquet"])
    assert len(open_runs([tmp_path / "a.parquet"], arms / "plain.yaml").ids) == ROWS
    with pytest.raises(ConfigError, match="holds no finished training"):
        open_runs([plain, tmp_path])
    with pytest.raises(ConfigError, match="fold 7 does not exist"):
        open_runs([plain], folds=[7])
    (tmp_path / "wsdm.yaml").write_text(f"{{task: wsdm, data: {{folder: {arms}, train: [train.csv]}}}}")
    with pytest.raises(ConfigError, match=r"has the classes model_a, model_b, and others have winner_model_a"):
        open_runs([plain, tmp_path / "wsdm.yaml"])


def test_without_folds_equal_prompts_are_one_group(arms: Path, scores: pl.DataFrame, tmp_path: Path) -> None:
    write_scores(tmp_path / "a.parquet", scores)
    config = tmp_path / "config.yaml"
    config.write_text(f"extends: {arms / 'plain.yaml'}\noutput_dir: {tmp_path / 'nothing'}\n")
    common = open_runs([tmp_path / "a.parquet"], config)
    assert common.folds is None
    assert 2 < len(np.unique(common.groups)) < ROWS
    with_folds = open_runs([arms / "runs" / "plain"])
    assert class_matrix(scores, LMSYS).shape == (ROWS, 3)
    assert len(np.unique(with_folds.groups)) <= len(np.unique(common.groups))
