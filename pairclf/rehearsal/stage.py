"""Where a kernel is rehearsed: the folders that it sees, its environment, the stand-in for Kaggle's image."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from pairclf.packaging.profiles import profile_path
from pairclf.packaging.wheelhouse import Wheel
from pairclf.rehearsal.faults import HOOK
from pairclf.rehearsal.image import image_environment, make_image
from pairclf.rehearsal.mounts import Mount, fill, lay_out
from pairclf.rehearsal.sandbox import Sandbox, guards, namespaces, protect, release

HERE = "here"
_PREFIX = "pairclf-"
_HOME = "home"  # a link to the stage's home, so that the next rehearsal finds that of a killed one
_PASSED_ON = ("LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")


@dataclass(frozen=True, slots=True)
class Stage:
    """The folders of one rehearsal.

    Attributes:
        top: of most of them, below the results, so that files can be linked rather than copied.
        home: home and temporary files; elsewhere, as a socket's path must be short.
    """

    top: Path
    home: Path

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

    def scene(self, layout: str) -> Scene:
        """Empty folders for a run in a layout."""
        scene = Scene(self, layout)
        for left in self.kept.iterdir():  # by a run in another layout
            left.unlink()
        scene.input.mkdir(parents=True)
        scene.working.mkdir()
        return scene


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
        site = next(self.stage.image.glob("lib/python*/site-packages"))
        return namespaces(self.input, self.working, disk) or guards(site)

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
def staged(out: Path) -> Iterator[Stage]:
    """A stage in `out`, removed at the end; what a killed rehearsal left there goes first."""
    top = out.resolve() / ".tmp-rehearsal"
    _clear(top)
    with TemporaryDirectory(prefix=_PREFIX, ignore_cleanup_errors=True) as home:
        stage = Stage(top, Path(home))
        for folder in (stage.kept, stage.props):
            folder.mkdir(parents=True)
        (top / _HOME).symlink_to(home)
        try:
            yield stage
        finally:
            _clear(top)


def _clear(top: Path) -> None:
    if top.exists():
        if (home := (top / _HOME).resolve()).name.startswith(_PREFIX):
            shutil.rmtree(home, ignore_errors=True)  # a rehearsal that was not killed removes it itself
        for inputs in top.glob("*/input"):
            release(inputs)
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
    else:
        make_image(stage.image, hidden, image_environment(image, profile_path(image, images), cache()))
    if hook:
        site = next(stage.image.glob("lib/python*/site-packages"))
        (site / f"{HOOK}.py").write_text(hook, encoding="utf-8")
        (site / f"{HOOK}.pth").write_text(f"import {HOOK}\n", encoding="utf-8")


def cache() -> Path:
    """Where environments with the images' versions are kept: they take minutes to make and gigabytes to keep."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "pairclf", "images")
