"""Progress is seen in a log, too, and not only on a terminal."""

from __future__ import annotations

import pytest

from pairclf import console
from pairclf.console import counted, number, progress


def test_a_log_gets_a_line_every_so_often(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(console, "LOG_SECONDS", 0.0)
    with progress("score", total=3) as advance:
        advance(note="loss 1.5")
        advance(2)
    written = capsys.readouterr().err
    assert "score 1/3" in written
    assert "loss 1.5" in written
    assert "eta" in written


def test_other_processes_are_silent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(console, "LOG_SECONDS", 0.0)
    with progress("score", total=1, visible=False) as advance:
        advance()
    assert capsys.readouterr().err == ""


def test_one_row_is_no_rows() -> None:
    assert [counted(count, "row") for count in (0, 1, 25_000)] == ["0 rows", "1 row", "25,000 rows"]
    assert [counted(count, "row has", "rows have") for count in (1, 2)] == ["1 row has", "2 rows have"]
    assert [number(value, 3) for value in (None, 0.12345)] == ["-", "0.123"]
