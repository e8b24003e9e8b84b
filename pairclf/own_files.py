"""Where pairclf's own files are: in a checkout, or inside the installed wheel."""

from __future__ import annotations

import os
import tomllib
from functools import cache
from pathlib import Path

import pairclf
from pairclf.console import console
from pairclf.errors import PackagingError

_PACKAGE = Path(pairclf.__file__).resolve().parent


def checkout() -> Path | None:
    """The source checkout that this pairclf runs from; `None` where it was installed from a wheel."""
    project = _PACKAGE.parent / "pyproject.toml"
    if not project.is_file():
        return None
    name = tomllib.loads(project.read_text(encoding="utf-8")).get("project", {}).get("name")
    return _PACKAGE.parent if name == "pairclf" else None


def shipped(name: str) -> Path:
    """A file that lives beside the package in a checkout and travels inside its wheel.

    Args:
        name: path from the top of the checkout, e.g. `kaggle/notebook.py`.

    Raises:
        PackagingError: neither place holds it.
    """
    path = _top() / name
    if not path.exists():
        raise PackagingError(f"pairclf's own {name} is missing", where=path, remedy="install pairclf again")
    return path


def or_shipped(path: Path) -> Path:
    """The path of a config, or of a folder of them; where there is none, pairclf's own: `configs/lmsys/base.yaml`."""
    name = Path(os.path.relpath(path))  # of `extends: ../lmsys/base.yaml`, or below the whole path of this folder
    if name.parts[:1] != ("configs",) or os.path.lexists(path) or not (own := _top() / name).exists():
        return path
    if own.is_file():
        _note(name)
    return own


@cache
def _note(name: Path) -> None:
    """Said once: who stands in another folder than his config's means another file."""
    console.print(f"note: {name} is pairclf's own config, as this folder has no such file")


def _top() -> Path:
    top = checkout()
    return _PACKAGE / "_shipped" if top is None else top
