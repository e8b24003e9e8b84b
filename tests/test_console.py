"""Progress is seen in a log, too, and not only on a terminal."""

from __future__ import annotations

import pytest

from pairclf import console
from pairclf.console import progress


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
