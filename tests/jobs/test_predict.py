"""A whole prediction, with its processes and files: what happens to it, and what the submission is then."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from subprocess import PIPE
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from clocks_support import clock_in, comes_true, turned_crew
from polars.testing import assert_frame_equal

from pairclf.config import dump_config, load_config, resolve
from pairclf.data.arena import generate, write_lmsys
from pairclf.data.tables import check_submission
from pairclf.errors import BundleError, ConfigError, DataError, IncompleteError, PairclfError
from pairclf.inference import crew, sink, worker
from pairclf.inference.members import open_ensemble
from pairclf.inference.work import Floats
from pairclf.jobs import predict as job
from pairclf.jobs.cv import cross_validate
from pairclf.jobs.predict import predict
from pairclf.model.batch import Item
from pairclf.model.bundle import read_manifest
from pairclf.rehearsal.shared_clock import SharedClock
from pairclf.task import LMSYS

ROWS, COPIES = 24, 5
PASS = 10.0
"""Seconds of a pass by a clock that is turned."""


@pytest.fixture(scope="module")
def run(base_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two bundles below `run`, `test.csv` and `sample_submission.csv`."""
    folder = tmp_path_factory.mktemp("predict")
    write_lmsys(generate(60, seed=1), folder, n_test=ROWS)
    config = resolve(
        {
            "output": str(folder / "run"),
            "data": {"folder": str(folder), "train": ["train.csv"], "test": "test.csv"},
            "folds": {"n": 2},
            "inputs": {"max_length": 128},
            "model": {"base": str(base_of("llama")), "quantization": "none", "lora": {"rank": 2}},
            "train": {"max_steps": 2},
        }
    )
    (folder / "config.yaml").write_text(dump_config(config))
    cross_validate(load_config(folder / "config.yaml"))
    return folder


@pytest.fixture(scope="module")
def whole(run: Path, tmp_path_factory: pytest.TempPathFactory) -> pl.DataFrame:
    """The scores of the first bundle, undisturbed."""
    return predict(bundles(run)[:1], **files(run, tmp_path_factory.mktemp("whole")))


def bundles(run: Path) -> list[Path]:
    return [run / "run" / f"fold{fold}" / "bundle" for fold in (0, 1)]


def files(run: Path, folder: Path) -> dict[str, Any]:
    """Arguments of `predict`."""
    return {"data": run / "test.csv", "out": folder / "submission.csv", "sample": run / "sample_submission.csv"}


def priors(run: Path, count: int = 1) -> Floats:
    every = [read_manifest(one).prior for one in bundles(run)[:count]]
    return np.asarray(np.mean(every, axis=0))


def probabilities(path: Path) -> Floats:
    return pl.read_csv(path, schema_overrides={"id": pl.String}).select(LMSYS.classes).to_numpy()


# --- faults, as workers meet them; loaders are found by name in new processes -----------------------------------------


class Faulty:
    """A scorer that does something to rows whose index is `row`, or to all."""

    def __init__(self, scorer: worker.Scores, kind: str, row: int | None, clock: SharedClock | None) -> None:
        self.scorer, self.kind, self.row, self.clock = scorer, kind, row, clock

    def launch(self, items: Sequence[Item]) -> Any:
        here = self.row is None or any(item.row == self.row for item in items)
        if here and self.kind == "raise":
            raise ZeroDivisionError("a poisoned row")
        if here and self.kind == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "memory" and len(items) > 2:
            raise MemoryError
        if self.clock is not None:
            self.clock.last(PASS)
        return self.scorer.launch(items)

    def collect(self, items: Sequence[Item], launched: Any) -> tuple[Floats, int]:
        logits, rescued = self.scorer.collect(items, launched)
        if self.kind == "nan":
            bad = [self.row is None or item.row == self.row for item in items]
            logits[np.array(bad)] = np.nan
        return logits, rescued


