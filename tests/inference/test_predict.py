"""A whole prediction, with its processes and files: what happens to it, and what the submission is then."""

from __future__ import annotations

import errno
import os
import random
import signal
import sqlite3
from collections.abc import Callable
from contextlib import closing, nullcontext
from functools import partial
from importlib.metadata import version
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from clocks_support import clock_in, comes_true, turned_crew
from models_support import with_lm_head
from polars.testing import assert_frame_equal
from support.faults import PASS, faulty, quick, unloadable
from support.forked import command, forked
from support.runs import bundles_of, random_bundle, run_config

from pairclf import files as bundle_files
from pairclf.approaches import language_model
from pairclf.bundles.manifest import read_manifest
from pairclf.data.rows import scan_rows
from pairclf.data.submission import check_submission
from pairclf.errors import BundleError, ConfigError, DataError, IncompleteError, PairclfError, StopError
from pairclf.inference import devices
from pairclf.inference import pool as crew
from pairclf.inference import predict as job
from pairclf.inference import submission as sink
from pairclf.inference.ensemble import open_ensemble
from pairclf.inference.journal import Journal
from pairclf.inference.predict import predict
from pairclf.inference.prepare import prepare
from pairclf.inputs import cache
from pairclf.inputs.cache import RowSource
from pairclf.scores.metrics import Floats
from pairclf.task import LMSYS

ROWS, COPIES = 24, 5
pytestmark = pytest.mark.usefixtures("quick_workers")


@pytest.fixture(scope="module")
def run(trained_run: Callable[[str], Path]) -> Path:
    return trained_run("llama")


@pytest.fixture(scope="module")
def whole(run: Path, tmp_path_factory: pytest.TempPathFactory) -> pl.DataFrame:
    """The scores of the first bundle, undisturbed."""
    return predict(bundles_of(run)[:1], **files(run, tmp_path_factory.mktemp("whole")))


def files(run: Path, folder: Path) -> dict[str, Any]:
    """Arguments of `predict`."""
    return {"data": run / "test.csv", "out": folder / "submission.csv", "sample": run / "sample_submission.csv"}


def priors_of(run: Path, index: int) -> Floats:
    return np.asarray(read_manifest(bundles_of(run)[index]).prior)


def priors(run: Path, count: int = 1) -> Floats:
    every = [read_manifest(one).prior for one in bundles_of(run)[:count]]
    return np.asarray(np.mean(every, axis=0))


def probabilities(path: Path) -> Floats:
    return pl.read_csv(path, schema_overrides={"id": pl.String}).select(LMSYS.classes).to_numpy()


Inject = Callable[..., None]


@pytest.fixture
def inject(monkeypatch: pytest.MonkeyPatch) -> Inject:
    def into_workers(kind: str, row: int | None = None) -> None:
        load = unloadable if kind == "load" else partial(faulty, kind=kind, row=row)
        monkeypatch.setattr(job, "ProcessPool", partial(crew.ProcessPool, load=load))

    return into_workers


# --- tests -----------------------------------------------------------------------------------------------------------


def test_predict_with_two_workers_scores_as_with_one(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "ProcessPool", crew.ProcessPool)  # with the forecast of its memory
    one = predict(bundles_of(run), **files(run, tmp_path / "one"), overrides=["predict.tokens_per_batch=300"])
    two = predict(
        bundles_of(run),
        **files(run, tmp_path / "two"),
        overrides=["predict.tokens_per_batch=300", "predict.devices=[cpu, cpu]"],
    )
    assert_frame_equal(one, two, abs_tol=1e-6)
    assert not (tmp_path / "one" / "submission.work").exists()


