"""At every moment there is a submission that Kaggle would take; a write that fails leaves the one before."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from pairclf.data.submission import check_ids, check_submission
from pairclf.errors import DataError, PairclfError
from pairclf.inference.journal import Journal
from pairclf.inference.submission import PREVIOUS_SUBMISSION, SubmissionWriter
from pairclf.scores.metrics import Floats
from pairclf.task import LMSYS, WSDM

PRIOR = (0.5, 0.3, 0.2)


class Hand:
    """A clock that is turned by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def sample_of(folder: Path, ids: Sequence[str]) -> Path:
    path = folder / "sample.csv"
    cells = {name: [1 / 3] * len(ids) for name in ("winner_tie", "winner_model_b", "winner_model_a")}  # another order
    pl.DataFrame({"id": ids, **cells}).write_csv(path)
    return path


def drawn(rows: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).dirichlet(np.ones(3), size=rows)


def test_the_prior_comes_first_and_rows_find_their_places(tmp_path: Path) -> None:
    sample, out, clock = sample_of(tmp_path, ["3", "1", "2"]), tmp_path / "out.csv", Hand()
    sink = SubmissionWriter(out, LMSYS, sample, None, clock=clock)
    assert sink.due(0.0)
    sink.write_prior(PRIOR)
    check_submission(out, sample, LMSYS)
    assert pl.read_csv(out).rows() == [(number, 0.2, 0.3, 0.5) for number in (3, 1, 2)]
    assert not sink.due(29.9)
    assert sink.due(30.0)
    sink.ids = ["1", "2", "3"]
    values = drawn(3)
    sink.write(values)
    check_submission(out, sample, LMSYS)
    found = pl.read_csv(out).sort("id").select(LMSYS.classes).to_numpy()
    assert found.tolist() == values.tolist()


def test_without_a_sample_the_data_names_the_rows(tmp_path: Path) -> None:
    sink = SubmissionWriter(tmp_path / "out.csv", LMSYS, None, ["b", "a"], clock=Hand())
    sink.write_prior(PRIOR)
    assert pl.read_csv(tmp_path / "out.csv").rows() == [("b", *PRIOR), ("a", *PRIOR)]


def test_a_column_of_names_gets_names(tmp_path: Path) -> None:
    sample = tmp_path / "sample.csv"
    pl.DataFrame({"id": ["x", "y"], "winner": ["model_a", "model_a"]}).write_csv(sample)
    sink = SubmissionWriter(tmp_path / "out.csv", WSDM, sample, ["y", "x"], clock=Hand())
    sink.write_prior((0.4, 0.6))
    assert pl.read_csv(tmp_path / "out.csv")["winner"].to_list() == ["model_b", "model_b"]
    sink.close(np.array([[0.9, 0.1], [0.1, 0.9]]))
    assert pl.read_csv(tmp_path / "out.csv").rows() == [("x", "model_b"), ("y", "model_a")]


def test_a_failed_write_is_said_once_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, clock = tmp_path / "out.csv", Hand()
    sink = SubmissionWriter(out, LMSYS, None, ["a", "b"], clock=clock)
    sink.write_prior(PRIOR)
    first = out.read_bytes()

    def refuse(*_: Any) -> None:
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as broken:
        broken.setattr(os, "replace", refuse)
        for turn in range(1, 4):
            clock.now = 30.0 * turn
            assert sink.due(clock.now)
            sink.write(drawn(2, turn))
            assert not sink.due(clock.now)
        assert capsys.readouterr().err.count("could not be written") == 1
        with pytest.raises(OSError, match="Read-only"):
            sink.close()
    assert [path.name for path in tmp_path.iterdir()] == ["out.csv"]
    assert out.read_bytes() == first
    sink.close()  # the last one given is the one that must get there
    assert pl.read_csv(out).select(LMSYS.classes).to_numpy().tolist() == drawn(2, 3).tolist()


