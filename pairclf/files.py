"""Whole or not at all: atomic files and folders, locks, content hashes, and YAML and JSON as we write them.

A reader never sees half a file: everything is written beside its destination, synced, and renamed over it.
A killed process leaves a `.tmp-…` entry that nothing reads and that the next writer of the same path removes.

What another person wrote is checked here before it is used: `check_name` and `check_path` for names that a file gives,
`refuse_special_files` for a folder. What this machine alone must be able to say lies in `state_folder`.
"""

from __future__ import annotations

import errno
import fcntl
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
_CLONE = 0x40049409  # FICLONE of ioctl_ficlone(2): the copy shares its blocks until one of the two is changed
_LONGEST_NAME = 255  # bytes of a name, of every usual file system


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
        copy_file(source, target)


def copy_file(source: Path, target: Path) -> None:
    """A copy of a file's bytes in the new file `target`; it takes no room where the file system can share blocks."""
    with source.open("rb") as stream, target.open("xb") as sink:
        try:
            fcntl.ioctl(sink.fileno(), _CLONE, stream.fileno())
        except OSError:  # another file system, or one that has no such copies
            shutil.copyfileobj(stream, sink, _CHUNK)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_private(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically, into a file (0600) and a folder (0700) that its owner alone can open."""
    private_folder(path.parent)
    with atomic_file(path) as temporary:
        temporary.touch(0o600, exist_ok=False)
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with a closing newline, atomically. NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


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


# --- what another person wrote ---------------------------------------------------------------------------------------


def check_name(name: str, what: str) -> str:
    """Return `name` if it is the name of one file or folder, so that `folder / name` lies in `folder`.

    Args:
        name: from a file or a server.
        what: has the name, for the message: "a part's folder".

    Raises:
        PairclfError: it is empty, `.` or `..`, is longer than 255 bytes, or holds `/`, `\\` or a control character.
    """
    rule = next((rule for broken, rule in _broken_rules(name) if broken), None)
    if rule is not None:
        raise PairclfError(f"{what} has the name {_shown(name)}, which {rule}", remedy="do not use this folder")
    return name


def _broken_rules(name: str) -> Iterator[tuple[bool, str]]:
    yield not name, "is empty"
    yield name in (".", ".."), "is no name"
    yield "/" in name or "\\" in name, "is a path and no name"
    yield any(not letter.isprintable() for letter in name), "holds a character that can't be printed"
    yield len(name.encode("utf-8", "surrogatepass")) > _LONGEST_NAME, f"is longer than {_LONGEST_NAME} bytes"


def check_path(path: str, what: str) -> str:
    """Return `path` if it is a relative path of names (see `check_name`) with `/` between them.

    Raises:
        PairclfError: it is absolute, or one of its names is none.
    """
    for name in path.split("/"):
        try:
            check_name(name, what)
        except PairclfError as error:
            raise PairclfError(
                f"{what} has the path {_shown(path)}, which leads out of its folder or is none",
                remedy=error.remedy,
            ) from error
    return path


def _shown(text: str) -> str:
    """As it may be printed: what a file holds may be long, and a command to the terminal."""
    return ascii(text if len(text) <= 100 else text[:100] + "...")


def refuse_special_files(folder: Path) -> list[str]:
    """List the regular files below `folder`, and refuse whatever is neither one nor a folder. No link is followed.

    Args:
        folder: may itself be reached through links, as its user gave it.

    Returns:
        Relative posix paths, sorted.

    Raises:
        PairclfError: a link, a device, a pipe or a socket lies there; names it.
        OSError: a folder below can't be read.
    """
    found: list[str] = []
    waiting = [""]
    while waiting:
        below = waiting.pop()
        with os.scandir(folder / below) as entries:
            for entry in entries:
                name = f"{below}{entry.name}"
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(f"{name}/")
                elif entry.is_file(follow_symlinks=False):
                    found.append(name)
                else:
                    raise PairclfError(
                        f"{_shown(name)} is {_kind_of(entry)}, and only files and folders may lie there",
                        where=folder,
                        remedy="remove it, or do not use this folder if it is not yours",
                    )
    return sorted(found)


def _kind_of(entry: os.DirEntry[str]) -> str:
    mode = entry.stat(follow_symlinks=False).st_mode
    kinds = {stat.S_IFLNK: "a link", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def is_regular(path: Path) -> bool:
    """Whether a file itself lies at `path`, and no link to one."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return False
        raise


# --- this machine's own ----------------------------------------------------------------------------------------------


def state_folder() -> Path:
    """Where this user's pairclf keeps what no other folder may claim: `$XDG_STATE_HOME/pairclf`."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state", "pairclf")


def cache_folder() -> Path:
    """Where it keeps what it can make again: `$XDG_CACHE_HOME/pairclf`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "pairclf")


def private_folder(path: Path) -> Path:
    """Make the folder `path`, which only its owner can enter (0700), and return it.

    Raises:
        PairclfError: a link, a file or another user's folder is there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.mkdir(0o700)
    except FileExistsError:
        found = os.lstat(path)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            raise PairclfError(
                f"{path} is not a folder of this user", remedy="remove it, or set XDG_STATE_HOME and XDG_CACHE_HOME"
            ) from None
        path.chmod(0o700)
    return path
