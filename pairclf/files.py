"""File access: atomic files and folders, locks, content hashes, safe names, and the writing of YAML and JSON.

Writes are atomic: a file or folder is written beside its destination, synced, and renamed over it, so a reader never
sees a part of it.

Each writer works in its own folder, `.tmp-NAME-xxxxxxxx`, with a random ending and mode 0700: two writers of one path
do not collide, and in a shared folder no other user can plant a file or a link there. The folder is locked while its
writer lives. A killed writer leaves its folder behind; the next writer of the same path removes it.

Names and folders from other people are checked before use: `check_name`, `check_path`, `refuse_special_files`. Notes
that no package may forge are kept in `state_folder`.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from pairclf.console import console
from pairclf.errors import ConfigError, PairclfError

_CHUNK = 1 << 20  # bytes
_LOCK, _OLD = ".lock", ".old-"  # entries of a writer's folder, beside what it writes
_TRIES = 1000  # of a folder to take its place, while other writers take it too
_CLONE = 0x40049409  # FICLONE of ioctl_ficlone(2): the copy shares its blocks until one of the two is changed
MAX_JSON = 64 << 20
"""Bytes of a file in JSON that a run, a package or a kernel left."""
_LONGEST_NAME = 255  # bytes of a name, of every usual file system


@contextmanager
def _workplace(path: Path) -> Iterator[Path]:
    """A new folder beside `path` that this writer alone writes into; removed at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear_abandoned(path)
    folder, lock = _new_workplace(path)
    try:
        yield folder
    finally:
        try:
            if path.exists() or not any(folder.glob(f"{_OLD}*")):  # else an older folder could not be put back
                _discard(folder)
        finally:
            os.close(lock)


def _discard(folder: Path) -> None:
    """Remove a writer's folder, its lock last: one that is half removed is still known as abandoned."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != _LOCK:
            entry.unlink()
    shutil.rmtree(folder)


def _new_workplace(path: Path) -> tuple[Path, int]:
    """The folder, and the descriptor that holds its lock."""
    while True:
        folder = path.parent / f".tmp-{path.name}-{secrets.token_hex(4)}"
        try:
            folder.mkdir(mode=0o700)  # never follows a link, and refuses a name that is taken
        except FileExistsError:
            continue
        lock = os.open(folder / _LOCK, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW, 0o600)
        with suppress(OSError):  # a file system without locks: no other writer can lock it either, and removes nothing
            fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / _LOCK).exists():
            return folder, lock
        os.close(lock)  # another writer saw the folder before it was locked, and removed it


def _clear_abandoned(path: Path) -> None:
    """Remove the folders of killed writers of `path`; an older folder that one had moved aside comes back first."""
    ours = re.compile(rf"\.tmp-{re.escape(path.name)}-[0-9a-f]{{8}}")
    for folder in [entry for entry in path.parent.iterdir() if ours.fullmatch(entry.name)]:
        with suppress(OSError), _abandoned(folder) as is_abandoned:  # gone, another user's, or without its lock file
            if not is_abandoned:
                continue
            for old in folder.glob(f"{_OLD}*"):
                if not path.exists():  # killed between two renames: the old one is the whole one
                    os.replace(old, path)
            _discard(folder)


@contextmanager
def _abandoned(folder: Path) -> Iterator[bool]:
    """Whether the folder is ours, and no living process holds its lock; held until the block ends."""
    status = folder.lstat()
    if not folder.is_dir() or folder.is_symlink() or status.st_uid != os.geteuid():
        yield False
        return
    lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(lock)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_file_target(path: Path, *suffixes: str) -> None:
    """Refuse a path at which a file can't be written, or must not be: a folder, a device, below a file.

    Args:
        path: of the file.
        suffixes: the name must end in one of them, as the file's readers go by it; none: any name will do.

    Raises:
        PairclfError: says which.
    """
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "no regular file"
        raise PairclfError(f"{path} is {kind} and will not be replaced by a file", remedy="give another path")
    if suffixes and path.suffix.lower() not in suffixes:
        raise PairclfError(f"{path} must end in {' or '.join(suffixes)}", remedy="give another name")
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
    with _workplace(path) as folder:
        temporary = folder / _content_name(path)
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    _sync(path.parent)


def _content_name(path: Path) -> str:
    """The name in the writer's folder: the same one, because some libraries use its ending."""
    return path.name if path.name != _LOCK else f"{_LOCK}-file"