def test_models_of_different_readouts_see_a_row_each_in_its_own_way(
    base_of: Callable[[str], Path], tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Branches for words of several tokens, one order for a reward: an ensemble scores as its models do alone."""
    base = with_lm_head(base_of("llama"), tmp_path / "base", tied=True)
    words = dict(zip(LMSYS.classes, ("ab", "acd", "tie"), strict=True))
    models: dict[str, dict[str, object]] = {"head": {}, "label_tokens": {"label_words": words}, "reward": {}}
    bundles, alone = [], []
    for readout, model in models.items():
        settings = run_config(run, base, model={"readout": readout, **model}, train={"layout": "shared"})
        bundles.append(random_bundle(tmp_path / readout / "bundle", settings))
        alone.append(predict(bundles[-1:], **files(run, tmp_path / readout)).select(LMSYS.classes).to_numpy())
        printed = capsys.readouterr().err
        assert ("BA" in printed) == (readout != "reward")
    together = predict(bundles, **files(run, tmp_path)).select(LMSYS.classes).to_numpy()
    assert np.abs(together - np.mean(alone, axis=0)).max() <= 1e-6
    nothing = RowSource(lambda: iter(()), "", ROWS)
    left_out = prepare(open_ensemble(bundles, None, ()).members, lambda *_: nothing, tmp_path, range(3))
    assert [model.inputs.lengths.shape for model in left_out] == [(ROWS, 2), (ROWS, 2), (ROWS, 1)]


def test_predict_writes_scores_alone(run: Path, whole: pl.DataFrame, tmp_path: Path) -> None:
    scores = tmp_path / "scores.parquet"
    predict(bundles_of(run)[:1], **files(run, tmp_path) | {"out": None, "scores": scores})
    assert list(tmp_path.iterdir()) == [scores]
    assert_frame_equal(pl.read_parquet(scores).drop("seen"), whole.drop("seen"))
    with pytest.raises(ConfigError, match="neither a submission nor scores"):
        predict(bundles_of(run)[:1], **files(run, tmp_path) | {"out": None})


def test_predict_scores_alike_in_every_layout(run: Path, tmp_path: Path) -> None:
    scores = [
        predict(bundles_of(run)[:1], **files(run, tmp_path / layout), overrides=[f"predict.layout={layout}"])
        for layout in ("padded", "packed", "shared")
    ]
    for other in scores[1:]:
        assert_frame_equal(scores[0], other, abs_tol=1e-5)


def test_predict_weighs_members_as_the_ensemble_file_says(run: Path, tmp_path: Path) -> None:
    alone = [predict([one], **files(run, tmp_path / one.parent.name)) for one in bundles_of(run)]
    path = tmp_path / "ensemble.yaml"
    path.write_text(f"members: [{{bundle: {bundles_of(run)[0]}, weight: 3}}, {{bundle: {bundles_of(run)[1]}}}]")
    blend = predict([path], **files(run, tmp_path))
    wanted = 0.75 * alone[0].select(LMSYS.classes).to_numpy() + 0.25 * alone[1].select(LMSYS.classes).to_numpy()
    np.testing.assert_allclose(blend.select(LMSYS.classes).to_numpy(), wanted, atol=1e-6)


def test_predict_cascade_scores_uncertain_rows_twice(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "ensemble.yaml"
    path.write_text(f"members: [{{bundle: {bundles_of(run)[0]}}}, {{bundle: {bundles_of(run)[1]}, share: 0.25}}]")
    scores = predict([path], **files(run, tmp_path))
    assert sorted(scores["models"].list.len().to_list()) == [1] * (ROWS - ROWS // 4) + [2] * (ROWS // 4)


def test_predict_swap_split_gives_each_member_one_order(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = predict(bundles_of(run), **files(run, tmp_path), overrides=["predict.swap=split"])
    assert f"{ROWS} rows in 2 orders for 2 models" in capsys.readouterr().err
    assert scores["orders"].unique().to_list() == [1]
    assert scores["models"].list.len().unique().to_list() == [2]


def test_predict_says_that_one_order_is_scored(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ensemble.yaml"
    path.write_text(f"members: [{{bundle: {bundles_of(run)[0]}, swap_share: 0}}]")
    scores = predict([path], **files(run, tmp_path))
    assert scores["orders"].unique().to_list() == [1]
    assert f"{ROWS} rows for 1 model" in capsys.readouterr().err


def test_predict_past_its_deadline_writes_the_prior(run: Path, tmp_path: Path) -> None:
    predict(bundles_of(run)[:1], **files(run, tmp_path), deadline="2020-01-01T00:00:00")
    np.testing.assert_allclose(probabilities(tmp_path / "submission.csv"), np.tile(priors(run), (ROWS, 1)))


def test_predict_past_its_deadline_keeps_the_submission_of_an_earlier_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {name: pl.lit(value) for name, value in zip(LMSYS.classes, (0.5, 0.3, 0.2), strict=True)}
    earlier = pl.read_csv(run / "sample_submission.csv").with_columns(**values)
    earlier.write_csv(tmp_path / "submission.csv")
    predict(bundles_of(run)[:1], **files(run, tmp_path), deadline="2020-01-01T00:00:00")
    assert pl.read_csv(tmp_path / "submission.csv").equals(earlier)
    assert "holds the submission of an earlier run" in " ".join(capsys.readouterr().err.split())


def test_predict_scores_what_a_short_deadline_lets_it_tokenise_and_keeps_it_when_stopped(
    run: Path, whole: pl.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tokenising takes longer than the deadline; then a signal comes while a second run tokenises; a third one ends."""
    clock, tokenise, passes = clock_in(tmp_path), cache.tokenise_chunk, 0
    out, arguments = tmp_path / "submission.csv", files(run, tmp_path)
    monkeypatch.setattr(cache, "ROWS_AT_A_TIME", 4)

    def during(event: Callable[[], object]) -> None:
        monkeypatch.setattr(cache, "tokenise_chunk", lambda *chunk: (event(), tokenise(*chunk))[1])

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal passes
        passes += 1
        return scan_rows(*arguments, **options)

    monkeypatch.setattr("pairclf.run.scan_rows", counted)
    during(lambda: clock.turn(20.0))
    part = predict(bundles_of(run)[:1], **arguments, deadline="120s", clock=clock)
    assert clock() < 120
    scored = part["orders"].to_numpy() > 0
    assert 0 < scored.sum() < ROWS == len(probabilities(out))
    assert "12 of 24 rows are tokenised" in " ".join(capsys.readouterr().err.split())
    assert passes == 2  # ids, and tokens

    saved = probabilities(out)
    out.unlink()
    during(lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(StopError, match="holds the scores so far"):
        predict(bundles_of(run)[:1], **arguments)
    np.testing.assert_array_equal(probabilities(out), saved)

    monkeypatch.undo()
    assert_frame_equal(predict(bundles_of(run)[:1], **arguments), whole, abs_tol=1e-6)


@pytest.mark.parametrize("stop", ["deadline", "signal"])
def test_predict_stopped_while_it_hashes_writes_what_it_has(
    stop: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, hash_file = clock_in(tmp_path), bundle_files.sha256_file

    def slow(path: Path, between: Callable[[], object]) -> str:
        clock.turn(100.0) if stop == "deadline" else signal.raise_signal(signal.SIGTERM)
        return hash_file(path, between)

    monkeypatch.setattr(bundle_files, "sha256_file", slow)
    monkeypatch.setattr(job, "ProcessPool", partial(crew.ProcessPool, load=unloadable))
    with pytest.raises(StopError) if stop == "signal" else nullcontext():
        predict(bundles_of(run)[1:], **files(run, tmp_path), deadline="60s", clock=clock)
    np.testing.assert_allclose(probabilities(tmp_path / "submission.csv"), np.tile(priors_of(run, 1), (ROWS, 1)))


def test_predict_keeps_its_deadline_and_goes_on_when_asked_again(
    run: Path, whole: pl.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = clock_in(tmp_path)
    monkeypatch.setattr(job, "ProcessPool", turned_crew(clock, partial(faulty, kind="slow", clock=clock)))
    settings = ["predict.tokens_per_batch=130"]  # a pass for each sequence: twice as many as there is time for
    limit = f"{round(PASS * ROWS)}s"
    part = predict(bundles_of(run)[:1], **files(run, tmp_path), deadline=limit, overrides=settings, clock=clock)
    assert 0 < clock() <= PASS * ROWS
    assert (part["orders"] > 0).any()
    assert (part["orders"] < 2).any()
    assert (tmp_path / "submission.work" / job.JOURNAL).exists()
    monkeypatch.undo()
    rest = predict(bundles_of(run)[:1], **files(run, tmp_path))
    assert_frame_equal(rest, whole, abs_tol=1e-6)


@pytest.mark.parametrize("kind", ["raise", "die", "nan"])
def test_predict_gives_a_poisoned_row_the_prior_and_others_their_scores(
    kind: str, run: Path, whole: pl.DataFrame, tmp_path: Path, inject: Inject, capsys: pytest.CaptureFixture[str]
) -> None:
    inject(kind, row=5)
    scores = predict(bundles_of(run)[:1], **files(run, tmp_path), overrides=["predict.tokens_per_batch=500"])
    others = np.arange(ROWS) != 5
    assert scores["orders"].to_list() == [2 if other else 0 for other in others]
    np.testing.assert_allclose(scores[5].select(LMSYS.classes).to_numpy()[0], priors(run))
    assert_frame_equal(scores.filter(others), whole.filter(others), abs_tol=1e-6)
    assert f"row {scores['id'][5]} could not be scored" in capsys.readouterr().err


def test_predict_strict_raises_for_rows_that_were_not_scored(run: Path, tmp_path: Path, inject: Inject) -> None:
    inject("nan", row=5)
    with pytest.raises(IncompleteError) as raised:
        predict(bundles_of(run)[:1], **files(run, tmp_path), strict=True)
    assert len(raised.value.rows) == 1
    assert raised.value.exit_code == 3
    assert len(probabilities(tmp_path / "submission.csv")) == ROWS


def test_predict_of_nan_logits_writes_priors(run: Path, tmp_path: Path, inject: Inject) -> None:
    inject("nan")
    scores = predict(bundles_of(run)[:1], **files(run, tmp_path))
    assert scores["orders"].unique().to_list() == [0]
    np.testing.assert_allclose(probabilities(tmp_path / "submission.csv"), np.tile(priors(run), (ROWS, 1)))
    with pytest.raises(IncompleteError):
        predict(bundles_of(run)[:1], **files(run, tmp_path), strict=True)


def test_predict_halves_batches_that_do_not_fit_memory(
    run: Path, whole: pl.DataFrame, tmp_path: Path, inject: Inject
) -> None:
    inject("memory")
    scores = predict(bundles_of(run)[:1], **files(run, tmp_path), strict=True)
    assert_frame_equal(scores, whole, abs_tol=1e-6)


def test_predict_leaves_out_a_member_that_does_not_load(
    run: Path, whole: pl.DataFrame, tmp_path: Path, inject: Inject
) -> None:
    inject("load")
    scores = predict(bundles_of(run), **files(run, tmp_path))
    np.testing.assert_allclose(
        scores.select(LMSYS.classes).to_numpy(), whole.select(LMSYS.classes).to_numpy(), atol=1e-6
    )
    with pytest.raises(IncompleteError, match="the second one does not load"):
        predict(bundles_of(run), **files(run, tmp_path), strict=True)


def test_predict_raises_if_no_member_loads(run: Path, tmp_path: Path, inject: Inject) -> None:
    inject("load")
    with pytest.raises(BundleError, match="does not load"):
        predict(bundles_of(run)[1:], **files(run, tmp_path))
    assert check_submission(tmp_path / "submission.csv", run / "sample_submission.csv", LMSYS)["rows"] == ROWS


def test_predict_writes_priors_before_it_reads_rows(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "_read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        predict(bundles_of(run), **files(run, tmp_path))
    np.testing.assert_allclose(probabilities(tmp_path / "submission.csv"), np.tile(priors(run, 2), (ROWS, 1)))


def test_predict_replaces_a_submission_by_nothing_worse(run: Path, tmp_path: Path, inject: Inject) -> None:
    """Neither by priors, nor by a run that is refused; and what others put into the work folder stays there."""
    (tmp_path / "submission.work").mkdir()
    (tmp_path / "submission.work" / "notes.txt").write_text("mine")
    predict(bundles_of(run)[:1], **files(run, tmp_path))
    before = (tmp_path / "submission.csv").read_bytes()
    pl.read_csv(run / "sample_submission.csv", infer_schema=False)[1:].write_csv(tmp_path / "sample.csv")
    with pytest.raises(DataError, match="that the sample"):
        predict(bundles_of(run)[:1], **{**files(run, tmp_path), "sample": tmp_path / "sample.csv"})
    inject("load")
    with pytest.raises(BundleError):
        predict(bundles_of(run)[1:], **files(run, tmp_path))
    assert (tmp_path / "submission.csv").read_bytes() == before
    assert (tmp_path / "submission.work" / "notes.txt").read_text() == "mine"


def test_identity_differs_by_device_dtype_and_torch(
    base_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto` is float32 here and float16 on a T4: what was begun there does not go on here."""
    bundle = random_bundle(tmp_path / "bundle", run_config(tmp_path, base_of("llama")))
    ensemble = open_ensemble([bundle], None, ())
    here = job.identity_of_run(ensemble, "digest")
    with monkeypatch.context() as gpu:
        gpu.setattr(devices, "has_gpu_driver", lambda: True)
        gpu.setattr(torch.cuda, "device_count", lambda: 2)
        gpu.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        there = job.identity_of_run(ensemble, "digest")
    monkeypatch.setattr(language_model, "version", lambda package: "2.0" if package == "torch" else version(package))
    later = job.identity_of_run(ensemble, "digest")
    mine, theirs, newer = (identity.pop("models")[0] for identity in (here, there, later))
    assert [name for name in here if here[name] != there[name]] == ["device"]
    assert here == later
    assert [name for name in mine if mine[name] != theirs[name]] == ["dtype"]
    assert (mine["dtype"], theirs["dtype"]) == (["float32"], ["float16"])
    assert [name for name in mine if mine[name] != newer[name]] == ["torch"]


def test_predict_killed_before_its_first_scores_keeps_the_older_submission(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And once the same run is done, nothing of the older one is left."""
    out = tmp_path / "submission.csv"
    predict(bundles_of(run)[1:], **files(run, tmp_path))
    os.utime(out, (3600, 3600))
    before = out.read_bytes()

    def killed(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(job, "verify_in_time", killed)
        predict(bundles_of(run)[:1], **files(run, tmp_path))
    assert (out.read_bytes(), out.stat().st_mtime) == (before, 3600)
    assert "is still the submission of an earlier run" in " ".join(capsys.readouterr().err.split())
    predict(bundles_of(run)[:1], **files(run, tmp_path))
    assert out.read_bytes() != before
    assert [entry.name for entry in tmp_path.iterdir()] == ["submission.csv"]


@pytest.mark.parametrize("sample", [True, False])
def test_predict_replaces_a_submission_of_other_rows_by_priors(
    sample: bool, run: Path, tmp_path: Path, inject: Inject
) -> None:
    (tmp_path / "submission.csv").write_text("id,winner_model_a,winner_model_b,winner_tie\nelse,0.2,0.3,0.5\n")
    inject("load")
    with pytest.raises(BundleError):
        predict(bundles_of(run)[1:], **{**files(run, tmp_path), **({} if sample else {"sample": None})})
    assert len(probabilities(tmp_path / "submission.csv")) == ROWS


def test_a_full_disk_in_the_middle_leaves_the_last_good_file_and_the_end_mends_it(
    run: Path, whole: pl.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The journal and the submission can't be written for a while; nothing is lost, as it is in memory."""
    monkeypatch.setattr(sink, "WRITE_INTERVAL", 0.0)
    plain, count = os.replace, 0

    def full(source: Any, target: Any) -> None:
        nonlocal count
        count += str(target).endswith("submission.csv")
        if str(target).endswith("submission.csv") and 1 < count < 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(source, target)

    monkeypatch.setattr(os, "replace", full)
    monkeypatch.setattr(job, "SubmissionWriter", partial(sink.SubmissionWriter, every=0.0))
    scores = predict(bundles_of(run)[:1], **files(run, tmp_path), overrides=["predict.tokens_per_batch=300"])
    assert count >= 4
    assert_frame_equal(scores, whole, abs_tol=1e-6)
    assert "No space left" in capsys.readouterr().err
    np.testing.assert_allclose(probabilities(tmp_path / "submission.csv"), scores.select(LMSYS.classes).to_numpy())


def test_predict_raises_at_once_if_output_can_not_be_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "replace", refused)
    monkeypatch.setattr(job, "ProcessPool", refused)
    with pytest.raises(OSError, match="Read-only"):
        predict(bundles_of(run), **files(run, tmp_path))


@pytest.mark.parametrize("name", ["", "journal.sqlite", "journal.sqlite-wal", "tokens"])
def test_predict_refuses_a_work_folder_with_links(tmp_path: Path, name: str) -> None:
    """Somebody who shares the folder may have put them there."""
    (tmp_path / "mine").mkdir()
    work = tmp_path / "out.work"
    if name:
        work.mkdir()
    (work / name).symlink_to(tmp_path / "mine")
    with pytest.raises(PairclfError, match=r"is a link|is no folder"):
        job.check_paths(tmp_path / "out.csv", None, tmp_path / "test.csv", None, work)


@pytest.mark.parametrize("name", ["test.csv", "sample.csv"])
def test_predict_refuses_a_pipe_as_data_or_sample(tmp_path: Path, name: str) -> None:
    given = [tmp_path / one for one in ("test.csv", "sample.csv")]
    for path in given:
        os.mkfifo(path) if path.name == name else path.touch()
    with pytest.raises(DataError, match="no regular file") as caught:
        job.check_paths(tmp_path / "out.csv", None, *given, tmp_path / "out.work")
    assert caught.value.where == tmp_path / name


def test_predict_names_missing_data(run: Path, tmp_path: Path) -> None:
    for name, words in (("absent.csv", "there is no such file"), ("", "a folder, not a file")):
        with pytest.raises(DataError, match=words):
            predict(bundles_of(run), **{**files(run, tmp_path), "data": tmp_path / name})
    assert not any(tmp_path.iterdir())


def test_predict_refuses_ids_unlike_the_samples_before_scoring(run: Path, tmp_path: Path, inject: Inject) -> None:
    inject("load")
    rows = pl.read_csv(run / "test.csv", infer_schema=False)
    rows[1:].write_csv(tmp_path / "test.csv")
    with pytest.raises(DataError, match="lack 1 ids of the sample"):
        predict(bundles_of(run), **{**files(run, tmp_path), "data": tmp_path / "test.csv"})
    pl.concat([rows, rows[:1]]).write_csv(tmp_path / "twice.csv")
    with pytest.raises(DataError, match=r"twice|before"):
        predict(bundles_of(run), **{**files(run, tmp_path), "data": tmp_path / "twice.csv"})


def test_predict_scores_one_row_whatever_lies_where_its_journal_belongs(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pl.read_csv(run / "test.csv", infer_schema=False)[:1].write_csv(tmp_path / "test.csv")
    (tmp_path / "s.work" / "journal.sqlite").mkdir(parents=True)
    scores = predict(bundles_of(run)[:1], tmp_path / "test.csv", tmp_path / "s.csv", resume=False, strict=True)
    assert len(scores) == 1 == len(pl.read_csv(tmp_path / "s.csv"))
    assert "s.work can't be removed" in " ".join(capsys.readouterr().err.split())


def test_predict_refuses_no_rows_and_leaves_priors(run: Path, tmp_path: Path) -> None:
    pl.read_csv(run / "test.csv", infer_schema=False)[:0].write_csv(tmp_path / "test.csv")
    with pytest.raises(DataError, match="holds no rows"):
        predict(bundles_of(run)[:1], **{**files(run, tmp_path), "data": tmp_path / "test.csv"})
    assert len(probabilities(tmp_path / "submission.csv")) == ROWS


def test_predict_refuses_overrides_of_training_settings(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be set for a trained bundle"):
        predict(bundles_of(run), **files(run, tmp_path), overrides=["inputs.max_length=64"])


# --- the command, killed --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of rows that are each a pass of their own, `COPIES` of each row."""
    rows = pl.read_csv(run / "test.csv", infer_schema=False)
    numbered = (
        rows.with_columns(pl.col("id") + f"-{copy}", pl.col("prompt").str.replace(r"\[\"", f'["{copy} '))
        for copy in range(COPIES)
    )
    path = tmp_path_factory.mktemp("many") / "many.csv"
    pl.concat(numbered).write_csv(path)
    return path


def arguments_of(run: Path, many: Path, folder: Path) -> list[str]:
    """Of the command."""
    options = ["--data", str(many), "--out", str(folder / "submission.csv"), "predict.tokens_per_batch=1"]
    return ["predict", *map(str, bundles_of(run)), *options]


def journaled(folder: Path) -> int:
    """Sequences in the journal, as another process reads it after the kill."""
    path = folder / "submission.work" / job.JOURNAL
    if not path.exists():
        return 0
    with closing(sqlite3.connect(path)) as file:
        try:
            return int(file.execute("SELECT count(*) FROM scored").fetchone()[0])
        except sqlite3.OperationalError:  # killed before the tables were made
            return 0


PAGE = 4096


def logged(folder: Path) -> int:
    """Bytes of the journal's log, which each batch makes longer by a page or more."""
    path = folder / "submission.work" / f"{job.JOURNAL}-wal"
    return path.stat().st_size if path.exists() else 0


@pytest.mark.thorough
@pytest.mark.slow
def test_predict_killed_at_random_moments_ends_in_the_same_file(
    run: Path, many: Path, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    """Also fifty times: `pytest tests/inference/test_predict.py --thorough -k killed_at --kills 50`."""
    folder = tmp_path / "killed"

    def started(folder: Path) -> BaseProcess:
        folder.mkdir(exist_ok=True)
        return forked(quick_command, *arguments_of(run, many, folder), output=tmp_path / "output")

    started(tmp_path / "whole").join()
    whole = (tmp_path / "whole" / "submission.csv").read_bytes()
    draw, landed = random.Random(0), 0
    while landed < pytestconfig.getoption("--kills"):  # one that comes too late is none, and the next run begins anew
        before, enough = journaled(folder), logged(folder) + PAGE * draw.randint(0, 2 * ROWS * COPIES)
        process = started(folder)
        assert comes_true(lambda: not process.is_alive() or logged(folder) >= enough)  # noqa: B023
        process.kill()
        process.join()
        landed += process.exitcode == -signal.SIGKILL
        if process.exitcode == 0:
            assert (folder / "submission.csv").read_bytes() == whole
        elif (folder / "submission.work").exists():
            assert journaled(folder) >= before
        if (folder / "submission.csv").exists():
            assert len(pl.read_csv(folder / "submission.csv")) == ROWS * COPIES
            assert np.allclose(probabilities(folder / "submission.csv").sum(axis=1), 1)
    started(folder).join()
    assert (folder / "submission.csv").read_bytes() == whole


def quick_command(*arguments: str) -> None:
    job.ProcessPool = partial(crew.ProcessPool, load=quick)  # type: ignore[assignment, misc]
    command(*arguments)


def held_command(channel: Connection, *arguments: str) -> None:
    """The command, which waits after the first batch that is in the journal until it is ended."""
    add = Journal.add

    def hold(self: Journal, *scored: Any) -> None:
        add(self, *scored)
        channel.send("scored")
        channel.poll(None)

    Journal.add = hold  # type: ignore[method-assign]
    quick_command(*arguments)


def test_predict_ends_in_a_submission_on_sigterm_and_the_next_run_goes_on(
    run: Path, many: Path, tmp_path: Path
) -> None:
    ours, theirs = Pipe()
    process = forked(held_command, theirs, *arguments_of(run, many, tmp_path), output=tmp_path / "first")
    theirs.close()
    assert ours.recv() == "scored"
    process.terminate()
    ours.close()  # it waits no longer
    process.join()
    assert process.exitcode == 128 + signal.SIGTERM, (tmp_path / "first").read_text()
    known = journaled(tmp_path)
    assert 0 < known < 2 * 2 * ROWS * COPIES
    assert len(pl.read_csv(tmp_path / "submission.csv")) == ROWS * COPIES
    again = forked(quick_command, *arguments_of(run, many, tmp_path), output=tmp_path / "second")
    again.join()
    text = (tmp_path / "second").read_text()
    assert again.exitcode == 0, text
    assert f"{known:,} sequences are taken from the journal" in text


def test_predict_does_not_continue_the_journal_of_other_rows(run: Path, many: Path, tmp_path: Path) -> None:
    predict(bundles_of(run)[:1], run / "test.csv", tmp_path / "submission.csv", deadline="2020-01-01T00:00:00")
    scores = predict(bundles_of(run)[:1], many, tmp_path / "submission.csv")
    assert len(scores) == COPIES * ROWS
    assert scores["orders"].unique().to_list() == [2]
