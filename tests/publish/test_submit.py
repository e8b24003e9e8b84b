from __future__ import annotations

from pathlib import Path

import pytest
from fake_kaggle import KEY, FakeKaggle, Fault
from kaggle_support import Ticks, small_package

from pairclf.errors import ConfigError, PackagingError, PairclfError
from pairclf.packaging.build_record import read_build
from pairclf.publish import ledger as table
from pairclf.publish.client import KaggleError
from pairclf.publish.push import push
from pairclf.publish.submit import submit

pytestmark = pytest.mark.usefixtures("rehearsed")


@pytest.fixture
def pushed(tmp_path: Path, kaggle: FakeKaggle, ticks: Ticks) -> Path:
    package = small_package(tmp_path / "package")
    push(package, go=True, clock=ticks.clock)
    kaggle.calls.clear()
    return package


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "ledger.jsonl"


def test_submits_the_version_and_writes_its_score(pushed: Path, kaggle: FakeKaggle, ticks: Ticks, ledger: Path) -> None:
    submit(pushed, "five folds", go=True, ledger=ledger, clock=ticks.clock)
    build = read_build(pushed)
    (sent,) = kaggle.bodies("CreateCodeSubmission")
    assert sent == {
        "competitionName": "lmsys-chatbot-arena",
        "kernelOwner": "someone",
        "kernelSlug": "a-notebook",
        "kernelVersion": 1,
        "fileName": "submission.csv",
        "submissionDescription": f"five folds [pairclf {build.identity[:12]}, version 1]",
    }
    (row,) = table.rows(ledger)
    assert (row.status, row.public, row.private, row.submission) == ("COMPLETE", 0.98765, None, 1000)
    assert (row.config, row.folds, row.out_of_fold) == ("demo/llama-tiny", {"0": 0.9}, 0.95)
    assert (row.seconds, row.message, row.kernel) == (61.0, "five folds", "someone/a-notebook/1")
    assert row.bundles == [build.bundles[0].seal]


def test_dry_run_prints_the_request_and_sends_nothing(
    pushed: Path, kaggle: FakeKaggle, ledger: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    submit(pushed, "five folds", go=False, ledger=ledger)
    shown = capsys.readouterr()
    assert kaggle.calls == []
    assert not ledger.exists()
    assert "CreateCodeSubmission" in shown.out
    assert '"kernelVersion": 1' in shown.out
    assert KEY not in shown.out + shown.err


def test_the_same_is_not_submitted_twice_unless_asked(
    pushed: Path, kaggle: FakeKaggle, ticks: Ticks, ledger: Path
) -> None:
    for message, again in [("one", False), ("one", False), ("two", False), ("one", True)]:
        submit(pushed, message, go=True, ledger=ledger, again=again, clock=ticks.clock)
    assert [row.message for row in table.rows(ledger)] == ["one", "two", "one"]
    assert kaggle.names().count("CreateCodeSubmission") == 3


def test_what_the_ledger_knows_is_not_submitted_twice_where_kaggles_list_is_late(
    pushed: Path, kaggle: FakeKaggle, ticks: Ticks, ledger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(pushed, "one", go=True, ledger=ledger, clock=ticks.clock)
    monkeypatch.setattr("pairclf.publish.submit._submission_of", lambda submissions, description: None)
    submit(pushed, "one", go=True, ledger=ledger, clock=ticks.clock)
    assert len(kaggle.submissions) == 1


@pytest.mark.parametrize("fault", [Fault(), Fault(after=True), Fault(429, headers={"Retry-After": "30"})])
def test_lost_request_makes_one_submission(
    pushed: Path, kaggle: FakeKaggle, ticks: Ticks, ledger: Path, fault: Fault
) -> None:
    kaggle.faults["CreateCodeSubmission"].append(fault)
    submit(pushed, "one", go=True, ledger=ledger, clock=ticks.clock)
    assert len(kaggle.submissions) == 1
    assert [row.public for row in table.rows(ledger)] == [0.98765]


def test_submission_that_fails_is_told_in_kaggles_words(
    pushed: Path, kaggle: FakeKaggle, ticks: Ticks, ledger: Path
) -> None:
    kaggle.scores.append({"status": "ERROR", "errorDescription": "Notebook Threw Exception"})
    with pytest.raises(PackagingError, match="Notebook Threw Exception"):
        submit(pushed, "one", go=True, ledger=ledger, clock=ticks.clock)
    assert [(row.status, row.error) for row in table.rows(ledger)] == [("ERROR", "Notebook Threw Exception")]
    submit(pushed, "one", go=True, ledger=ledger, clock=ticks.clock)  # a failed one is no obstacle to another
    assert [row.public for row in table.rows(ledger)] == [None, 0.98765]


def test_refused_submission_writes_no_line(pushed: Path, kaggle: FakeKaggle, ticks: Ticks, ledger: Path) -> None:
    kaggle.errors["CreateCodeSubmission"] = {"message": "you have no submissions left today"}
    with pytest.raises(KaggleError, match="no submissions left today"):
        submit(pushed, "one", go=True, ledger=ledger, clock=ticks.clock)
    assert table.rows(ledger) == []


@pytest.mark.parametrize("go", [False, True])
@pytest.mark.parametrize("content", [b'{"when": "20', b"\xff\xfe\0", b'{"colour": 1}\n'])
def test_torn_ledger_is_told_before_anything_is_submitted(
    pushed: Path, kaggle: FakeKaggle, ticks: Ticks, ledger: Path, content: bytes, go: bool
) -> None:
    ledger.parent.mkdir()
    ledger.write_bytes(content)
    with pytest.raises((PackagingError, ConfigError), match="ledger"):
        submit(pushed, "one", go=go, ledger=ledger, clock=ticks.clock)
    assert "CreateCodeSubmission" not in kaggle.names()
    assert ledger.read_bytes() == content


def test_ledger_that_cannot_be_written_is_told_before_anything_is_submitted(
    pushed: Path, kaggle: FakeKaggle, ticks: Ticks, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    for ledger in (tmp_path, tmp_path / "file" / "ledger.jsonl"):
        with pytest.raises(PairclfError, match=r"is a folder|is no folder"):
            submit(pushed, "one", go=True, ledger=ledger, clock=ticks.clock)
    assert "CreateCodeSubmission" not in kaggle.names()


@pytest.mark.parametrize("go", [False, True])
def test_only_what_was_pushed_can_be_submitted(
    tmp_path: Path, pushed: Path, kaggle: FakeKaggle, ledger: Path, go: bool
) -> None:
    with pytest.raises(PackagingError, match="has not pushed"):
        submit(small_package(tmp_path / "other", code="print(3)"), "one", go=go, ledger=ledger)
    small_package(pushed, code="print(2)")  # packaged again, not pushed again
    with pytest.raises(PackagingError, match="has not pushed"):
        submit(pushed, "one", go=go, ledger=ledger)
    assert kaggle.calls == []


def test_refresh_asks_for_scores_that_were_missing(
    pushed: Path, kaggle: FakeKaggle, ticks: Ticks, ledger: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    submit(pushed, "one", go=True, ledger=ledger, clock=ticks.clock)
    kaggle.submissions[0]["end"]["privateScore"] = "0.99"
    table.refresh(ledger, clock=ticks.clock)
    assert [(row.public, row.private) for row in table.rows(ledger)] == [(0.98765, 0.99)]
    kaggle.calls.clear()
    table.refresh(ledger, clock=ticks.clock)
    assert kaggle.calls == []
    assert "has every score" in capsys.readouterr().err
