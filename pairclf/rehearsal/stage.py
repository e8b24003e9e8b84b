"""Where a kernel is rehearsed: the folders that it sees, its environment, the stand-in for Kaggle's image."""

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
from pairclf.packaging.profiles import profile_path
from pairclf.packaging.wheelhouse import Wheel
from pairclf.rehearsal import confine, runner
from pairclf.rehearsal.faults import HOOK
from pairclf.rehearsal.image import image_environment, make_image, needed_by
from pairclf.rehearsal.mounts import Mount, fill, lay_out
from pairclf.rehearsal.sandbox import Sandbox, guards, namespaces, protect, release

HERE = "here"
_PREFIX = "pairclf-"
_HELD = "held.lock"  # by a rehearsal that lives
_HOME = "home.txt"  # path of the stage's home, so that the next rehearsal finds that of a killed one
_PASSED_ON = ("LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")


@dataclass(frozen=True, slots=True)
class Stage:
    """The folders of one rehearsal.

    Attributes:
        top: of most of them, in this user's cache: a package, which another person may have made, holds none of them.
        home: home and temporary files; elsewhere, as a socket's path must be short.
        shown: what lies elsewhere and the kernel must read, such as the interpreter.
    """

    top: Path
    home: Path
    shown: list[Path] = field(default_factory=list)

    @property
    def image(self) -> Path:
        """The environment."""
        return self.top / "image"

    @property
    def python(self) -> Path:
        return self.image / "bin" / "python"

    @property
    def kept(self) -> Path:
        """What the runner rescues from the working folder."""
        return self.top / "kept"

    @property
    def props(self) -> Path:
        """Files made for the input."""
        return self.top / "props"

    @property
    def job(self) -> Path:
        """What the runner is told to run: the kernel reads it, and can't change it where namespaces are allowed."""
        return self.top / "job"

    @property
    def canary(self) -> Path:
        """A file that the kernel must not find where other files are hidden."""
        return self.top / _HELD

    def scene(self, layout: str) -> Scene:
        """Empty folders for a run in a layout."""
        scene = Scene(self, layout)
        shutil.rmtree(self.kept)  # it may hold what a run in another layout left
        self.kept.mkdir()
        scene.input.mkdir(parents=True)
        scene.working.mkdir()
        return scene

    def discard_others(self) -> list[str]:
        """Remove from what was kept all that is no file, a link to one for instance, and return the names.

        A kernel can put a link there, and whoever follows it reads a file that the kernel could not.
        """
        with os.scandir(self.kept) as entries:
            others = [entry for entry in entries if not entry.is_file(follow_symlinks=False)]
        for entry in others:
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)
        return sorted(entry.name for entry in others)


@dataclass(frozen=True, slots=True)
class Scene:
    """A run in one layout of the mounts."""

    stage: Stage
    layout: str

    @property
    def input(self) -> Path:
        return self.stage.top / self.layout / "input"

    @property
    def working(self) -> Path:
        return self.stage.top / self.layout / "working"

    def environment(self, *, rerun: bool, speed: float) -> dict[str, str]:
        """Everything that the kernel sees of this machine's environment."""
        kept = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        stage = self.stage
        return kept | {
            "PATH": f"{stage.image / 'bin'}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            "HOME": str(stage.home),
            "TMPDIR": str(stage.home),
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
        """The best that this machine allows."""
        stage = self.stage
        libraries = [Path(one) for one in os.environ.get("LD_LIBRARY_PATH", "").split(":") if one.startswith("/")]
        shown = [*stage.shown, *filter(Path.is_dir, libraries), self.input, stage.job, Path(runner.__file__)]
        root = stage.top / self.layout / "root"
        root.mkdir()
        view = confine.View(
            root=str(root),
            shown=sorted({str(path.absolute()) for path in shown}),
            changed=[str(stage.home), str(stage.kept), str(stage.image)],
            working=str(self.working),
            disk=disk,
        )
        site = next(stage.image.glob("lib/python*/site-packages"))
        return namespaces(view, root.parent, stage.python) or guards(site)

    def mount(self, mounts: Sequence[Mount], late: Sequence[Mount], sandbox: Sandbox) -> None:
        """Lay out all mounts, and fill those that are not late."""
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
def staged() -> Iterator[Stage]:
    """A stage of fresh folders, removed at the end; what killed rehearsals left goes first."""
    below = private_folder(private_folder(cache_folder()) / "rehearsals")
    with locked(below / ".lock"):
        for left in below.glob(f"{_PREFIX}*"):
            _clear_left(left)
        top = Path(mkdtemp(prefix=_PREFIX, dir=below)).resolve()
        held = FileLock(top / _HELD)
        held.acquire()
    try:
        home = Path(mkdtemp(prefix=_PREFIX)).resolve()
        (top / _HOME).write_text(str(home), encoding="utf-8")
        stage = Stage(top, home)
        for folder in (stage.kept, stage.props, stage.job):
            folder.mkdir()
        yield stage
    finally:
        _clear(top)
        held.release()


def _clear_left(top: Path) -> None:
    """Remove the folders of a rehearsal that was killed; one that lives holds its lock."""
    held = FileLock(top / _HELD)
    try:
        held.acquire(timeout=0)
    except Timeout:
        return
    _clear(top)
    held.release()


def _clear(top: Path) -> None:
    """Remove a stage's folders, all of them made by `staged`."""
    if is_regular(top / _HOME):
        home = Path((top / _HOME).read_text(encoding="utf-8"))
        if home.name.startswith(_PREFIX) and home.is_dir() and home.stat().st_uid == os.geteuid():
            shutil.rmtree(home, ignore_errors=True)  # refuses a link
    for scene in top.iterdir():
        if not scene.is_symlink() and (scene / "input").exists():
            release(scene / "input")
    shutil.rmtree(top)


def furnish(stage: Stage, image: str, images: Path | None, wheels: Sequence[Path], hook: str) -> None:
    """Make the stand-in for the image, less what the wheels bring.

    Args:
        stage: whose.
        image: `here`: with the versions of this environment; `3.12`: that Python with the image's own versions.
        images: folder of the images' profiles; None: pairclf's own.
        wheels: folders of the package's wheels.
        hook: text of a module that every Python process there imports as it starts; empty: none.

    Raises:
        PackagingError: what the wheels bring can't be hidden, or there is no such image.
    """
    hidden = {Wheel.parse(path.name).project for folder in wheels for path in folder.rglob("*.whl")}
    if image == HERE:
        make_image(stage.image, hidden)
        stage.shown.extend(needed_by(Path(sys.executable)))
    else:
        environment = image_environment(image, profile_path(image, images), cache_folder() / "images")
        make_image(stage.image, hidden, environment)
        stage.shown.extend(needed_by(environment))
    if hook:
        site = next(stage.image.glob("lib/python*/site-packages"))
        (site / f"{HOOK}.py").write_text(hook, encoding="utf-8")
        (site / f"{HOOK}.pth").write_text(f"import {HOOK}\n", encoding="utf-8")