@contextmanager
def atomic_folder(path: Path, *, known_by: str) -> Iterator[Path]:
    """Yield an empty folder to fill; on success it replaces `path`, on any error it is removed.

    Args:
        path: an older folder there is replaced if it is empty or holds an entry named `known_by`.
        known_by: a file or folder that every folder of this kind holds, so that nobody's other files are deleted.

    Raises:
        PairclfError: something else stands at `path`.
        OSError: as the writing raised it; `path` is then untouched.

    An older folder at `path` is moved into the writer's own folder first and removed last, so that at every moment one
    whole folder exists under either name. After a kill in between, the next writer moves it back.
    """
    if not _may_be_replaced(path, known_by):
        raise PairclfError(
            f"{path} holds something else than is to be written there (no {known_by}), and will not be replaced",
            remedy="give a new folder, or remove what is there yourself",
        )
    with _workplace(path) as folder:
        temporary = folder / _content_name(path)
        temporary.mkdir()
        yield temporary
        for entry in sorted(temporary.rglob("*")):
            if entry.is_file():
                _sync(entry)
        _take_place(temporary, path, folder)
    _sync(path.parent)


def _may_be_replaced(path: Path, known_by: str) -> bool:
    """Whether nothing is at `path`, or an empty folder, or one that holds `known_by`.

    Another writer may move it aside while it is looked at; then what has come into its place is looked at.
    """
    while path.exists():
        with suppress(FileNotFoundError):
            seen = path.stat()
            if not stat.S_ISDIR(seen.st_mode):
                return False
            if (path / known_by).exists() or not any(path.iterdir()):
                return True
            if os.path.samestat(path.stat(), seen):
                return False
    return True


