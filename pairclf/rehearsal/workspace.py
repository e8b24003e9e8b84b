"""The workspace of a rehearsal: folders, environment variables, and the stand-in for Kaggle's image."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp

from filelock import FileLock, Timeout

from pairclf.files import cache_folder, is_regular, locked, private_folder
from pairclf.packaging.image_profiles import profile_path
from pairclf.packaging.wheelhouse import Wheel
from pairclf.rehearsal import cell_runner, isolated_root
from pairclf.rehearsal.faults import HOOK
from pairclf.rehearsal.image import image_environment, make_image, needed_by
from pairclf.rehearsal.mounts import Mount, fill, lay_out
from pairclf.rehearsal.sandbox import Sandbox, guards, namespaces, protect, release

THIS_ENVIRONMENT = "here"
_PREFIX = "pairclf-"
_HELD = "held.lock"  # locked by a running rehearsal
_HOME = "home.txt"  # path of the home folder, so that the next rehearsal can remove that of a killed one
_PASSED_ON = ("LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


@dataclass(frozen=True, slots=True)
class Workspace:
    """The folders of one rehearsal.

    Attributes:
        top: most of the folders, in this user's cache. None lies in the package, which may be somebody else's.
        home: home and temporary files; outside of `top`, as a socket's path must be short.
        image: the environment that stands in for Kaggle's image.
        results_folder: results that the runner copies from the working folder.
        generated: files generated for the input.
        job: the runner's plan: the kernel can read it, and with namespaces not change it.
        canary: a file that the kernel must not see, if the sandbox hides files.
        readable: other folders that the kernel must read, such as the interpreter's.
    """

    top: Path
    home: Path
    image: Path
    results_folder: Path
    generated: Path
    job: Path
    canary: Path
    readable: list[Path] = field(default_factory=list)

    def layout_dirs(self, layout: str) -> LayoutDirs:
        """Create empty folders for a run in a layout."""
        folder = self.top / layout
        dirs = LayoutDirs(self, layout, folder / "input", folder / "working")
        shutil.rmtree(self.results_folder)  # a run in another layout may have left results
        self.results_folder.mkdir()
        dirs.input.mkdir(parents=True)
        dirs.working.mkdir()
        return dirs

    def discard_others(self) -> list[str]:
        """Remove everything but regular files from the results, and return the names.

        A kernel could leave a link there; following it would read a file that the kernel itself can't read.
        """
        with os.scandir(self.results_folder) as entries:
            others = [entry for entry in entries if not entry.is_file(follow_symlinks=False)]
        for entry in others:
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)
        return sorted(entry.name for entry in others)


@dataclass(frozen=True, slots=True)
class LayoutDirs:
    """Input and working folder for one layout of the mounts."""

    workspace: Workspace
    layout: str
    input: Path
    working: Path

    def environment(self, *, rerun: bool, speed: float) -> dict[str, str]:
        """All environment variables of the kernel."""
        passed_on = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        workspace = self.workspace
        return passed_on | {
            "PATH": f"{workspace.image / 'bin'}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            "HOME": str(workspace.home),
            "TMPDIR": str(workspace.home),
            "LANG": "C.UTF-8",
            "COLUMNS": "120",
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "KAGGLE_KERNEL_RUN_TYPE": "Batch",
            **({"KAGGLE_IS_COMPETITION_RERUN": "1"} if rerun else {}),
            "PAIRCLF_KAGGLE_INPUT": str(self.input),
            "PAIRCLF_CLOCK_SPEED": f"{speed:g}",
        }

    def sandbox(self, disk: int) -> Sandbox:
        """The strongest sandbox that this machine supports."""
        stage = self.workspace
        libraries = [Path(entry) for entry in os.environ.get("LD_LIBRARY_PATH", "").split(":") if entry.startswith("/")]
        readable = [*stage.readable, *filter(Path.is_dir, libraries), self.input, stage.job, Path(cell_runner.__file__)]
        root = stage.top / self.layout / "root"
        root.mkdir()
        view = isolated_root.View(
            root=str(root),
            readable=sorted({str(path.absolute()) for path in readable}),
            writable=[str(stage.home), str(stage.results_folder), str(stage.image)],
            working=str(self.working),
            disk=disk,
        )
        site = next(stage.image.glob("lib/python*/site-packages"))
        return namespaces(view, root.parent, stage.image / "bin" / "python") or guards(site)

    def mount(self, mounts: Sequence[Mount], late: Sequence[Mount], sandbox: Sandbox) -> None:
        """Create all mounts, and fill those that are not late."""
        lay_out(self.input, mounts, self.layout)
        self.fill([mount for mount in mounts if mount not in late], sandbox)

    def fill(self, mounts: Sequence[Mount], sandbox: Sandbox) -> None:
        if sandbox.guarded:
            release(self.input)
        for mount in mounts:
            fill(self.input, mount, self.layout, copies=sandbox.guarded)
        if sandbox.guarded:
            protect(self.input)


@contextmanager
def workspace() -> Iterator[Workspace]:
    """Make a workspace and remove it at the end; first, workspaces of killed rehearsals are removed."""
    parent = private_folder(private_folder(cache_folder()) / "rehearsals")
    with locked(parent / ".lock"):
        for leftover in parent.glob(f"{_PREFIX}*"):
            _clear_left(leftover)
        top = Path(mkdtemp(prefix=_PREFIX, dir=parent)).resolve()
        lock = FileLock(top / _HELD)
        lock.acquire()
    try:
        home = Path(mkdtemp(prefix=_PREFIX)).resolve()
        (top / _HOME).write_text(str(home), encoding="utf-8")
        results, generated, job = (top / name for name in ("kept", "generated", "job"))
        for folder in (results, generated, job):
            folder.mkdir()
        yield Workspace(top, home, top / "image", results, generated, job, top / _HELD)
    finally:
        _clear(top)
        lock.release()


def _clear_left(top: Path) -> None:
    """Remove the workspace of a killed rehearsal; that of a running one is locked."""
    lock = FileLock(top / _HELD)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return
    _clear(top)
    lock.release()


def _clear(top: Path) -> None:
    """Remove the folders that `workspace` made."""
    if is_regular(top / _HOME):
        home = Path((top / _HOME).read_text(encoding="utf-8"))
        if home.name.startswith(_PREFIX) and home.is_dir() and home.stat().st_uid == os.geteuid():
            shutil.rmtree(home, ignore_errors=True)  # refuses a link
    for folder in top.iterdir():
        if not folder.is_symlink() and (folder / "input").exists():
            release(folder / "input")
    shutil.rmtree(top)


def build_image(workspace: Workspace, image: str, images: Path | None, wheels: Sequence[Path], hook: str) -> None:
    """Build the stand-in for Kaggle's image, without the projects that the wheels install.

    Args:
        image: `here`: with the versions of this environment; `3.12`: that Python with the image's own versions.
        images: folder of the images' profiles; None: pairclf's own.
        wheels: folders of the package's wheels.
        hook: source of a module that every Python process imports at its start; empty: none.

    Raises:
        PackagingError: a project can't be hidden, or the image does not exist.
    """
    hidden = {Wheel.parse(path.name).project for folder in wheels for path in folder.rglob("*.whl")}
    if image == THIS_ENVIRONMENT:
        make_image(workspace.image, hidden)
        workspace.readable.extend(needed_by(Path(sys.executable)))
    else:
        environment = image_environment(image, profile_path(image, images), cache_folder() / "images")
        make_image(workspace.image, hidden, environment)
        workspace.readable.extend(needed_by(environment))
    if hook:
        site = next(workspace.image.glob("lib/python*/site-packages"))
        (site / f"{HOOK}.py").write_text(hook, encoding="utf-8")
        (site / f"{HOOK}.pth").write_text(f"import {HOOK}\n", encoding="utf-8")
