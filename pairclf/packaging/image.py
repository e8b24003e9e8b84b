"""A stand-in for Kaggle's image: an environment with all of this one's packages but those that Kaggle lacks."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections.abc import Collection, Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path

from pairclf.errors import PackagingError
from pairclf.packaging.wheelhouse import normalise

_FOR_COMPILERS = (".c", ".cuh", ".h", ".hpp", ".pyi")  # a third of the files, and no notebook reads them
_PROBE = """
import importlib.metadata, importlib.util, sys
for name in sys.argv[1:]:
    if importlib.util.find_spec(name.replace("-", "_")):
        sys.exit(f"{name} can still be imported")
    try:
        sys.exit(f"{name} {importlib.metadata.version(name)} is still installed")
    except importlib.metadata.PackageNotFoundError:
        pass
"""


def make_image(folder: Path, hidden: Collection[str]) -> Path:
    """Make a virtual environment in `folder`, and return its interpreter.

    Its files are links to this environment's, hard ones where the file system allows them: that takes seconds and no
    room. Its folders are its own, so whatever pip removes or writes anew in there stays in there.

    Args:
        folder: does not exist yet.
        hidden: projects that must not be there, their files (an editable install's too) left out.

    Raises:
        PackagingError: a hidden project can still be imported.
    """
    venv.EnvBuilder(symlinks=True, with_pip=False).create(folder)
    python = folder / "bin" / "python"
    target = next(folder.glob("lib/python*/site-packages"))
    left_out = {normalise(name) for name in hidden}
    for site in _site_folders():
        _link_tree(site, target, _files_of(left_out, site))
    command = [str(python), "-I", "-c", _PROBE, *sorted(left_out)]
    probe = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if probe.returncode != 0:
        raise PackagingError(
            f"the stand-in for Kaggle's image does not hide what it must: {probe.stderr.strip()}",
            remedy="rehearse from an environment into which it was installed by pip",
        )
    return python


def _site_folders() -> Iterator[Path]:
    """This interpreter's site-packages; the first on its path comes first and wins."""
    for entry in map(Path, sys.path):
        if entry.name in ("site-packages", "dist-packages") and entry.is_dir():
            yield entry


def _files_of(projects: Collection[str], site: Path) -> set[Path]:
    """Every file that the projects have below `site`, by their RECORD."""
    found = (entry for entry in distributions(path=[str(site)]) if normalise(entry.name) in projects)
    return {path for entry in found for path in _files(entry)}


def _files(found: Distribution) -> Iterator[Path]:
    for entry in found.files or []:
        yield Path(os.path.normpath(str(entry.locate())))


def _link_tree(source: Path, target: Path, left_out: Collection[Path]) -> None:
    """Link the files of `source`, but those left out, the byte code beside those, and what only compilers read."""
    emptied = {path.parent / "__pycache__" for path in left_out}
    for root, _, names in os.walk(source):
        here = Path(root)
        if here in emptied:
            continue
        for name in names:
            path, there = here / name, target / here.relative_to(source) / name
            if path.suffix not in _FOR_COMPILERS and path not in left_out and not there.exists():
                _link(path, there)


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system, or another owner
        target.symlink_to(source)
