"""The wheels that the notebook installs: pairclf's own, and what Kaggle's image lacks, in the versions in use here."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path, PurePosixPath

from pairclf import __version__
from pairclf.errors import PackagingError
from pairclf.packaging.sources import checkout

PYTHONS = ("3.11", "3.12", "3.13")
"""Versions of Python that pairclf is written for; Kaggle's image has one of the later two."""

_EPOCH = 1_580_601_600  # 2020-02-02: the same source gives the same wheel, byte by byte
_ZIP_DATE = (2020, 2, 2, 0, 0, 0)
_PLATFORM = re.compile(r"any|(many)?linux[a-z0-9_]*_x86_64")  # of Kaggle's machines


@dataclass(frozen=True, slots=True)
class Wheel:
    """What a wheel's file name says: `{project}-{version}(-{build})?-{python}-{abi}-{platform}.whl`."""

    project: str
    version: str
    pythons: tuple[str, ...]
    platforms: tuple[str, ...]

    @classmethod
    def parse(cls, name: str) -> Wheel:
        parts = name.removesuffix(".whl").split("-")
        python, _, platform = parts[-3:]
        return cls(normalise(parts[0]), parts[1], tuple(python.split(".")), tuple(platform.split(".")))

    @property
    def requirement(self) -> str:
        return f"{self.project}=={self.version}"

    def runs_on(self, python: str) -> bool:
        return "py3" in self.pythons or f"cp{python.replace('.', '')}" in self.pythons


def normalise(project: str) -> str:
    """A project's name as indexes compare it: `Typing_Extensions` is `typing-extensions`."""
    return re.sub(r"[-_.]+", "-", project).lower()


def fill_wheelhouse(folder: Path, projects: Sequence[str]) -> list[Wheel]:
    """Put pairclf's wheel and one of each project, in its installed version, into `folder`.

    Returns:
        The wheels that came, sorted by project.

    Raises:
        PackagingError: a project is not installed here, or can't be had in its installed version as a wheel for Linux
            on x86-64; or pip failed.
    """
    wanted = {"pairclf": __version__} | {normalise(project): installed_version(project) for project in projects}
    folder.mkdir(parents=True, exist_ok=True)
    _own_wheel(folder)
    others = [f"{project}=={version}" for project, version in wanted.items() if project != "pairclf"]
    if others:
        _pip("download", "--no-deps", "--only-binary=:all:", "--dest", str(folder), *others)
    wheels = sorted((Wheel.parse(path.name) for path in folder.glob("*.whl")), key=lambda wheel: wheel.project)
    _check(wheels, wanted, folder)
    return wheels


def supported_pythons(wheels: Sequence[Wheel]) -> list[str]:
    """The versions of Python that every one of the wheels installs on."""
    return [python for python in PYTHONS if all(wheel.runs_on(python) for wheel in wheels)]


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


def _check(wheels: Sequence[Wheel], wanted: dict[str, str], folder: Path) -> None:
    """What came is what was asked for: pip fetches old versions silently where no newer wheel fits its tags."""
    came = {wheel.project: wheel.version for wheel in wheels}
    if came != wanted:
        raise PackagingError(f"the wheels that came are {came}; asked for were {wanted}", where=folder)
    foreign = [wheel for wheel in wheels if not any(map(_PLATFORM.fullmatch, wheel.platforms))]
    if foreign:
        raise PackagingError(
            f"{foreign[0].requirement} came for {'.'.join(foreign[0].platforms)}; Kaggle has Linux on x86-64",
            remedy="package on such a machine",
        )


def _own_wheel(folder: Path) -> None:
    """pairclf's wheel: built from the checkout, or put together again from the files that it was installed as."""
    top = checkout()
    if top is None:
        repack("pairclf", folder)
    else:
        _pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(top))


def _pip(*arguments: str) -> None:
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(_EPOCH), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    command = [sys.executable, "-m", "pip", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        tail = "\n".join(f"  {line}" for line in (done.stdout + done.stderr).splitlines()[-12:])
        raise PackagingError(
            f"pip {arguments[0]} failed:\n{tail}",
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
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
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
