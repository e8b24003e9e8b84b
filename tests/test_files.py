"""Whole or not at all: a failure at any moment leaves the old file or folder, and nothing half written."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from random import Random

import pytest

from pairclf.errors import PairclfError
from pairclf.files import (
    atomic_file,
    atomic_folder,
    check_name,
    check_path,
    copy_file,
    is_regular,
    locked,
    private_folder,
    refuse_special_files,
    sha256_tree,
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


def test_killed_between_the_two_renames_the_old_folder_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    (tmp_path / ".tmp-old-folder").mkdir()
    (tmp_path / ".tmp-old-folder" / "x").write_text("whole")
    with pytest.raises(RuntimeError), atomic_folder(path, known_by="x") as new:
        (new / "x").write_text("half")
        raise RuntimeError
    assert (path / "x").read_text() == "whole"


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path) -> None:
    (tmp_path / ".tmp-a.txt").write_text("half")
    (tmp_path / ".tmp-folder").mkdir()
    (tmp_path / ".tmp-folder" / "stale").write_text("half")
    write_text(tmp_path / "a.txt", "whole")
    with atomic_folder(tmp_path / "folder", known_by="x") as new:
        (new / "x").write_text("whole")
    assert sorted(sha256_tree(tmp_path)) == ["a.txt", "folder/x"]


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


def test_killed_at_any_moment_what_is_found_is_whole(tmp_path: Path) -> None:
    """kill -9 at random moments of a writer that does nothing but replace; each next one goes on from there."""
    random = Random(0)
    for _ in range(8):
        writer = subprocess.Popen([sys.executable, "-c", REWRITE, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(random.uniform(0, 0.05))
        writer.kill()
        writer.communicate()
        standing = [folder for name in ("folder", ".tmp-old-folder") if (folder := tmp_path / name).is_dir()]
        assert standing
        first, second = (standing[0] / "x").read_text(), (standing[0] / "y").read_text()
        alone = (tmp_path / "file").read_text()
        assert first == second == first[: len(first) // 1000] * 1000
        assert alone == alone[: len(alone) // 1000] * 1000


HOLDER = """
import sys
from pathlib import Path
from pairclf.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_is_waited_for_and_falls_with_its_holder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "below" / ".lock"
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        killer = threading.Timer(0.3, holder.kill)
        killer.start()
        with locked(path):
            assert holder.wait() == -signal.SIGKILL
    assert "waiting for another process" in " ".join(capsys.readouterr().err.split())
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
