"""Teachers never saw what they teach: bundles know their rows, scores carry it on, and in-sample ones are refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from support.faults import quick
from support.runs import config_of

from pairclf.bundles.bundle import open_bundle
from pairclf.bundles.contents import TRAINED_ON
from pairclf.config import Config, override
from pairclf.data.folds import prompt_hashes
from pairclf.data.identity import prompt_marks, row_hashes
from pairclf.data.scores import HASHES, class_matrix, read_scores, scores_frame, write_scores
from pairclf.data.teachers import out_of_sample, teachers_of
from pairclf.errors import BundleError, ConfigError, DataError, LeakError
from pairclf.inference.ensemble import open_ensemble
from pairclf.inference.pool import ProcessPool
from pairclf.inference.predict import _trained_on_rows, predict
from pairclf.run import Run, labelled_rows
from pairclf.task import LMSYS

UNPROVEN = "train.distill.allow_unknown_provenance=true"


@pytest.fixture(scope="module")
def run(trained_run: Callable[[str], Path]) -> Config:
    """A finished cross-validation of two folds on a small arena, some of whose rows have no prompt."""
    return config_of(trained_run("gemma2"))


@pytest.fixture(scope="module")
def frame(run: Config) -> pl.DataFrame:
    return labelled_rows(run)


def output(config: Config) -> Path:
    assert config.output_dir is not None
    return config.output_dir


def bundle(config: Config, fold: int) -> Path:
    return output(config) / f"fold{fold}" / "bundle"


def taught(config: Config, *scores: Path, **settings: object) -> Config:
    overrides = [f"train.distill.{name}={value}" for name, value in settings.items()]
    listed = ", ".join(f"'{path}'" for path in scores)
    return override(config, [f"train.distill.scores=[{listed}]", *overrides])


@pytest.fixture(scope="module")
def in_sample(run: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scores of all training rows by the bundle that held fold 0 out and was trained on fold 1."""
    folder = tmp_path_factory.mktemp("in-sample")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pairclf.inference.predict.ProcessPool", partial(ProcessPool, load=quick))
        predict([bundle(run, 0)], run.data.path(Path("train.csv")), folder / "s.csv", scores=folder / "scores.parquet")
    return folder / "scores.parquet"


def test_trained_on_holds_the_prompts_of_the_training(run: Config, frame: pl.DataFrame, tmp_path: Path) -> None:
    for fold in (0, 1):
        training, held_out = Run(run).split(fold)
        trained_on = open_bundle(bundle(run, fold)).trained_on()
        assert trained_on is not None
        assert trained_on.schema == {"prompt": pl.UInt64, "sample": pl.List(pl.UInt32)}
        assert trained_on["prompt"].to_list() == sorted(set(prompt_hashes(training, LMSYS)))
        assert held_out is not None
        assert not set(trained_on["prompt"]) & set(prompt_hashes(held_out, LMSYS))
    assert TRAINED_ON in open_bundle(bundle(run, 0)).manifest.files
    liar = Path(shutil.copytree(bundle(run, 0), tmp_path / "bundle"))
    pl.read_parquet(liar / TRAINED_ON)[:1].write_parquet(liar / TRAINED_ON)  # it would deny what it saw
    with pytest.raises(BundleError, match=TRAINED_ON):
        open_bundle(liar)


def test_predict_marks_rows_that_the_bundle_was_trained_on(run: Config, frame: pl.DataFrame, in_sample: Path) -> None:
    training, held_out = Run(run).split(0)
    assert held_out is not None
    scores = read_scores(in_sample, LMSYS)
    seen = dict(zip(scores["id"], scores["seen"], strict=True))
    assert {seen[row] for row in training["id"]} == {1}
    assert {seen[row] for row in held_out["id"]} == {0}
    oof = read_scores(output(run) / "oof.parquet", LMSYS)
    assert set(oof["seen"]) == {0}
    both = scores.select("id", "prompt").join(oof.select("id", "prompt"), on="id", suffix="_oof")
    assert both["prompt"].equals(both["prompt_oof"], check_names=False)


