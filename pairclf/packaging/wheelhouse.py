"""The wheels that the notebook installs: pairclf's own, and what Kaggle's image lacks, for each Python asked for."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path, PurePosixPath

from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import canonicalize_name, parse_wheel_filename

from pairclf import __version__
from pairclf.errors import PackagingError
from pairclf.packaging.closure import is_of_the_driver, resolve, tail
from pairclf.packaging.profiles import profile_path, read_profile, record_digest
from pairclf.packaging.sources import checkout

PLATFORMS = [f"manylinux_2_{glibc}_x86_64" for glibc in range(34, 4, -1)] + ["manylinux2014_x86_64", "linux_x86_64"]
"""Of Kaggle's machines, all of them: pip does not expand a tag downwards, and with one alone takes an old version."""

_EPOCH = 1_580_601_600  # 2020-02-02: the same source gives the same wheel, byte by byte
_ZIP_DATE = (2020, 2, 2, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Wheel:
    """What a wheel's file name says: `{project}-{version}(-{build})?-{python}-{abi}-{platform}.whl`."""

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
    """Sorted by file name; what is compiled may be there for each Python."""
    requirements: Mapping[str, Sequence[str]]
    """`{python: [project==version]}`: what the notebook installs, sorted by project."""
    notes: Sequence[str]
    """What is carried in another version than the image's, or than the one that was validated here."""


def kaggle_tags(python: str) -> set[Tag]:
    """Every tag that pip accepts on Kaggle's machines under that Python."""
    version, interpreter = tuple(map(int, python.split("."))), f"cp{python.replace('.', '')}"
    return {
        *cpython_tags(version, abis=[interpreter], platforms=PLATFORMS),
        *compatible_tags(version, interpreter, PLATFORMS),
    }


def fill_wheelhouse(folder: Path, pythons: Sequence[str], images: Path | None, extra: Sequence[str]) -> Wheelhouse:
    """Put pairclf's wheel, and what pairclf needs and an image lacks, into `folder`.

    Args:
        pythons: versions of Python that the image may have.
        images: folder of profiles; None: pairclf's own.
        extra: further projects, carried in the version installed here even where an image has them.

    Raises:
        PackagingError: there is no profile, an extra project is not installed here, an image's torch will not do, a
            wheel can't be had for Linux on x86-64, or pip or uv failed.
    """
    extra = sorted({canonicalize_name(project) for project in extra})
    for project in extra:
        if is_of_the_driver(project):
            raise PackagingError(
                f"package.wheels names {project}, which must be the image's: its own fits its GPU driver",
                remedy="leave it out",
            )
        installed_version(project)
    folder.mkdir(parents=True, exist_ok=True)
    own = _own_wheel(folder)
    wanted: dict[str, dict[str, str]] = {}
    notes: list[str] = []
    for python in pythons:
        found = resolve(own, extra, read_profile(python, profile_path(python, images)))
        pins = {name: str(version) for name, version in found.carried.items()}
        if pins:
            _download(folder, python, pins)
        wanted[python] = dict(sorted({**pins, "pairclf": __version__}.items()))
        notes += found.notes
    wheels = [Wheel.parse(path.name) for path in sorted(folder.glob("*.whl"))]
    _check(wheels, wanted, folder)
    requirements = {python: [f"{name}=={pins[name]}" for name in pins] for python, pins in wanted.items()}
    return Wheelhouse(wheels, requirements, notes)


def _download(folder: Path, python: str, pins: Mapping[str, str]) -> None:
    target = ["--python-version", python, "--implementation", "cp", "--abi", f"cp{python.replace('.', '')}"]
    target += [f"--platform={platform}" for platform in PLATFORMS]
    requirements = [f"{name}=={version}" for name, version in pins.items()]
    _pip("download", "--no-deps", "--only-binary=:all:", *target, "--dest", str(folder), *requirements)


def installed_version(project: str) -> str:
    """The version of a project in this environment.

    Raises:
        PackagingError: it is not installed.
    """
    return _installed(project).version


def _installed(project: str) -> Distribution:
    try:
        return distribution(project)
    except PackageNotFoundError as error:
        raise PackagingError(
            f"package.wheels names {project}, which is not installed here, so that its version is not known",
            remedy=f"pip install {project}, and validate with it",
        ) from error


def _check(wheels: Sequence[Wheel], wanted: Mapping[str, Mapping[str, str]], folder: Path) -> None:
    """What came is what was asked for, and runs where it must: pip fetches old versions without a word.

    Raises:
        PackagingError: names the project and the Python.
    """
    for python, pins in wanted.items():
        for project, version in pins.items():
            if not any(wheel.requirement == f"{project}=={version}" and wheel.runs_on(python) for wheel in wheels):
                came = ", ".join(sorted(_words(wheel) for wheel in wheels if wheel.project == project)) or "nothing"
                raise PackagingError(
                    f"{project} {version} was asked for, for Python {python} on Linux on x86-64; what came is {came}",
                    where=folder,
                    remedy="package on such a machine, with a package registry that has it",
                )
    asked = {(name, version) for pins in wanted.values() for name, version in pins.items()}
    if stray := [wheel for wheel in wheels if (wheel.project, wheel.version) not in asked]:
        raise PackagingError(f"{stray[0].requirement} came, and nobody asked for it", where=folder)


def _words(wheel: Wheel) -> str:
    return f"{wheel.version} for {' or '.join(sorted(map(str, wheel.tags)))}"


def _own_wheel(folder: Path) -> Path:
    """pairclf's wheel: built from the checkout, or put together again from the files that it was installed as."""
    top = checkout()
    if top is None:
        return repack("pairclf", folder)
    _pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(top))
    return next(folder.glob(f"pairclf-{__version__}-*.whl"))