def faulty(
    assignment: worker.Assignment, *, kind: str, row: int | None = None, clock: SharedClock | None = None
) -> worker.Loaded:
    loaded = worker.load_bundle(assignment)
    return loaded._replace(scorer=Faulty(loaded.scorer, kind, row, clock))


def unloadable(assignment: worker.Assignment) -> worker.Loaded:
    if "fold1" in str(assignment.bundle):
        raise BundleError("the second one does not load")
    return worker.load_bundle(assignment)


Inject = Callable[..., None]


@pytest.fixture
def inject(monkeypatch: pytest.MonkeyPatch) -> Inject:
    def into_workers(kind: str, row: int | None = None) -> None:
        load = unloadable if kind == "load" else partial(faulty, kind=kind, row=row)
        monkeypatch.setattr(job, "ProcessCrew", partial(crew.ProcessCrew, load=load))

    return into_workers


# --- tests -----------------------------------------------------------------------------------------------------------


def test_two_workers_give_what_one_gives(run: Path, tmp_path: Path) -> None:
    one = predict(bundles(run), **files(run, tmp_path / "one"), overrides=["predict.tokens_per_batch=300"])
    two = predict(
        bundles(run),
        **files(run, tmp_path / "two"),
        overrides=["predict.tokens_per_batch=300", "predict.devices=[cpu, cpu]"],
    )
    assert_frame_equal(one, two, abs_tol=1e-6)
    assert not (tmp_path / "one" / "submission.work").exists()


def test_layouts_agree(run: Path, tmp_path: Path) -> None:
    scores = [
        predict(bundles(run)[:1], **files(run, tmp_path / layout), overrides=[f"predict.layout={layout}"])
        for layout in ("padded", "packed", "shared")
    ]
    for other in scores[1:]:
        assert_frame_equal(scores[0], other, abs_tol=1e-5)


def test_an_ensemble_file_weighs_its_members(run: Path, tmp_path: Path) -> None:
    alone = [predict([one], **files(run, tmp_path / one.parent.name)) for one in bundles(run)]
    path = tmp_path / "ensemble.yaml"
    path.write_text(f"members: [{{bundle: {bundles(run)[0]}, weight: 3}}, {{bundle: {bundles(run)[1]}}}]")
    blend = predict([path], **files(run, tmp_path))
    wanted = 0.75 * alone[0].select(LMSYS.classes).to_numpy() + 0.25 * alone[1].select(LMSYS.classes).to_numpy()
    np.testing.assert_allclose(blend.select(LMSYS.classes).to_numpy(), wanted, atol=1e-6)


