"""Folders of this machine's own that are the test's."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a rehearsal leaves on this machine, outside the package, lies in here."""
    top = tmp_path / "machine"
    monkeypatch.setenv("XDG_STATE_HOME", str(top / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(top / "cache"))
    return top
