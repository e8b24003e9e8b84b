"""The command line itself: what it does before any command."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pairclf.cli import keep_folder_out


def test_no_process_imports_modules_from_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -c` is how multiprocessing starts processes, and `python -m` how `--processes` and pip are started."""
    (tmp_path / "struct.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONSAFEPATH", "")  # so that it is put back
    monkeypatch.delenv("PYTHONSAFEPATH")
    command = [sys.executable, "-c", "import struct"]
    assert subprocess.run(command, check=False).returncode == 3
    keep_folder_out()
    assert subprocess.run(command, check=False).returncode == 0


def test_pairclf_that_is_not_installed_is_found_by_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    import pairclf

    monkeypatch.chdir(Path(pairclf.__file__).parents[1])
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    monkeypatch.delenv("PYTHONSAFEPATH")
    keep_folder_out()
    assert "PYTHONSAFEPATH" not in os.environ


def test_links_that_lead_to_each_other_are_an_error_and_no_traceback(
    tmp_path: Path, cli: Callable[..., tuple[int, str]]
) -> None:
    (tmp_path / "a.yaml").symlink_to(tmp_path / "a.yaml")
    code, said = cli("config", tmp_path / "a.yaml")
    assert code == 2
    assert "a.yaml" in said
