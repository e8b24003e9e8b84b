"""What the journal returned from is kept, whatever happens next; what can't be kept does not end the run."""

from __future__ import annotations

import random
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pairclf.errors import PairclfError
from pairclf.inference.journal import NOT_FINITE, Journal

IDENTITY = {"seals": ["a", "b"], "data": "c"}


def scored(journal: Journal) -> dict[tuple[int, int, int], list[float]]:
    return {(member, row, order): logits.tolist() for member, row, order, logits in journal.scored()}


def test_everything_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "new" / "out.journal"
    journal = Journal.open(path, IDENTITY)
    logits = np.random.default_rng(0).normal(size=(3, 3)) / 3  # digits that a shorter text would lose
    journal.add(0, [(0, 0), (0, 1), (5, 0)], logits)
    journal.add(1, [(0, 0)], logits[:1])
    journal.add(1, [(0, 0)], logits[1:2])  # again: the later one counts
    journal.fail(0, 7, 1, "out of memory by itself")
    journal.close()
    again = Journal.open(path, dict(reversed(IDENTITY.items())))
    assert again.restart_reason is None
    wanted = {(0, 0, 0): logits[0], (0, 0, 1): logits[1], (0, 5, 0): logits[2], (1, 0, 0): logits[1]}
    assert scored(again) == {key: values.tolist() for key, values in wanted.items()}
    assert list(again.failed()) == [(0, 7, 1, "out of memory by itself")]
    again.remove()
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_failures_until_they_are(tmp_path: Path, value: float) -> None:
    journal = Journal.open(tmp_path / "journal", IDENTITY)
    journal.add(0, [(0, 0), (1, 0)], np.array([[0.0, value], [1.0, 2.0]]))
    assert scored(journal) == {(0, 1, 0): [1.0, 2.0]}
    assert list(journal.failed()) == [(0, 0, 0, NOT_FINITE)]
    journal.add(0, [(0, 0)], np.zeros((1, 2)))
    assert list(journal.failed()) == []
    journal.close()


def test_another_run_starts_anew_and_says_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "journal"
    first = Journal.open(path, IDENTITY)
    first.add(0, [(0, 0)], np.zeros((1, 3)))
    first.close()
    other = Journal.open(path, {"seals": ["b", "a"], "data": "c", "swap": "off"})
    assert (
        other.restart_reason
        == 'it is of another run: seals was ["a", "b"] and is ["b", "a"], swap was null and is "off"'
    )
    assert other.restart_reason in " ".join(capsys.readouterr().err.split())
    assert scored(other) == {}
    other.close()
    again = Journal.open(path, {"seals": ["b", "a"], "data": "c", "swap": "off"})
    assert again.restart_reason is None
    again.close()


def filled(path: Path, rows: int) -> None:
    journal = Journal.open(path, IDENTITY)
    journal.add(0, [(row, 0) for row in range(rows)], np.arange(3.0 * rows).reshape(rows, 3))
    journal.close()


@pytest.mark.parametrize("place", [0, 60, 5000])
def test_a_damaged_journal_is_started_anew(tmp_path: Path, place: int) -> None:
    path = tmp_path / "journal"
    filled(path, 1000)
    content = bytearray(path.read_bytes())
    content[place : place + 4000] = random.Random(0).randbytes(4000)
    path.write_bytes(content)
    again = Journal.open(path, IDENTITY)
    assert (again.restart_reason or "").startswith("it was damaged")
    assert scored(again) == {}
    again.add(0, [(0, 0)], np.zeros((1, 3)))
    assert again.write_error is None
    again.close()


def test_of_a_journal_whose_end_is_lost_the_whole_records_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "journal"
    filled(path, 1000)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 3 // 4])
    again = Journal.open(path, IDENTITY)
    found = scored(again)
    assert (again.restart_reason or "").startswith("it was damaged")
    assert 100 < len(found) < 1000
    assert found == {(0, row, 0): [3.0 * row, 3.0 * row + 1, 3.0 * row + 2] for _, row, _ in found}
    assert f"{len(found):,} intact records of it kept" in " ".join(capsys.readouterr().err.split())
    again.add(0, [(999, 0)], np.ones((1, 3)))
    again.close()
    assert len(scored(Journal.open(path, IDENTITY))) == len(found) + 1