def test_a_cascade_scores_uncertain_rows_twice(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "ensemble.yaml"
    path.write_text(f"members: [{{bundle: {bundles(run)[0]}}}, {{bundle: {bundles(run)[1]}, share: 0.25}}]")
    scores = predict([path], **files(run, tmp_path))
    assert sorted(scores["models"].list.len().to_list()) == [1] * (ROWS - ROWS // 4) + [2] * (ROWS // 4)


def test_split_shows_the_members_one_order_each(run: Path, tmp_path: Path) -> None:
    scores = predict(bundles(run), **files(run, tmp_path), overrides=["predict.swap=split"])
    assert scores["orders"].unique().to_list() == [1]
    assert scores["models"].list.len().unique().to_list() == [2]


def test_a_deadline_that_is_over_leaves_the_prior(run: Path, tmp_path: Path) -> None:
    predict(bundles(run)[:1], **files(run, tmp_path), deadline="2020-01-01T00:00:00")
    np.testing.assert_allclose(probabilities(tmp_path / "submission.csv"), np.tile(priors(run), (ROWS, 1)))


def test_a_deadline_is_kept_and_the_rest_is_done_by_the_same_command_later(
    run: Path, whole: pl.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = clock_in(tmp_path)
    monkeypatch.setattr(job, "ProcessCrew", turned_crew(clock, partial(faulty, kind="slow", clock=clock)))
    settings = ["predict.tokens_per_batch=130"]  # a pass for each sequence: twice as many as there is time for
    limit = f"{round(PASS * ROWS)}s"
    part = predict(bundles(run)[:1], **files(run, tmp_path), deadline=limit, overrides=settings, clock=clock)
    assert 0 < clock() <= PASS * ROWS
    assert (part["orders"] > 0).any()
    assert (part["orders"] < 2).any()
    assert (tmp_path / "submission.work" / job.JOURNAL).exists()
    monkeypatch.undo()
    rest = predict(bundles(run)[:1], **files(run, tmp_path))
    assert_frame_equal(rest, whole, abs_tol=1e-6)


@pytest.mark.parametrize("kind", ["raise", "die", "nan"])
def test_a_poisoned_row_has_the_prior_and_all_others_their_scores(
    kind: str,
    run: Path,
    whole: pl.DataFrame,
    tmp_path: Path,
    inject: Inject,
    capsys: pytest.CaptureFixture[str],
) -> None:
    inject(kind, row=5)
    scores = predict(bundles(run)[:1], **files(run, tmp_path), overrides=["predict.tokens_per_batch=500"])
    others = np.arange(ROWS) != 5
    assert scores["orders"].to_list() == [2 if other else 0 for other in others]
    np.testing.assert_allclose(scores[5].select(LMSYS.classes).to_numpy()[0], priors(run))
    assert_frame_equal(scores.filter(others), whole.filter(others), abs_tol=1e-6)
    assert f"row {scores['id'][5]} could not be scored" in capsys.readouterr().err


def test_strict_says_by_its_exit_code_what_could_not_be_scored(run: Path, tmp_path: Path, inject: Inject) -> None:
    inject("nan", row=5)
    with pytest.raises(IncompleteError) as raised:
        predict(bundles(run)[:1], **files(run, tmp_path), strict=True)
    assert len(raised.value.rows) == 1
    assert raised.value.exit_code == 3
    assert len(probabilities(tmp_path / "submission.csv")) == ROWS


def test_a_model_of_nan_leaves_a_submission_of_priors_and_says_so(run: Path, tmp_path: Path, inject: Inject) -> None:
    inject("nan")
    scores = predict(bundles(run)[:1], **files(run, tmp_path))
    assert scores["orders"].unique().to_list() == [0]
    np.testing.assert_allclose(probabilities(tmp_path / "submission.csv"), np.tile(priors(run), (ROWS, 1)))
    with pytest.raises(IncompleteError):
        predict(bundles(run)[:1], **files(run, tmp_path), strict=True)


def test_memory_that_does_not_suffice_for_three_sequences(
    run: Path, whole: pl.DataFrame, tmp_path: Path, inject: Inject
) -> None:
    inject("memory")
    scores = predict(bundles(run)[:1], **files(run, tmp_path), strict=True)
    assert_frame_equal(scores, whole, abs_tol=1e-6)


def test_a_member_that_does_not_load_is_left_out_and_named(
    run: Path, whole: pl.DataFrame, tmp_path: Path, inject: Inject
) -> None:
    inject("load")
    scores = predict(bundles(run), **files(run, tmp_path))
    np.testing.assert_allclose(
        scores.select(LMSYS.classes).to_numpy(), whole.select(LMSYS.classes).to_numpy(), atol=1e-6
    )
    with pytest.raises(IncompleteError, match="the second one does not load"):
        predict(bundles(run), **files(run, tmp_path), strict=True)


def test_nobody_loads(run: Path, tmp_path: Path, inject: Inject) -> None:
    inject("load")
    with pytest.raises(BundleError, match="does not load"):
        predict(bundles(run)[1:], **files(run, tmp_path))
    assert check_submission(tmp_path / "submission.csv", run / "sample_submission.csv", LMSYS)["rows"] == ROWS


def test_a_submission_of_priors_is_there_before_the_rows_are_read(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "_read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        predict(bundles(run), **files(run, tmp_path))
    np.testing.assert_allclose(probabilities(tmp_path / "submission.csv"), np.tile(priors(run, 2), (ROWS, 1)))


def test_a_submission_that_is_there_is_replaced_by_nothing_worse(run: Path, tmp_path: Path, inject: Inject) -> None:
    """Neither by priors, nor by a run that is refused; and what others put into the work folder stays there."""
    (tmp_path / "submission.work").mkdir()
    (tmp_path / "submission.work" / "notes.txt").write_text("mine")
    predict(bundles(run)[:1], **files(run, tmp_path))
    before = (tmp_path / "submission.csv").read_bytes()
    pl.read_csv(run / "sample_submission.csv", infer_schema=False)[1:].write_csv(tmp_path / "sample.csv")
    with pytest.raises(DataError, match="that the sample"):
        predict(bundles(run)[:1], **{**files(run, tmp_path), "sample": tmp_path / "sample.csv"})
    inject("load")
    with pytest.raises(BundleError):
        predict(bundles(run)[1:], **files(run, tmp_path))
    assert (tmp_path / "submission.csv").read_bytes() == before
    assert (tmp_path / "submission.work" / "notes.txt").read_text() == "mine"


def test_a_journal_of_another_precision_is_another_runs(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` is float32 here and float16 on a T4: what was begun there does not go on here."""
    ensemble, data = open_ensemble(bundles(run)[:1], None, ()), run / "test.csv"
    here = job._identity(ensemble, data)
    with monkeypatch.context() as gpu:
        gpu.setattr(torch.cuda, "device_count", lambda: 2)
        gpu.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        there = job._identity(ensemble, data)
    monkeypatch.setattr(torch, "__version__", "2.0")
    later = job._identity(ensemble, data)
    assert [name for name in here if here[name] != there[name]] == ["device", "dtype"]
    assert (here["dtype"], there["dtype"]) == ([["float32"]], [["float16"]])
    assert [name for name in here if here[name] != later[name]] == ["torch"]


def test_killed_before_its_first_scores_a_run_leaves_the_older_submission_as_it_was(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And once the same run is done, nothing of the older one is left."""
    out = tmp_path / "submission.csv"
    predict(bundles(run)[1:], **files(run, tmp_path))
    os.utime(out, (3600, 3600))
    before = out.read_bytes()

    def killed(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(job, "_proven", killed)
        predict(bundles(run)[:1], **files(run, tmp_path))
    assert (out.read_bytes(), out.stat().st_mtime) == (before, 3600)
    assert "is still the submission of an earlier run" in " ".join(capsys.readouterr().err.split())
    predict(bundles(run)[:1], **files(run, tmp_path))
    assert out.read_bytes() != before
    assert [entry.name for entry in tmp_path.iterdir()] == ["submission.csv"]


@pytest.mark.parametrize("sample", [True, False])
def test_a_file_of_other_rows_is_replaced_by_the_priors(
    sample: bool, run: Path, tmp_path: Path, inject: Inject
) -> None:
    (tmp_path / "submission.csv").write_text("id,winner_model_a,winner_model_b,winner_tie\nelse,0.2,0.3,0.5\n")
    inject("load")
    with pytest.raises(BundleError):
        predict(bundles(run)[1:], **{**files(run, tmp_path), **({} if sample else {"sample": None})})
    assert len(probabilities(tmp_path / "submission.csv")) == ROWS


def test_a_full_disk_in_the_middle_leaves_the_last_good_file_and_the_end_mends_it(
    run: Path, whole: pl.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The journal and the submission can't be written for a while; nothing is lost, as it is in memory."""
    monkeypatch.setattr(sink, "EVERY", 0.0)
    plain, count = os.replace, 0

    def full(source: Any, target: Any) -> None:
        nonlocal count
        count += str(target).endswith("submission.csv")
        if str(target).endswith("submission.csv") and 1 < count < 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(source, target)

    monkeypatch.setattr(os, "replace", full)
    monkeypatch.setattr(job, "Sink", partial(sink.Sink, every=0.0))
    scores = predict(bundles(run)[:1], **files(run, tmp_path), overrides=["predict.tokens_per_batch=300"])
    assert count >= 4
    assert_frame_equal(scores, whole, abs_tol=1e-6)
    assert "No space left" in capsys.readouterr().err
    np.testing.assert_allclose(probabilities(tmp_path / "submission.csv"), scores.select(LMSYS.classes).to_numpy())


def test_output_that_can_not_be_written_is_an_error_at_once(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "replace", refused)
    monkeypatch.setattr(job, "ProcessCrew", refused)
    with pytest.raises(OSError, match="Read-only"):
        predict(bundles(run), **files(run, tmp_path))


@pytest.mark.parametrize("name", ["", "journal.sqlite", "journal.sqlite-wal", "tokens"])
def test_a_work_folder_with_links_is_not_written_to(tmp_path: Path, name: str) -> None:
    """Somebody who shares the folder may have put them there."""
    (tmp_path / "mine").mkdir()
    work = tmp_path / "out.work"
    if name:
        work.mkdir()
    (work / name).symlink_to(tmp_path / "mine")
    with pytest.raises(PairclfError, match=r"is a link|is no folder"):
        job._check_paths(tmp_path / "out.csv", None, tmp_path / "test.csv", None, work)


@pytest.mark.parametrize("name", ["test.csv", "sample.csv"])
def test_a_pipe_in_the_place_of_rows_is_not_waited_for(tmp_path: Path, name: str) -> None:
    given = [tmp_path / one for one in ("test.csv", "sample.csv")]
    for path in given:
        os.mkfifo(path) if path.name == name else path.touch()
    with pytest.raises(DataError, match="no regular file") as caught:
        job._check_paths(tmp_path / "out.csv", None, *given, tmp_path / "out.work")
    assert caught.value.where == tmp_path / name


def test_a_test_file_that_is_not_there_is_named_as_such(run: Path, tmp_path: Path) -> None:
    for name, words in (("absent.csv", "there is no such file"), ("", "a folder, not a file")):
        with pytest.raises(DataError, match=words):
            predict(bundles(run), **{**files(run, tmp_path), "data": tmp_path / name})
    assert not any(tmp_path.iterdir())


def test_ids_that_are_not_the_samples_are_refused_before_anything_is_scored(
    run: Path, tmp_path: Path, inject: Inject
) -> None:
    inject("load")
    rows = pl.read_csv(run / "test.csv", infer_schema=False)
    rows[1:].write_csv(tmp_path / "test.csv")
    with pytest.raises(DataError, match="lack 1 ids of the sample"):
        predict(bundles(run), **{**files(run, tmp_path), "data": tmp_path / "test.csv"})
    pl.concat([rows, rows[:1]]).write_csv(tmp_path / "twice.csv")
    with pytest.raises(DataError, match=r"twice|before"):
        predict(bundles(run), **{**files(run, tmp_path), "data": tmp_path / "twice.csv"})


def test_one_row(run: Path, tmp_path: Path) -> None:
    pl.read_csv(run / "test.csv", infer_schema=False)[:1].write_csv(tmp_path / "test.csv")
    scores = predict(bundles(run)[:1], tmp_path / "test.csv", tmp_path / "s.csv")
    assert len(scores) == 1 == len(pl.read_csv(tmp_path / "s.csv"))


def test_no_row_is_refused_and_the_samples_priors_stand(run: Path, tmp_path: Path) -> None:
    pl.read_csv(run / "test.csv", infer_schema=False)[:0].write_csv(tmp_path / "test.csv")
    with pytest.raises(DataError, match="holds no rows"):
        predict(bundles(run)[:1], **{**files(run, tmp_path), "data": tmp_path / "test.csv"})
    assert len(probabilities(tmp_path / "submission.csv")) == ROWS


def test_settings_of_training_can_not_be_changed(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be set for a trained bundle"):
        predict(bundles(run), **files(run, tmp_path), overrides=["inputs.max_length=64"])


# --- the command, killed --------------------------------------------------------------------------------------------


def command(run: Path, folder: Path, *more: str) -> list[str]:
    given = files(run, folder)
    return [
        *(sys.executable, "-m", "pairclf", "predict", *map(str, bundles(run)), "--data", str(run / "many.csv")),
        *("--out", str(given["out"]), "--set", "predict.tokens_per_batch=1", *more),
    ]


@pytest.fixture(scope="module")
def many(run: Path) -> Path:
    """`many.csv`, whose rows are each a pass of its own."""
    rows = pl.read_csv(run / "test.csv", infer_schema=False)
    numbered = (
        rows.with_columns(pl.col("id") + f"-{copy}", pl.col("prompt").str.replace(r"\[\"", f'["{copy} '))
        for copy in range(COPIES)
    )
    pl.concat(numbered).write_csv(run / "many.csv")
    return run


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
def test_killed_at_random_moments_it_ends_in_the_same_file(
    many: Path, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    """Also fifty times: `pytest tests/jobs/test_predict.py -k killed --kills 50`."""
    subprocess.run(command(many, tmp_path / "whole"), check=True, capture_output=True)
    whole = (tmp_path / "whole" / "submission.csv").read_bytes()
    draw, landed = random.Random(0), 0
    folder = tmp_path / "killed"
    while landed < pytestconfig.getoption("--kills"):  # one that comes too late is none, and the next run begins anew
        before, enough = journaled(folder), logged(folder) + PAGE * draw.randint(0, 2 * ROWS * COPIES)
        with subprocess.Popen(command(many, folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            assert comes_true(lambda: process.poll() is not None or logged(folder) >= enough)  # noqa: B023
            process.kill()
        landed += process.returncode == -signal.SIGKILL
        if process.returncode == 0:
            assert (folder / "submission.csv").read_bytes() == whole
        elif (folder / "submission.work").exists():
            assert journaled(folder) >= before
        if (folder / "submission.csv").exists():
            assert len(pl.read_csv(folder / "submission.csv")) == ROWS * COPIES
            assert np.allclose(probabilities(folder / "submission.csv").sum(axis=1), 1)
    subprocess.run(command(many, folder), check=True, capture_output=True)
    assert (folder / "submission.csv").read_bytes() == whole


HELD = """
import sys
from pairclf.inference.journal import Journal
add = Journal.add
def hold(self, *arguments):
    add(self, *arguments)
    print("scored", flush=True)
    sys.stdin.readline()
Journal.add = hold
from pairclf.cli import main
main()
"""
"""The command, which waits for a line after each batch that is in the journal."""


def test_a_term_signal_ends_in_a_submission_and_the_next_run_goes_on(many: Path, tmp_path: Path) -> None:
    held = [sys.executable, "-c", HELD, *command(many, tmp_path)[3:]]
    with subprocess.Popen(held, stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "scored\n"
        process.terminate()
        _, text = process.communicate()  # closes the input: it waits no longer
    assert process.returncode == 128 + signal.SIGTERM, text
    known = journaled(tmp_path)
    assert 0 < known < 2 * 2 * ROWS * COPIES
    assert len(pl.read_csv(tmp_path / "submission.csv")) == ROWS * COPIES
    again = subprocess.run(command(many, tmp_path), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert f"{known:,} sequences were scored before" in again.stderr


def test_the_journal_of_other_rows_is_not_continued(many: Path, tmp_path: Path) -> None:
    predict(bundles(many)[:1], many / "test.csv", tmp_path / "submission.csv", deadline="2020-01-01T00:00:00")
    scores = predict(bundles(many)[:1], many / "many.csv", tmp_path / "submission.csv")
    assert len(scores) == COPIES * ROWS
    assert json.dumps(scores["orders"].unique().to_list()) == "[2]"
