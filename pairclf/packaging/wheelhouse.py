"""The wheels that the notebook installs: pairclf's own, and packages that Kaggle's image lacks, for each Python."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path, PurePosixPath

from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import canonicalize_name, parse_wheel_filename

from pairclf import __version__
from pairclf.errors import PackagingError
from pairclf.files import ZIP_EPOCH
from pairclf.own_files import checkout
from pairclf.packaging.commands import run_command
from pairclf.packaging.image_profiles import profile_path, read_profile, record_digest, write_wheel
from pairclf.packaging.install_check import is_of_the_driver, resolve

PLATFORMS = [f"manylinux_2_{glibc}_x86_64" for glibc in range(34, 4, -1)] + ["manylinux2014_x86_64", "linux_x86_64"]
"""All platform tags of Kaggle's machines: pip does not expand a tag to older ones, and would take old versions."""


@dataclass(frozen=True, slots=True)
class Wheel:
    """A wheel's file name: `{project}-{version}(-{build})?-{python}-{abi}-{platform}.whl`."""

    project: str
    version: str
    tags: frozenset[Tag]

    @classmethod
    def parse(cls, name: str) -> Wheel:
        """Raises `packaging.utils.InvalidWheelFilename`."""
        project, version, _, tags = parse_wheel_filename(name)
        return cls(project, str(version), tags)

    @property
    def requirement(self) -> str:
        return f"{self.project}=={self.version}"

    def runs_on(self, python: str) -> bool:
        """Whether it installs on that Python on Kaggle's machines."""
        return not self.tags.isdisjoint(kaggle_tags(python))


@dataclass(frozen=True, slots=True)
class Wheelhouse:
    """A folder of wheels."""

    wheels: Sequence[Wheel]
    """Sorted by file name; compiled packages have a wheel for each Python."""
    requirements: dict[str, list[str]]
    """`{python: [project==version]}`: what the notebook installs, sorted by project."""
    notes: Sequence[str]
    """Notes on projects whose version differs from the image's, or from this environment's."""


def kaggle_tags(python: str) -> set[Tag]:
    """All tags that pip accepts on Kaggle's machines under that Python."""
    version, interpreter = tuple(map(int, python.split("."))), f"cp{python.replace('.', '')}"
    return {
        *cpython_tags(version, abis=[interpreter], platforms=PLATFORMS),
        *compatible_tags(version, interpreter, PLATFORMS),
    }


def fill_wheelhouse(folder: Path, pythons: Sequence[str], images: Path | None, extra: Sequence[str]) -> Wheelhouse:
    """Fill `folder` with pairclf's wheel and the requirements that an image lacks.

    Args:
        images: folder of profiles for these Python versions; None: pairclf's own.
        extra: further projects, carried in the version installed here even if an image has them.

    Raises:
        PackagingError: there is no profile, an extra project is not installed here, an image's torch will not do, a
            wheel can't be had for Linux on x86-64, or pip or uv failed.
    """
    extra = sorted({canonicalize_name(project) for project in extra})
    for project in extra:
        if is_of_the_driver(project):
            raise PackagingError(
                f"package.extra_packages names {project}, which must be the image's: its build fits the GPU driver",
                remedy="remove it",
            )
        _installed(project)
    folder.mkdir(parents=True, exist_ok=True)
    own = _own_wheel(folder)
    pins_by_python: dict[str, dict[str, str]] = {}
    notes: list[str] = []
    for python in pythons:
        resolution = resolve(own, extra, read_profile(python, profile_path(python, images)))
        pins = {name: str(version) for name, version in resolution.carried.items()}
        if pins:
            _download(folder, python, pins)
        pins_by_python[python] = dict(sorted({**pins, "pairclf": __version__}.items()))
        notes += resolution.notes
    wheels = [Wheel.parse(path.name) for path in sorted(folder.glob("*.whl"))]
    _check(wheels, pins_by_python, folder)
    requirements = {python: [f"{name}=={pins[name]}" for name in pins] for python, pins in pins_by_python.items()}
    return Wheelhouse(wheels, requirements, notes)