def test_of_another_runs_damaged_journal_nothing_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    filled(path, 1000)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 3 // 4])
    other = Journal.open(path, {**IDENTITY, "data": "other"})
    assert scored(other) == {}
    other.close()


def test_bytes_that_were_flipped_on_disk_cost_their_record_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """sqlite's own check passes such a file: a changed cell is a cell."""
    path = tmp_path / "journal"
    journal = Journal.open(path, IDENTITY)
    sought = np.array([[0.1234567, 1.0, 2.0], [7.654321, 4.0, 5.0]])
    journal.add(0, [(0, 0), (1, 0)], sought)
    journal.fail(0, 2, 1, "out of memory by itself")
    journal.close()
    content = path.read_bytes()
    place = content.index(sought[1].tobytes())
    changed = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    path.write_bytes(changed.replace(b"out of memory by itself", b"out of memory by itsel\xff"))
    again = Journal.open(path, IDENTITY)
    assert scored(again) == {(0, 0, 0): sought[0].tolist()}
    assert list(again.failed()) == []
    text = " ".join(capsys.readouterr().err.split())
    assert text.count("the journal") == text.count("wrong checksum of 2 records); 1 intact record of it") == 1
    again.add(0, [(1, 0)], sought[1:])
    assert scored(again)[0, 1, 0] == sought[1].tolist()
    again.close()


def believed_after_flips(folder: Path, step: int) -> int:
    """How many journals give a record that was never written, of those in which one byte was flipped on disk."""
    path = folder / "journal"
    with closing(sqlite3.connect(path)) as file:
        file.execute("PRAGMA page_size = 512")
        file.execute("PRAGMA journal_mode = WAL")  # the page size stays, also for `Journal`
    filled(path, 4)
    content, wrong = path.read_bytes(), 0
    written = {(0, row, 0): [3.0 * row, 3.0 * row + 1, 3.0 * row + 2] for row in range(4)}
    for place in range(0, len(content), step):
        path.write_bytes(content[:place] + bytes([content[place] ^ (1 << place % 8)]) + content[place + 1 :])
        journal = Journal.open(path, IDENTITY)
        wrong += not scored(journal).items() <= written.items() or bool(list(journal.failed()))
        journal.remove()
    return wrong


def test_no_flipped_byte_of_a_journal_gives_wrong_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    """Nor ends it the run. Without the checksum some would."""
    step = 1 if pytestconfig.getoption("--thorough") else 7
    assert believed_after_flips(tmp_path, step) == 0
    monkeypatch.setattr("pairclf.inference.journal._checksum", lambda key, content: len(content))
    assert believed_after_flips(tmp_path, step) > 0


def test_a_journal_of_another_format_is_started_anew_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "journal"
    with monkeypatch.context() as older:
        older.setattr("pairclf.inference.journal.FORMAT", 3)
        filled(path, 2)
    journal = Journal.open(path, IDENTITY)
    assert scored(journal) == {}
    said = "it has format 3 of another version of pairclf; this version reads format 4"
    assert said in " ".join(capsys.readouterr().err.split())
    journal.close()


def test_records_of_an_unknown_run_are_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    filled(path, 3)
    with closing(sqlite3.connect(path)) as file, file:
        file.execute("DELETE FROM identity")
    journal = Journal.open(path, IDENTITY)
    assert scored(journal) == {}
    assert journal.restart_reason == "it was damaged (it does not say of which run it is)"
    journal.close()


def test_records_do_not_change_places(tmp_path: Path) -> None:
    """A record whose row is another one has the wrong checksum, though its logits are as they were."""
    path = tmp_path / "journal"
    filled(path, 3)
    with closing(sqlite3.connect(path)) as file, file:
        file.execute("UPDATE scored SET row = 7 WHERE row = 1")
    journal = Journal.open(path, IDENTITY)
    assert sorted(row for _, row, _ in scored(journal)) == [0, 2]
    journal.close()


def test_notes_stay_with_their_run(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "journal", IDENTITY)
    assert journal.read_note("submission") is None
    journal.write_note("submission", "first")
    journal.write_note("submission", "second")
    journal.close()
    again = Journal.open(tmp_path / "journal", IDENTITY)
    assert again.read_note("submission") == "second"
    again.close()
    other = Journal.open(tmp_path / "journal", {})
    assert other.read_note("submission") is None
    other.close()