def test_seen_finds_prompts_nearly_trained_on(run: Config, frame: pl.DataFrame) -> None:
    """One added "!" keeps a row in its fold, and does not make it new to the model."""
    training, held_out = Run(run).split(0)
    assert held_out is not None
    long = pl.col("prompt").list.join("").str.len_chars() > 40
    changed = pl.col("prompt").list.eval(pl.element() + pl.lit("!"))
    for rows, wanted in ((training, True), (held_out, False)):
        marks = prompt_marks(rows.filter(long).with_columns(prompt=changed), LMSYS)
        assert len(marks) > 1
        seen = _trained_on_rows(open_ensemble([bundle(run, 0)], None, ()), marks)
        assert seen is not None
        assert set(seen[0]) == {wanted}
        assert not marks["prompt"].is_in(prompt_hashes(training, LMSYS).to_list()).any()


def test_teachers_of_takes_out_of_fold_scores(run: Config, frame: pl.DataFrame, in_sample: Path) -> None:
    training, held_out = Run(run).split(0)
    assert held_out is not None
    oof = output(run) / "oof.parquet"
    assert teachers_of(run, training) is None
    found = teachers_of(taught(run, oof), training.reverse())
    expected = training.reverse().select("id").join(read_scores(oof, LMSYS), on="id", maintain_order="left")
    np.testing.assert_array_equal(found, class_matrix(expected, LMSYS))
    # The bundle of fold 0 never saw the rows of fold 0: a student that is trained on fold 0 may learn from it.
    assert teachers_of(taught(run, in_sample), held_out) is not None


def test_teachers_of_refuses_in_sample_scores(run: Config, frame: pl.DataFrame, in_sample: Path) -> None:
    training, held_out = Run(run).split(0)
    assert held_out is not None
    for rows in (training, frame, pl.concat([held_out, training[3:4]])):
        for settings in ({}, {"allow_unknown_provenance": "true"}):
            with pytest.raises(LeakError, match="trained on the very row") as caught:
                teachers_of(taught(run, output(run) / "oof.parquet", in_sample, **settings), rows)
            assert set(caught.value.rows) <= set(training["id"])
            assert caught.value.where == in_sample
            assert "oof.parquet" in str(caught.value)


@pytest.mark.usefixtures("quick_workers")
def test_teachers_of_refuses_a_blend_with_one_model_that_saw_the_row(
    run: Config, frame: pl.DataFrame, tmp_path: Path
) -> None:
    """A mean over all folds' bundles looks out-of-fold and is not: every row was seen by all models but one."""
    mixed = tmp_path / "mixed.parquet"
    data = run.data.path(Path("train.csv"))
    scores = predict([bundle(run, 0), bundle(run, 1)], data, tmp_path / "s.csv", scores=mixed)
    assert set(scores["seen"]) == {1}
    with pytest.raises(LeakError, match="trained on the very row"):
        teachers_of(taught(run, mixed), Run(run).split(0)[0])


def test_teachers_of_refuses_scores_of_unknown_origin(run: Config, frame: pl.DataFrame, tmp_path: Path) -> None:
    """Scores of unknown origin are not taken for out-of-sample ones, unless the user says so."""
    oof = read_scores(output(run) / "oof.parquet", LMSYS)
    foreign, older = tmp_path / "foreign.parquet", tmp_path / "older.parquet"
    oof.select("id", *LMSYS.classes).cast(dict.fromkeys(LMSYS.classes, pl.Float32)).write_parquet(foreign)
    oof.drop("seen", *HASHES).write_parquet(older)
    forgetful = oof.with_columns(seen=pl.lit(None, dtype=pl.UInt16))
    write_scores(tmp_path / "forgetful.parquet", forgetful)
    training = Run(run).split(0)[0]
    expected = teachers_of(taught(run, output(run) / "oof.parquet"), training)
    for path in (foreign, older, tmp_path / "forgetful.parquet"):
        with pytest.raises(LeakError, match="do not say whether") as caught:
            teachers_of(taught(run, path), training)
        assert UNPROVEN in str(caught.value)
        allowed = teachers_of(taught(run, path, allow_unknown_provenance="true"), training)
        np.testing.assert_allclose(allowed, expected, atol=1e-6)