def test_a_folder_in_the_place_of_the_file_is_another_cause(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.csv"
    sink = SubmissionWriter(out, LMSYS, None, ["a"], clock=Hand())
    sink.write_prior(PRIOR)
    out.unlink()
    out.mkdir()
    sink.write(drawn(1))
    assert "is a folder" in capsys.readouterr().err
    out.rmdir()
    sink.close()
    assert pl.read_csv(out).height == 1


FULL = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from pairclf.inference.journal import Journal
from pairclf.inference.submission import PREVIOUS_SUBMISSION, SubmissionWriter
from pairclf.task import LMSYS

rows, limit = int(sys.argv[2]), 100_000
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sink = SubmissionWriter(Path(sys.argv[1]), LMSYS, None, [str(row) for row in range(rows)], clock=lambda: 0.0)
if sys.argv[3] == "later":
    sink.write_prior((0.5, 0.3, 0.2))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
if sys.argv[3] == "later":
    sink.write(np.random.default_rng(0).dirichlet(np.ones(3), size=rows))
else:
    sink.write_prior((0.5, 0.3, 0.2))
"""


def test_a_full_disk_is_an_error_at_first_and_a_word_later(tmp_path: Path) -> None:
    out, command = tmp_path / "out.csv", [sys.executable, "-c", FULL]
    at_once = subprocess.run([*command, str(out), "9000", "first"], capture_output=True, text=True)
    assert at_once.returncode == 1
    assert "File too large" in at_once.stderr
    assert list(tmp_path.iterdir()) == []
    later = subprocess.run([*command, str(out), "9000", "later"], capture_output=True, text=True)
    assert (later.returncode, later.stderr.count("could not be written")) == (0, 1)
    assert pl.read_csv(out).height == 9000
    assert pl.read_csv(out)["winner_model_a"].unique().to_list() == [0.5]


def test_the_first_file_must_succeed(tmp_path: Path) -> None:
    (tmp_path / "out.csv").mkdir()
    with pytest.raises(PairclfError, match="is a folder"):
        SubmissionWriter(tmp_path / "out.csv", LMSYS, None, ["a"], clock=Hand()).write_prior(PRIOR)


@pytest.mark.parametrize(("value", "what"), [(np.nan, "are no finite numbers"), (0.9, "do not sum to one")])
def test_what_is_no_distribution_never_gets_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], value: float, what: str
) -> None:
    sink = SubmissionWriter(tmp_path / "out.csv", LMSYS, None, ["a", "b"], clock=Hand())
    sink.write_prior(PRIOR)
    values = drawn(2)
    values[1, 0] = value
    sink.write(values)
    assert what in capsys.readouterr().err
    assert pl.read_csv(tmp_path / "out.csv").rows() == [("a", *PRIOR), ("b", *PRIOR)]
    with pytest.raises(DataError, match=what):
        sink.close()


def test_ids_are_compared_before_anything_is_scored(tmp_path: Path) -> None:
    sample = sample_of(tmp_path, ["1", "2", "3"])
    check_ids(["3", "2", "1"], LMSYS, sample)
    check_ids(["x", "y"], LMSYS, None)
    with pytest.raises(DataError, match="stand twice"):
        check_ids(["x", "x"], LMSYS, None)
    with pytest.raises(DataError) as refused:
        check_ids(["1", "7", "8"], LMSYS, sample)
    text = str(refused.value)
    assert "lack 2 ids" in text
    assert "rows:   2, 3" in text
    assert "have 2 ids" in text
    assert "rows:   7, 8" in text


def earlier(folder: Path) -> tuple[Path, bytes]:
    """A valid submission of rows a and b, an hour old."""
    out = folder / "out.csv"
    SubmissionWriter(out, LMSYS, None, ["a", "b"], clock=Hand()).close(drawn(2, 9))
    os.utime(out, (3600, 3600))
    return out, out.read_bytes()


def test_an_earlier_runs_submission_keeps_its_time_and_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that is killed before its first scores must not seem to have written what is there."""
    out, before = earlier(tmp_path)
    (tmp_path / "work").mkdir()
    sink = SubmissionWriter(out, LMSYS, None, ["a", "b"], clock=Hand())
    with pytest.raises(KeyboardInterrupt), sink.reporting_older(tmp_path / "work"):
        sink.begin(PRIOR)
        raise KeyboardInterrupt
    said = " ".join(capsys.readouterr().err.split())
    assert "is from an earlier run, written at 1970-01-01" in said
    assert "is still the submission of an earlier run: this run has not written one" in said
    assert (out.read_bytes(), out.stat().st_mtime) == (before, 3600)


def test_an_earlier_runs_submission_is_kept_while_this_run_is_not_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, before = earlier(tmp_path)
    (tmp_path / "work").mkdir()
    journal = Journal.open(tmp_path / "work" / "journal", {"run": 1})
    sink = SubmissionWriter(out, LMSYS, None, ["a", "b"], clock=Hand(), journal=journal)
    with pytest.raises(KeyboardInterrupt), sink.reporting_older(tmp_path / "work"):
        sink.begin(PRIOR)
        sink.write(drawn(2, 1))
        raise KeyboardInterrupt
    assert "this run has not written one" not in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "work" / PREVIOUS_SUBMISSION).read_bytes() == before
    ours = out.read_bytes()
    again = SubmissionWriter(out, LMSYS, None, ["a", "b"], clock=Hand(), journal=journal)  # the same run goes on
    with again.reporting_older(tmp_path / "work"):
        again.begin(PRIOR)
    assert not again.is_from_earlier_run
    assert "earlier run" not in " ".join(capsys.readouterr().err.split())
    assert out.read_bytes() == ours
    assert (tmp_path / "work" / PREVIOUS_SUBMISSION).read_bytes() == before
    journal.close()
    other = Journal.open(tmp_path / "work" / "journal", {"run": 2})
    third = SubmissionWriter(out, LMSYS, None, ["a", "b"], clock=Hand(), journal=other)
    with third.reporting_older(tmp_path / "work"):
        third.begin(PRIOR)
        assert "is from an earlier run" in " ".join(capsys.readouterr().err.split())
    other.close()


def test_an_earlier_runs_file_of_other_rows_is_replaced_by_the_priors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = earlier(tmp_path)
    sink = SubmissionWriter(out, LMSYS, None, ["a", "c"], clock=Hand())
    with pytest.raises(KeyboardInterrupt), sink.reporting_older(tmp_path):
        sink.begin(PRIOR)
        raise KeyboardInterrupt
    said = " ".join(capsys.readouterr().err.split())
    assert "it is of other rows or columns, and is replaced" in said
    assert "it is kept" not in said
    assert "this run has not written one" not in said
    assert pl.read_csv(out).rows() == [("a", *PRIOR), ("c", *PRIOR)]