def test_a_cleared_journal_is_empty_stays_locked_and_goes_on(tmp_path: Path) -> None:
    filled(tmp_path / "journal", 2)
    journal = Journal.open(tmp_path / "journal", IDENTITY)
    journal.write_note("submission", "first")
    journal.fail(0, 5, 0, "x")
    journal.clear()
    assert (scored(journal), list(journal.failed()), journal.read_note("submission")) == ({}, [], None)
    with pytest.raises(PairclfError, match="another process"):
        Journal.open(tmp_path / "journal", IDENTITY)
    journal.add(0, [(1, 0)], np.ones((1, 3)))
    journal.close()
    again = Journal.open(tmp_path / "journal", IDENTITY)
    assert list(scored(again)) == [(0, 1, 0)]
    again.close()


HOLD = """
import sys
from pathlib import Path
from pairclf.inference.journal import Journal
journal = Journal.open(Path(sys.argv[1]), {"seals": ["a", "b"], "data": "c"})
print("open", flush=True)
input()
"""


def test_two_runs_do_not_share_a_journal(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        with pytest.raises(PairclfError, match="another process is predicting"):
            Journal.open(path, IDENTITY)
        other.kill()  # a killed process holds nothing
        other.wait()
    journal = Journal.open(path, IDENTITY)
    assert journal.write_error is None
    journal.close()


WRITE = """
import sys
from pathlib import Path
import numpy as np
from pairclf.inference.journal import Journal
journal = Journal.open(Path(sys.argv[1]), {"seals": ["a", "b"], "data": "c"})
first = 1 + max((row for _, row, _, _ in journal.scored()), default=-1) // 4
for batch in range(first, 1_000_000):
    rows = [(4 * batch + number, 0) for number in range(4)]
    journal.add(0, rows, np.array(rows, dtype=float))
    sys.stdout.write(f"{batch}\\n")
    sys.stdout.flush()
"""


def test_journal_loses_no_batch_to_kills_at_random_moments(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    draw = random.Random(0)
    path = tmp_path / "journal"
    said = -1
    for _ in range(20 if pytestconfig.getoption("--thorough") else 8):
        with subprocess.Popen([sys.executable, "-c", WRITE, str(path)], stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            for _ in range(draw.randint(1, 60)):
                said = int(writer.stdout.readline())
            writer.send_signal(signal.SIGKILL)
            left = writer.stdout.read().split("\n")  # what it said before it died; the last line may be cut
            said = int(left[-2]) if len(left) > 1 else said
        journal = Journal.open(path, IDENTITY)
        assert journal.restart_reason is None
        found = scored(journal)
        journal.close()
        assert len(found) % 4 == 0  # a batch is in, or not
        assert len(found) >= 4 * (said + 1)
        assert found == {(0, row, 0): [row, 0.0] for row in range(len(found))}


FILL = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from pairclf.inference.journal import Journal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
journal = Journal.open(Path(sys.argv[1]), {"seals": ["a", "b"], "data": "c"})
for batch in range(2000):
    journal.add(0, [(batch, 0)], np.zeros((1, 3)))
assert journal.write_error, "the limit was not reached"
print(sum(1 for _ in journal.scored()))
journal.close()
"""


def test_a_full_disk_is_said_once_and_keeps_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    run = subprocess.run([sys.executable, "-c", FILL, str(path)], capture_output=True, text=True, check=True)
    assert run.stderr.count("can't be written") == 1
    again = Journal.open(path, IDENTITY)
    assert again.restart_reason is None
    assert 0 < len(scored(again)) < 2000
    assert len(scored(again)) == int(run.stdout)
    again.close()


def test_a_folder_that_can_not_be_written_to_costs_the_journal_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:  # permissions would not stop root, whom tests may run as
        raise sqlite3.OperationalError("unable to open database file")

    monkeypatch.setattr(sqlite3, "connect", refuse)
    journal = Journal.open(tmp_path / "journal", IDENTITY)
    journal.add(0, [(0, 0)], np.zeros((1, 3)))
    journal.fail(0, 1, 0, "x")
    assert journal.write_error == "unable to open database file"
    assert capsys.readouterr().err.count("can't be written") == 1
    assert (scored(journal), list(journal.failed())) == ({}, [])
    journal.remove()


def test_a_file_in_the_way_of_its_folder_costs_the_journal_too(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert Journal.open(tmp_path / "file" / "journal", IDENTITY).write_error
