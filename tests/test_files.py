"""Whole or not at all: a failure at any moment leaves the old file or folder, and nothing half written."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from threading import Barrier, Thread

import pytest

from pairclf import files
from pairclf.errors import ConfigError, PairclfError
from pairclf.files import (
    atomic_file,
    atomic_folder,
    cache_folder,
    check_name,
    check_path,
    copy_file,
    is_regular,
    locked,
    open_to_append,
    parsed,
    private_folder,
    refuse_special_files,
    sha256_tree,
    state_folder,
    write_json,
    write_private,
    write_text,
)


def _full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(OSError, match="No space"), atomic_file(path) as temporary:
        temporary.write_text("half")
        _full_disk()
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_disk_that_fills_while_closing_leaves_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "folder"
    with atomic_folder(path, known_by="x") as new:
        (new / "x").write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(os, failing, _full_disk)
        with pytest.raises(OSError, match="No space"), atomic_folder(path, known_by="x") as new:
            (new / "x").write_text("new")
    assert (path / "x").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def _abandon(path: Path, name: str, text: str) -> Path:
    """What a writer of `path` leaves that was killed when its folder held the file `name`."""
    with pytest.raises(Stopped), pytest.MonkeyPatch.context() as patch, atomic_file(path) as temporary:
        (temporary.parent / name).parent.mkdir(exist_ok=True)
        (temporary.parent / name).write_text(text)
        patch.setattr(files, "_discard", lambda folder: None)
        raise Stopped
    return temporary.parent


class Stopped(BaseException):
    """Stands for the process's end."""


def test_killed_between_the_two_renames_the_old_folder_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    _abandon(path, ".old-0/x", "whole")
    with pytest.raises(RuntimeError), atomic_folder(path, known_by="x") as new:
        (new / "x").write_text("half")
        raise RuntimeError
    assert (path / "x").read_text() == "whole"
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path) -> None:
    _abandon(tmp_path / "a.txt", "a.txt", "half")
    _abandon(tmp_path / "folder", "folder/stale", "half")
    write_text(tmp_path / "a.txt", "whole")
    with atomic_folder(tmp_path / "folder", known_by="x") as new:
        (new / "x").write_text("whole")
    assert sorted(sha256_tree(tmp_path)) == ["a.txt", "folder/x"]