def test_teachers_of_refuses_scores_of_other_rows_with_the_same_ids(
    run: Config, frame: pl.DataFrame, tmp_path: Path
) -> None:
    """The wrong variant: the same file, its ids shifted by one row. Without the hashes it would be taken."""
    oof = read_scores(output(run) / "oof.parquet", LMSYS)
    shifted = oof.with_columns(id=pl.Series([*oof["id"][1:], oof["id"][0]]))
    write_scores(tmp_path / "shifted.parquet", shifted)
    training = Run(run).split(0)[0]
    with pytest.raises(DataError, match="these are scores of other rows") as caught:
        teachers_of(taught(run, tmp_path / "shifted.parquet"), training)
    assert len(caught.value.rows) > len(training) / 2
    blind = shifted.with_columns(pl.lit(None, dtype=pl.UInt64).alias(name) for name in HASHES)
    write_scores(tmp_path / "blind.parquet", blind)
    assert teachers_of(taught(run, tmp_path / "blind.parquet"), training) is not None


def test_teachers_of_refuses_rows_with_their_sides_exchanged(run: Config, frame: pl.DataFrame) -> None:
    """Prompt and id are the row's; the probabilities of A and B stand the wrong way round."""
    training = Run(run).split(0)[0]
    a, b = LMSYS.swap_fields or ("", "")
    mirrored = training.with_columns(training[a].alias(b), training[b].alias(a))
    unlike = mirrored.filter(row_hashes(mirrored, LMSYS)["row_hash"] != row_hashes(training, LMSYS)["row_hash"])
    assert len(unlike) > 10
    with pytest.raises(DataError, match="its sides exchanged") as caught:
        teachers_of(taught(run, output(run) / "oof.parquet"), mirrored)
    assert set(caught.value.rows) == set(unlike["id"])


def test_teachers_of_averages_those_that_scored_the_row(run: Config, frame: pl.DataFrame, tmp_path: Path) -> None:
    ids, hashes = frame["id"].to_list()[:4], row_hashes(frame[:4], LMSYS)
    rng = np.random.default_rng(0)
    a, b = rng.dirichlet(np.ones(3), size=(2, 4))
    kwargs = {"orders": 2, "models": ["m"], "seen": 0}
    write_scores(tmp_path / "a.parquet", scores_frame(ids[:3], a[:3], LMSYS, hashes=hashes[:3], **kwargs))
    write_scores(tmp_path / "b.parquet", scores_frame(ids[1:], b[1:], LMSYS, hashes=hashes[1:], **kwargs))
    config = taught(run, tmp_path / "a.parquet", tmp_path / "b.parquet")
    found = teachers_of(config, frame[:5])
    expected = np.array([a[0], (a[1] + b[1]) / 2, (a[2] + b[2]) / 2, b[3], [np.nan] * 3])
    np.testing.assert_allclose(found, expected)
    with pytest.raises(DataError, match="none of the 2 training rows is scored"):
        teachers_of(config, frame[4:6])
    with pytest.raises(ConfigError, match="names a file twice"):
        teachers_of(taught(run, tmp_path / "a.parquet", tmp_path / "a.parquet"), frame[:5])


def test_out_of_sample_leaves_out_rows_that_no_model_scored(tmp_path: Path, frame: pl.DataFrame) -> None:
    """`predict` gives it to rows that no time was left for; they have no model that could have seen them, either."""
    values, orders = np.full((len(frame), 3), 1 / 3), [row % 3 for row in range(len(frame))]
    write_scores(tmp_path / "s.parquet", scores_frame(frame["id"].to_list(), values, LMSYS, orders, ["m"], seen=0))
    found = out_of_sample(tmp_path / "s.parquet", frame, LMSYS, unproven=False)
    assert np.isfinite(found).all(axis=1).tolist() == [one > 0 for one in orders]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda frame: pl.concat([frame, frame[:1]]), "stand twice"),
        (lambda frame: frame.with_columns(winner_tie=pl.lit(0.9)), "do not sum to one"),
        (lambda frame: frame.with_columns(winner_tie=pl.lit(None, dtype=pl.Float64)), "no finite numbers"),
        (lambda frame: frame.rename({"winner_tie": "tie"}), "are missing; the file has"),
    ],
)
def test_teachers_of_refuses_a_file_that_is_no_table_of_scores(
    run: Config, frame: pl.DataFrame, tmp_path: Path, spoil: Callable[[pl.DataFrame], pl.DataFrame], message: str
) -> None:
    spoil(read_scores(output(run) / "oof.parquet", LMSYS)).write_parquet(tmp_path / "spoiled.parquet")
    with pytest.raises(DataError, match=message):
        teachers_of(taught(run, tmp_path / "spoiled.parquet"), frame)