def _download(folder: Path, python: str, pins: Mapping[str, str]) -> None:
    target = ["--python-version", python, "--implementation", "cp", "--abi", f"cp{python.replace('.', '')}"]
    target += [f"--platform={platform}" for platform in PLATFORMS]
    requirements = [f"{name}=={version}" for name, version in pins.items()]
    _pip("download", "--no-deps", "--only-binary=:all:", *target, "--dest", str(folder), *requirements)


def _installed(project: str) -> Distribution:
    """A project in this environment.

    Raises:
        PackagingError: it is not installed.
    """
    try:
        return distribution(project)
    except PackageNotFoundError as error:
        raise PackagingError(
            f"package.extra_packages names {project}, which is not installed here, so its version is unknown",
            remedy=f"pip install {project}, and validate with it",
        ) from error


def _check(wheels: Sequence[Wheel], pins_by_python: Mapping[str, Mapping[str, str]], folder: Path) -> None:
    """Check that all pinned wheels are there and run on their Python: pip silently downloads old versions.

    Raises:
        PackagingError: names the project and the Python.
    """
    for python, pins in pins_by_python.items():
        for project, version in pins.items():
            if not any(wheel.requirement == f"{project}=={version}" and wheel.runs_on(python) for wheel in wheels):
                others = ((wheel.version, sorted(map(str, wheel.tags))) for wheel in wheels if wheel.project == project)
                available = ", ".join(f"{other} for {' or '.join(tags)}" for other, tags in sorted(others)) or "nothing"
                raise PackagingError(
                    f"pip found no {project} {version} for Python {python} on Linux x86-64, only {available}",
                    where=folder,
                    remedy="package on such a machine, with a package registry that has it",
                )
    asked = {(name, version) for pins in pins_by_python.values() for name, version in pins.items()}
    if stray := [wheel for wheel in wheels if (wheel.project, wheel.version) not in asked]:
        raise PackagingError(
            f"pip downloaded {stray[0].requirement}, which is not among the pinned requirements", where=folder
        )


def _own_wheel(folder: Path) -> Path:
    """pairclf's wheel: built from the checkout, or rebuilt from the installed files."""
    top = checkout()
    if top is None:
        return repack("pairclf", folder)
    _pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(top))
    return next(folder.glob(f"pairclf-{__version__}-*.whl"))


def _pip(*arguments: str) -> None:
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(ZIP_EPOCH), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    command = [sys.executable, "-m", "pip", *arguments]
    remedy = "it needs pip and hatchling in this environment, a package registry, and room on the disk"
    run_command(command, f"pip {arguments[0]} failed", remedy, environment=environment)


def repack(project: str, folder: Path) -> Path:
    """Rebuild a wheel from an installed project's files, each verified by the hash in its RECORD.

    Scripts are left out: pip recreates them from entry_points.txt.

    Raises:
        PackagingError: it was installed in editable mode, or one of its files was changed.
    """
    installed = _installed(project)
    info = f"{installed.name.replace('-', '_')}-{installed.version}.dist-info"
    lines = (installed.read_text("WHEEL") or "").splitlines()
    tags = [line.partition(": ")[2] for line in lines if line.startswith("Tag")]
    entries = {str(entry): entry for entry in installed.files or [] if _belongs(PurePosixPath(entry))}
    editable = '"editable": true' in (installed.read_text("direct_url.json") or "")
    if not tags or not any(name.startswith(f"{info}/") for name in entries) or editable:
        raise PackagingError(
            f"{project} {installed.version} was not installed from a wheel, so its wheel can't be rebuilt",
            remedy=f"pip install a wheel of {project}, or run pairclf from its source checkout",
        )
    files = {}
    for name, entry in sorted(entries.items()):
        files[name] = Path(str(entry.locate())).read_bytes()
        if entry.hash is not None and entry.hash.value != record_digest(files[name]):
            raise PackagingError(f"{name} of {project} was changed after it was installed", where=entry.locate())
    return write_wheel(folder / f"{info.removesuffix('.dist-info')}-{tags[0]}.whl", files)


def _belongs(entry: PurePosixPath) -> bool:
    """Whether a line of RECORD was in the wheel. pip adds scripts, caches and notes."""
    added = {"RECORD", "INSTALLER", "REQUESTED", "direct_url.json"}
    if ".." in entry.parts or "__pycache__" in entry.parts:
        return False
    return not (entry.parts[0].endswith(".dist-info") and entry.name in added)