def test_an_old_folder_that_can_not_be_put_back_is_not_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, plain = tmp_path / "folder", os.replace
    with atomic_folder(path, known_by="x") as new:
        (new / "x").write_text("old")

    def fails(source: Path, target: Path) -> None:
        if target == path:
            raise OSError(errno.EIO, "Input/output error")
        plain(source, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output"):
        patch.setattr(os, "replace", fails)
        with atomic_folder(path, known_by="x") as new:
            (new / "x").write_text("new")
    with pytest.raises(RuntimeError), atomic_folder(path, known_by="x"):
        raise RuntimeError
    assert (path / "x").read_text() == "old"


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    """The second begins and ends while the first still writes, and then the other way round."""
    path = tmp_path / "a.txt"
    with atomic_file(path) as first:
        first.write_text("first, ")
        with atomic_file(path) as second:
            assert first != second
            second.write_text("second")
            with first.open("a") as stream:
                stream.write("whole")
        assert path.read_text() == "second"
    assert path.read_text() == "first, whole"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_two_writers_of_one_folder_leave_the_last_ones(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    with atomic_folder(path, known_by="x") as first:
        (first / "x").write_text("first")
        with atomic_folder(path, known_by="x") as second:
            (second / "x").write_text("second")
        assert (path / "x").read_text() == "second"
        assert (first / "x").read_text() == "first"
    assert (path / "x").read_text() == "first"
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_writers_at_once_leave_one_whole_file_and_folder(tmp_path: Path) -> None:
    """Four threads replace the same file and folder; readers find one of them, whole, and nothing is left over."""
    failures: list[BaseException] = []
    start = Barrier(4)

    def write(number: int) -> None:
        try:
            start.wait()
            for turn in range(12):
                write_text(tmp_path / "file", f"{number}-{turn}\n" * 2000)
                with atomic_folder(tmp_path / "folder", known_by="x") as new:
                    (new / "x").write_text(f"{number}-{turn}")
                    (new / "y").write_text(f"{number}-{turn}")
        except BaseException as error:  # noqa: BLE001 - a thread's error is the test's
            failures.append(error)

    threads = [Thread(target=write, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if (tmp_path / "file").exists():
            assert len(set((tmp_path / "file").read_text().splitlines())) == 1
    for thread in threads:
        thread.join()
    assert failures == []
    assert (tmp_path / "folder" / "x").read_text() == (tmp_path / "folder" / "y").read_text()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize("kind", ["link", "folder link", "file"])
def test_what_a_stranger_planted_is_neither_followed_nor_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Under the old fixed name, and under the very name that is drawn, which is then drawn again."""
    shared, victim = tmp_path / "shared", tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").write_text("precious")
    shared.mkdir()
    planted = [shared / ".tmp-a.txt", shared / ".tmp-a.txt-00000000"]
    for entry in planted:
        if kind == "file":
            entry.write_text("theirs")
        else:
            entry.symlink_to(victim / "precious" if kind == "link" else victim)
    drawn = iter(["00000000", "11111111"])
    monkeypatch.setattr(files.secrets, "token_hex", lambda size: next(drawn))
    write_text(shared / "a.txt", "mine")
    assert (shared / "a.txt").read_text() == "mine"
    assert not (shared / "a.txt").is_symlink()
    assert (victim / "precious").read_text() == "precious"
    assert list(victim.iterdir()) == [victim / "precious"]
    assert all(entry.is_symlink() or entry.read_text() == "theirs" for entry in planted)


def test_another_users_abandoned_folder_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be put in the place of a folder that is not there yet."""
    left = _abandon(tmp_path / "folder", ".old-0/x", "theirs")
    monkeypatch.setattr(os, "geteuid", lambda: left.stat().st_uid + 1)
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "folder", known_by="x"):
        raise RuntimeError
    assert not (tmp_path / "folder").exists()
    assert (left / ".old-0" / "x").read_text() == "theirs"


def test_the_file_has_the_rights_that_the_umask_gives(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "")
    (tmp_path / "b.txt").write_text("")
    assert (tmp_path / "a.txt").stat().st_mode == (tmp_path / "b.txt").stat().st_mode


def test_json_refuses_what_json_has_not(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_nobody_elses_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(PairclfError, match="something else"), atomic_folder(tmp_path, known_by="x"):
        raise AssertionError("nothing is to be written")
    assert (tmp_path / "thesis.txt").read_text() == "precious"
    (tmp_path / "empty").mkdir()
    with atomic_folder(tmp_path / "empty", known_by="x") as new:
        (new / "x").write_text("first")
    with atomic_folder(tmp_path / "empty", known_by="x") as new:
        (new / "x").write_text("second")
    assert (tmp_path / "empty" / "x").read_text() == "second"


def test_a_file_replaces_nothing_but_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("old")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "file" / "below"):
        with pytest.raises(PairclfError):
            write_text(path, "new")
    assert (tmp_path / "pipe").is_fifo()
    assert (tmp_path / "file").read_text() == "old"


REWRITE = """
import sys
from threading import Barrier, Thread
from itertools import count
from pathlib import Path
from pairclf.files import atomic_folder, write_text
top = Path(sys.argv[1])
for version in count():
    with atomic_folder(top / "folder", known_by="x") as new:
        (new / "x").write_text(str(version) * 1000)
        (new / "y").write_text(str(version) * 1000)
    write_text(top / "file", str(version) * 1000)
    print(version, flush=True)
"""


def test_killed_at_any_moment_what_is_found_is_whole(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """kill -9 at random moments of a writer that does nothing but replace; each next one goes on from there."""
    random = Random(0)
    for _ in range(2 * pytestconfig.getoption("--kills")):
        writer = subprocess.Popen([sys.executable, "-c", REWRITE, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(random.uniform(0, 0.05))
        writer.kill()
        writer.communicate()
        standing = [folder for name in ("folder", ".tmp-folder-*/.old-*") for folder in tmp_path.glob(name)]
        assert standing
        first, second = (standing[0] / "x").read_text(), (standing[0] / "y").read_text()
        alone = (tmp_path / "file").read_text()
        assert first == second == first[: len(first) // 1000] * 1000
        assert alone == alone[: len(alone) // 1000] * 1000


HOLDER = """
import sys
from threading import Barrier, Thread
from pathlib import Path
from pairclf.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_is_waited_for_and_falls_with_its_holder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "below" / ".lock"
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        said: list[str] = []
        with monkeypatch.context() as patch:
            patch.setattr(files.console, "print", lambda line: (said.append(line), holder.kill()))
            with locked(path):
                assert holder.wait() == -signal.SIGKILL
    assert "waiting for another process" in said[0]
    with locked(path):  # and again, at once
        assert capsys.readouterr().err == ""


# --- what another person wrote ---------------------------------------------------------------------------------------

NO_NAMES = ["", ".", "..", "a/b", "/a", "../a", "a\\b", "a\x00b", "a\nb", "a\x1b[2J", "n" * 256, "\u00e9" * 128]
NO_PATHS = ["", "/a", "../a", "a/../b", "a/..", "a//b", "a/", "./a", "a/\x00"]


@pytest.mark.parametrize("name", NO_NAMES)
def test_what_is_no_name_is_refused_and_shown_short(name: str) -> None:
    with pytest.raises(PairclfError, match="a part has the name") as caught:
        check_name(name, "a part")
    assert len(str(caught.value)) < 700
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("path", NO_PATHS)
def test_path_that_leads_out_is_refused(path: str) -> None:
    with pytest.raises(PairclfError, match="leads out of its folder or is none"):
        check_path(path, "a file")


@pytest.mark.parametrize(
    "name", ["a", "...", ".hidden", "model-00001-of-00002.safetensors", "torch-2.11.0+cu128-py3.whl"]
)
def test_names_stay_as_they_are(name: str) -> None:
    assert check_name(name, "a part") == name
    assert check_path(f"a/{name}", "a file") == f"a/{name}"


def test_only_files_and_folders_pass(tmp_path: Path) -> None:
    folder, other = tmp_path / "folder", tmp_path / "other"
    (folder / "deep" / "empty").mkdir(parents=True)
    other.mkdir()
    (other / "secret").write_text("secret")
    for name in ("b.txt", "deep/a.txt"):
        (folder / name).touch()
    assert refuse_special_files(folder) == ["b.txt", "deep/a.txt"]
    (tmp_path / "given").symlink_to(folder)
    assert refuse_special_files(tmp_path / "given") == ["b.txt", "deep/a.txt"], "what the user gave may be a link"
    odd = folder / "deep" / "odd"
    for target in (other, other / "secret", other / "missing", folder):
        odd.symlink_to(target)
        with pytest.raises(PairclfError, match="'deep/odd' is a link"):
            refuse_special_files(folder)
        odd.unlink()
    os.mkfifo(odd)
    with pytest.raises(PairclfError, match="'deep/odd' is a pipe"):
        refuse_special_files(folder)


def test_regular_is_neither_link_nor_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    names = ("file", "link", ".", "missing", "file/below")
    assert [is_regular(tmp_path / name) for name in names] == [True, False, False, False, False]


def test_private_files_and_folders_are_their_owners(tmp_path: Path) -> None:
    write_private(tmp_path / "own" / "a.json", "{}")
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("own", "own/a.json")] == [0o700, 0o600]
    (tmp_path / "own").chmod(0o755)
    private_folder(tmp_path / "own")
    assert (tmp_path / "own").stat().st_mode & 0o777 == 0o700
    (tmp_path / "link").symlink_to("own")
    for name in ("link", "own/a.json"):
        with pytest.raises(PairclfError, match="is not a folder of this user"):
            private_folder(tmp_path / name)


def test_copy_has_the_bytes_and_no_bond(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(bytes(range(256)) * 9000)
    copy_file(source, target)
    assert target.read_bytes() == source.read_bytes()
    target.write_bytes(b"changed")
    assert source.stat().st_size == 256 * 9000
    with pytest.raises(FileExistsError):
        copy_file(source, target)


@pytest.mark.parametrize("kind", ["a link", "a link to nothing", "a pipe", "a folder"])
def test_what_grows_line_by_line_is_a_file_itself(tmp_path: Path, kind: str) -> None:
    """A planted link would have another file cut or written to, and a pipe would be waited for."""
    path, other = tmp_path / "log", tmp_path / "other"
    if kind == "a link":
        other.write_text("mine")
    make = {"a pipe": os.mkfifo, "a folder": os.mkdir}
    make.get(kind, lambda made: os.symlink(other, made))(path)
    with pytest.raises(PairclfError, match="is not written to"):
        open_to_append(path)
    assert other.exists() == (kind == "a link")
    assert kind != "a link" or other.read_text() == "mine"


def test_a_file_that_grows_is_made_and_kept(tmp_path: Path) -> None:
    for line in (b"1\n", b"2\n"):
        with open_to_append(tmp_path / "log") as stream:
            stream.write(line)
    assert (tmp_path / "log").read_bytes() == b"1\n2\n"


@pytest.mark.parametrize("variable", ["XDG_STATE_HOME", "XDG_CACHE_HOME"])
@pytest.mark.parametrize("home", [None, "here"])
def test_own_folders_never_lie_in_the_working_folder(
    variable: str, home: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative path would, and a stranger's package could then hold rehearsals that it passed."""
    folder = state_folder if variable == "XDG_STATE_HOME" else cache_folder
    monkeypatch.chdir(tmp_path)
    if home is None:  # and no such user in the system's list, as in some containers

        def unknown(*_: object) -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", unknown)
    else:
        monkeypatch.setenv("HOME", home)
    monkeypatch.setenv(variable, "state")
    with pytest.raises(ConfigError, match=f"no home folder, and {variable} names none"):
        folder()
    monkeypatch.setenv(variable, str(tmp_path))
    assert folder() == tmp_path / "pairclf"


def test_private_folder_that_can_not_be_made_says_what_to_set(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PairclfError, match=r"can't be made: [A-Za-z ]+\n  remedy: set XDG_STATE_HOME"):
        private_folder(tmp_path / "file" / "own")


def test_json_that_lies_too_deep_is_none() -> None:
    assert parsed('{"a": [1]}') == {"a": [1]}
    for text in ("[" * 200_000, '{"a":' * 200_000, "", "{"):
        with pytest.raises(ValueError, match=r"lie too deep|Expecting"):
            parsed(text)
