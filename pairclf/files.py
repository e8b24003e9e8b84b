"""Whole or not at all: atomic files and folders, locks, content hashes, and YAML and JSON as we write them.

A reader never sees half a file: everything is written beside its destination, synced, and renamed over it.
A killed process leaves a `.tmp-…` entry that nothing reads and that the next writer of the same path removes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pairclf.console import console
from pairclf.errors import PairclfError

_CHUNK = 1 << 20  # bytes


def _temporary(path: Path) -> Path:
    return path.parent / f".tmp-{path.name}"


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_file_target(path: Path) -> None:
    """Refuse a path at which a file can't be written, or must not be: a folder, a device, below a file.

    Raises:
        PairclfError: says which.
    """
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "no regular file"
        raise PairclfError(f"{path} is {kind} and will not be replaced by a file", remedy="give another path")
    parent = next(folder for folder in (path.parent, *path.parent.parents) if folder.exists())
    if not parent.is_dir():
        raise PairclfError(f"{path} can't be written: {parent} is no folder", remedy="give another path")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to; on success it replaces `path` in one rename, on any error it is removed.

    Raises:
        PairclfError: something other than a file stands at `path`.
        OSError: as the writing raised it (a full disk, a read-only folder); `path` is then untouched.
    """
    check_file_target(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    _remove(temporary)
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        _remove(temporary)
        raise
    _sync(path.parent)


@contextmanager
def atomic_folder(path: Path, *, known_by: str) -> Iterator[Path]:
    """Yield an empty folder to fill; on success it takes the place of `path`, on any error it is removed.

    Args:
        path: an older folder there is replaced if it is empty or holds an entry named `known_by`.
        known_by: a file or folder that every folder of this kind holds, so that nobody's other files are deleted.

    Raises:
        PairclfError: something else stands at `path`.
        OSError: as the writing raised it; `path` is then untouched.

    An older folder at `path` is moved aside first and removed last, so that at every moment one whole folder
    exists under either name.
    """
    if path.exists() and not (path.is_dir() and ((path / known_by).exists() or not any(path.iterdir()))):
        raise PairclfError(
            f"{path} holds something else than is to be written there (no {known_by}), and will not be replaced",
            remedy="give a new folder, or remove what is there yourself",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = _temporary(path), path.parent / f".tmp-old-{path.name}"
    _remove(temporary)
    if old.exists() and not path.exists():  # killed between the two renames below: the old one is the whole one
        os.replace(old, path)
    _remove(old)
    temporary.mkdir()
    try:
        yield temporary
        for entry in sorted(temporary.rglob("*")):
            if entry.is_file():
                _sync(entry)
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
    except BaseException:
        _remove(temporary)
        raise
    _remove(old)
    _sync(path.parent)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`; where another process holds it, say so and wait. A killed process holds none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        console.print(f"waiting for another process, which holds {path}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link, or a copy where there can be none; never a symbolic link, which names where it leads."""
    try:
        os.link(source, target)
    except OSError:  # another file system, or another owner
        shutil.copyfile(source, target)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with a closing newline, atomically. NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_plain(path: Path, most: int) -> str:
    """The text of a regular UTF-8 file, or of the one that a link leads to.

    A FIFO or a device is not opened: to read it may never end. `most`: bytes that such a file may have.

    Raises:
        OSError: it can't be read, is not a regular file, or is larger.
        UnicodeDecodeError: it is not UTF-8.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    with path.open("rb") as stream:
        content = stream.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"more than {most:,} bytes", str(path))
    return content.decode("utf-8")


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in chunks of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_tree(folder: Path, *, without: frozenset[str] = frozenset()) -> dict[str, str]:
    """`{relative posix path: hex SHA-256}` of every file under `folder`, sorted, less the paths in `without`."""
    files = (entry for entry in sorted(folder.rglob("*")) if entry.is_file())
    names = ((entry, entry.relative_to(folder).as_posix()) for entry in files)
    return {name: sha256_file(entry) for entry, name in names if name not in without}
