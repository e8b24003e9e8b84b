"""Interpreters of other Python versions on this machine, for the check of the wheels and for rehearsals."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import uv

from pairclf.files import home_folder

_PROBE = "import sys; print('%d.%d' % sys.version_info[:2], '%d.%d.%d' % sys.version_info[:3], sys.implementation.name)"


def find_interpreter(python: str) -> Path | None:
    """A CPython of this version that really runs, or None.

    Args:
        python: 3.12

    Looked for in this order: the running one, the command `python3.12`, what uv and pyenv have installed.
    """
    return next((path for path in _candidates(python) if _probe(path)[:1] == [python]), None)


def full_version(interpreter: Path) -> str:
    """The version to show: `CPython 3.12.1`."""
    return f"CPython {_probe(interpreter)[1]}"


def _candidates(python: str) -> Iterator[Path]:
    yield Path(sys.executable)
    name = f"python{python}"
    if on_path := shutil.which(name):
        yield Path(on_path)
    command = [uv.find_uv_bin(), "python", "find", "--no-project", "--no-python-downloads", "--managed-python", python]
    uv_find = subprocess.run(command, capture_output=True, text=True, check=False)
    if uv_find.returncode == 0:
        yield Path(uv_find.stdout.strip())
    pyenv = Path(os.environ.get("PYENV_ROOT") or (home_folder() or Path("/")) / ".pyenv")
    yield from sorted(pyenv.glob(f"versions/*/bin/{name}"))


def _probe(interpreter: Path) -> list[str]:
    """`[3.12, 3.12.1]`; empty if it does not run, as pyenv's shims of versions that are not installed."""
    done = subprocess.run([str(interpreter), "-I", "-c", _PROBE], capture_output=True, text=True, check=False)
    short, full, implementation = done.stdout.split() if done.returncode == 0 else ("", "", "")
    return [short, full] if implementation == "cpython" else []