def _pip(*arguments: str) -> None:
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(_EPOCH), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    command = [sys.executable, "-m", "pip", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise PackagingError(
            f"pip {arguments[0]} failed:\n{tail(done.stdout + done.stderr, 12)}",
            remedy="it needs pip and hatchling in this environment, a package registry, and room on the disk",
        )


def repack(project: str, folder: Path) -> Path:
    """A wheel with the files that an installed project consists of, each proven by the hash in its RECORD.

    Scripts are left out: pip makes them anew from entry_points.txt.

    Raises:
        PackagingError: it was installed in editable mode, or one of its files was changed.
    """
    found = _installed(project)
    info = f"{found.name.replace('-', '_')}-{found.version}.dist-info"
    tags = [line.partition(": ")[2] for line in (found.read_text("WHEEL") or "").splitlines() if line.startswith("Tag")]
    entries = {str(entry): entry for entry in found.files or [] if _belongs(PurePosixPath(entry))}
    editable = '"editable": true' in (found.read_text("direct_url.json") or "")
    if not tags or not any(name.startswith(f"{info}/") for name in entries) or editable:
        raise PackagingError(
            f"{project} {found.version} was not installed from a wheel, and can't be made one again",
            remedy=f"pip install a wheel of {project}, or run pairclf from its source checkout",
        )
    path = folder / f"{info.removesuffix('.dist-info')}-{tags[0]}.whl"
    record = []
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, entry in sorted(entries.items()):
            content = Path(str(entry.locate())).read_bytes()
            digest = record_digest(content)
            if entry.hash is not None and entry.hash.value != digest:
                raise PackagingError(f"{name} of {project} was changed after it was installed", where=entry.locate())
            record.append(f"{name},sha256={digest},{len(content)}\n")
            archive.writestr(_member(name), content)
        archive.writestr(_member(f"{info}/RECORD"), "".join(record) + f"{info}/RECORD,,\n")
    return path


def _belongs(entry: PurePosixPath) -> bool:
    """Whether a line of RECORD was in the wheel: pip adds scripts, caches and notes of its own."""
    added = {"RECORD", "INSTALLER", "REQUESTED", "direct_url.json"}
    if ".." in entry.parts or "__pycache__" in entry.parts:
        return False
    return not (entry.parts[0].endswith(".dist-info") and entry.name in added)


def _member(name: str) -> zipfile.ZipInfo:
    member = zipfile.ZipInfo(name, date_time=_ZIP_DATE)
    member.compress_type = zipfile.ZIP_DEFLATED
    member.external_attr = 0o644 << 16
    return member