def _take_place(new: Path, path: Path, aside: Path) -> None:
    """Rename folder `new` to `path`. An older folder there is moved into `aside`, and moved back if that fails.

    Another writer of the same path may put its own there in between; then that one is moved aside, too.
    """
    for turn in range(_TRIES):
        old = aside / f"{_OLD}{turn}"
        with suppress(FileNotFoundError):  # there is none, or another writer has just moved it
            os.replace(path, old)
        try:
            os.replace(new, path)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                continue
            if old.exists() and not path.exists():
                os.replace(old, path)
            raise
        return
    raise PairclfError(f"{path} is replaced by other processes all the time", remedy="end them, or give another path")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`; print a line and wait if another process holds it. A kill releases the lock."""
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
    """Make a hard link, or a copy if a link is impossible; never a symbolic link, which would reveal a path."""
    try:
        os.link(source, target)
    except OSError:  # another file system, or another owner
        copy_file(source, target)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's bytes to the new file `target`; it shares blocks if the file system can."""
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


def open_to_append(path: Path) -> BinaryIO:
    """Open a file at its end to append lines, and create it if it is missing; a link is refused.

    Raises:
        PairclfError: a link, a pipe, a device or a folder is there.
        OSError: as the opening raised it.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o666)  # a pipe that nobody reads would otherwise be waited for
    except OSError:
        if os.path.lexists(path) and not is_regular(path):
            raise _no_file(path) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _no_file(path)
    return os.fdopen(descriptor, "ab")


def _no_file(path: Path) -> PairclfError:
    return PairclfError(f"{path} is a link or no regular file, and is not written to", remedy="remove it")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with a closing newline, atomically. NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_plain(path: Path, most: int) -> str:
    """The text of a regular UTF-8 file, also through a link, of at most `most` bytes.

    A FIFO or a device is not opened, because reading it may never end.

    Raises:
        OSError: it can't be read, is not a regular file, or is larger.
        UnicodeDecodeError: it is not UTF-8.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    with path.open("rb") as stream:
        content = stream.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"more than {most:,} bytes", str(path))
    return content.decode("utf-8")


def parsed(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is not JSON, or is nested deeper than Python can follow.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("its lists and objects lie too deep in each other") from error


def sha256_file(path: Path, between: Callable[[], object] = lambda: None) -> str:
    """Hex SHA-256 of a file's bytes, read in chunks of 1 MiB; `between` is called before each, and may raise."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            between()
            digest.update(chunk)
    return digest.hexdigest()


def sha256_tree(
    folder: Path, *, without: frozenset[str] = frozenset(), between: Callable[[], object] = lambda: None
) -> dict[str, str]:
    """`{relative posix path: hex SHA-256}` of every file under `folder`, sorted, less the paths in `without`."""
    files = (entry for entry in sorted(folder.rglob("*")) if entry.is_file())
    names = ((entry, entry.relative_to(folder).as_posix()) for entry in files)
    return {name: sha256_file(entry, between) for entry, name in names if name not in without}


ZIP_EPOCH = 1_580_601_600
"""2020-02-02 in seconds since 1970: the date in archives, so that the same files give the same bytes."""


def zip_member(name: str) -> zipfile.ZipInfo:
    """An archive's member with a fixed date and fixed permissions."""
    member = zipfile.ZipInfo(name, date_time=(2020, 2, 2, 0, 0, 0))
    member.external_attr = 0o644 << 16
    return member


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
                f"{what} has the path {_shown(path)}, which leads out of its folder or is none", remedy=error.remedy
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
    files: list[str] = []
    waiting = [""]
    while waiting:
        below = waiting.pop()
        with os.scandir(folder / below) as entries:
            for entry in entries:
                name = f"{below}{entry.name}"
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(f"{name}/")
                elif entry.is_file(follow_symlinks=False):
                    files.append(name)
                else:
                    raise PairclfError(
                        f"{_shown(name)} is {_kind_of(entry)}, and only files and folders may lie there",
                        where=folder,
                        remedy="remove it, or do not use this folder if it is not yours",
                    )
    return sorted(files)


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


def home_folder() -> Path | None:
    """This user's, by HOME or by the system's list of users; None where neither names one, as in some containers."""
    try:
        found = Path.home()
    except RuntimeError:
        return None
    return found if found.is_absolute() else None


def state_folder() -> Path:
    """Where this user's pairclf keeps what no other folder may claim: `$XDG_STATE_HOME/pairclf`.

    Raises:
        ConfigError: this user has no home folder, and the variable names no folder.
    """
    return _own_folder("XDG_STATE_HOME", ".local/state")


def cache_folder() -> Path:
    """Where it keeps what it can make again: `$XDG_CACHE_HOME/pairclf`. Raises as `state_folder`."""
    return _own_folder("XDG_CACHE_HOME", ".cache")


def _own_folder(variable: str, below_home: str) -> Path:
    """As the variables' standard has it, a relative path does not count: the working folder may be a stranger's."""
    named, home = os.environ.get(variable, ""), home_folder()
    if os.path.isabs(named):
        return Path(named, "pairclf")
    if home is None:
        raise ConfigError(
            f"this user has no home folder, and {variable} names none to use instead",
            remedy=f"set HOME or {variable} to the full path of a folder that can be written to",
        )
    return home / below_home / "pairclf"


def private_folder(path: Path) -> Path:
    """Make the folder `path`, which only its owner can enter (0700), and return it.

    Raises:
        PairclfError: a link, a file or another user's folder is there, or it can't be made or written to.
    """
    remedy = "set XDG_STATE_HOME and XDG_CACHE_HOME to folders of yours that can be written to"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            path.mkdir(0o700)
        found = os.lstat(path)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            raise PairclfError(f"{path} is not a folder of this user", remedy=f"remove it, or {remedy}")
        if stat.S_IMODE(found.st_mode) != 0o700:
            path.chmod(0o700)
    except OSError as error:
        raise PairclfError(f"{path} can't be made: {error.strerror or error}", remedy=remedy) from error
    if not os.access(path, os.W_OK):
        raise PairclfError(f"{path} can't be written to", remedy=remedy)
    return path
