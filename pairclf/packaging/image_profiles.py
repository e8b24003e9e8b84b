"""Profiles of Kaggle's images: a freeze for each Python version, and stubs that stand for the packages in it.

A profile is a text file such as `kaggle/images/python3.12.txt`, as `pip freeze` prints it. `-r` includes another one;
a later line overrides an earlier one. Kaggle publishes none: `kaggle/images/freeze.ipynb`, run there, writes one.
"""

from __future__ import annotations

import base64
import hashlib
import re
import zipfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import (
    InvalidName,
    InvalidSdistFilename,
    InvalidWheelFilename,
    canonicalize_name,
    parse_sdist_filename,
    parse_wheel_filename,
)
from packaging.version import InvalidVersion, Version

from pairclf.errors import PackagingError, cut, quoted
from pairclf.files import check_name, read_plain, zip_member
from pairclf.own_files import shipped

IMAGES = "kaggle/images"
IMAGE_LABEL = "image"
"""Local label of a stub's version: no registry has it, so that a resolver's answer says what is the image's."""

MOST_FILES, MOST_BYTES = 32, 4 << 20
"""Files of a profile, each counted as often as it is included, and bytes of one: two lines a file could double them."""

_EDITABLE = re.compile(r"# Editable .*\((?P<pin>\S+==\S+)\)")  # pip's line before `-e PATH`
_EGG = re.compile(r"#egg=(?P<name>[A-Za-z0-9._-]+)")
_REFRESH = "run kaggle/images/freeze.ipynb on Kaggle, and name the folder with what it wrote in package.image_freezes"


@dataclass(frozen=True, slots=True)
class ImageProfile:
    """The packages of one image."""

    python: str
    """Its Python: 3.12."""
    versions: Mapping[str, Version]
    """By project, the name normalised; local labels such as `+cu128` are kept."""
    unknown: frozenset[str]
    """Projects that it holds in a version which the freeze does not tell."""

    def without(self, projects: Collection[str]) -> ImageProfile:
        """The image without these projects: carried packages replace the image's."""
        left = {name: version for name, version in self.versions.items() if name not in projects}
        return ImageProfile(self.python, left, self.unknown - set(projects))


def profile_path(python: str, images: Path | None) -> Path:
    """The profile of the image with this Python, in `images` or, if that is None, among pairclf's own.

    Raises:
        PackagingError: there is none.
    """
    folder = shipped(IMAGES) if images is None else images
    path = folder / f"python{python}.txt"
    if not path.is_file():
        have = ", ".join(sorted(entry.stem.removeprefix("python") for entry in folder.glob("python3.*.txt"))) or "none"
        raise PackagingError(
            f"package.python_versions has {python}, and {folder} no {path.name} that says what an image with it holds",
            where=f"profiles are there for Python: {have}",
            remedy=f"leave {python} out, or {_REFRESH}",
        )
    return path


def read_profile(python: str, path: Path) -> ImageProfile:
    """Read a freeze.

    Raises:
        PackagingError: a line is none that `pip freeze` writes; names file, line and text.
    """
    entries = dict(_entries(path, frozenset(), []))  # a later line overrides an earlier one
    versions = {name: version for name, version in entries.items() if version is not None}
    if not versions:
        raise PackagingError(f"{path} lists no package", remedy=_REFRESH)
    return ImageProfile(python, versions, frozenset(entries.keys() - versions.keys()))


def _entries(path: Path, including: frozenset[Path], read: list[Path]) -> Iterator[tuple[str, Version | None]]:
    """`(project, version)` of each line; the version is None if the line does not name it.

    `including`: the files that lead here; `read`: all that were read before, each as often as it was included.
    """
    read.append(path)
    if path in including or not path.is_file() or len(read) > MOST_FILES:
        what = "included by itself" if path in including else "no file" if not path.is_file() else "one file too many"
        raise PackagingError(f"{path} is {what}", remedy=_REFRESH)
    try:
        lines = read_plain(path, MOST_BYTES).splitlines()
    except (OSError, ValueError) as error:
        raise PackagingError(f"{path} can't be read: {cut(error)}", remedy=_REFRESH) from error
    editable: str | None = None
    for number, raw in enumerate(lines, 1):
        line = raw.strip()
        if line.startswith(("-r ", "--requirement ")):
            beside = check_name(line.split(maxsplit=1)[1], f"the profile that {path}, line {number} includes")
            yield from _entries(path.parent / beside, including | {path}, read)
        elif line.startswith(("-e ", "--editable ")):
            yield from _editable(line, editable, f"{path}, line {number}")
        elif line and not line.startswith("#"):
            yield _entry(line, f"{path}, line {number}")
        editable = line


def _editable(line: str, before: str | None, where: str) -> Iterator[tuple[str, Version | None]]:
    """An editable install, named in its address or in the comment before it; one without a name is skipped."""
    if match := _EDITABLE.match(before or ""):
        name, _, version = match["pin"].partition("==")
        yield _project(name, where), parse_version(version)
    elif match := _EGG.search(line):
        yield _project(match["name"], where), None


def _entry(line: str, where: str) -> tuple[str, Version | None]:
    """An entry `name==version`, or `name @ address`, whose file name may contain the version."""
    name, exact, version = line.partition("===" if "===" in line else "==")
    if exact and "@" not in name:
        return _project(name.strip(), where), parse_version(version.partition(" ")[0].partition(";")[0])
    try:
        requirement = Requirement(line)
    except InvalidRequirement as error:
        what = f"{quoted(line)} is no line of a freeze: {cut(error)}"
        raise PackagingError(what, where=where, remedy=_REFRESH) from error
    if requirement.url is None:
        raise PackagingError(f"{quoted(line)} pins no version", where=where, remedy=_REFRESH)
    return canonicalize_name(requirement.name), _version_in(requirement.url)


def _project(name: str, where: str) -> str:
    """The normalised name of a project. A file is named after it, so it must be a valid name.

    Raises:
        PackagingError: it is none.
    """
    try:
        return canonicalize_name(name, validate=True)
    except InvalidName as error:
        raise PackagingError(f"{quoted(name)} is no name of a package", where=where, remedy=_REFRESH) from error


def parse_version(text: str) -> Version | None:
    """The version; None if it does not follow PEP 440, as those of some old distributions."""
    try:
        return Version(text.strip())
    except InvalidVersion:
        return None


def _version_in(address: str) -> Version | None:
    name = PurePosixPath(unquote(urlsplit(address).path)).name
    for parse in (parse_wheel_filename, parse_sdist_filename):
        try:
            return parse(name)[1]
        except (InvalidWheelFilename, InvalidSdistFilename):
            continue
    return None


def write_stubs(profile: ImageProfile, folder: Path) -> None:
    """Write an empty wheel without requirements for each package of the image, its version labelled `+image`.

    Without dependencies, because an image's packages need not agree with each other, and are there all the same.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for project, version in profile.versions.items():
        write_stub(folder, project, stub_version(version))


def stub_version(version: Version) -> Version:
    """The version under which a stub stands for `version`: 2.11.0+cu128 becomes 2.11.0+cu128.image."""
    local = IMAGE_LABEL if version.local is None else f"{version.local}.{IMAGE_LABEL}"
    return Version(f"{version.public}+{local}")


def is_stub(version: Version) -> bool:
    return version.local is not None and version.local.split(".")[-1] == IMAGE_LABEL


def write_stub(folder: Path, project: str, version: Version) -> Path:
    """A wheel that holds its own name and nothing else."""
    stem = f"{project.replace('-', '_')}-{version}"
    wheel = "Wheel-Version: 1.0\nGenerator: pairclf\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files = {"METADATA": f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}\n", "WHEEL": wheel}
    path = folder / f"{stem}-py3-none-any.whl"
    return write_wheel(path, {f"{stem}.dist-info/{name}": text.encode() for name, text in files.items()})


def write_wheel(path: Path, files: Mapping[str, bytes]) -> Path:
    """Write a wheel of these files, and their RECORD; equal files give equal bytes."""
    info = next(name.partition("/")[0] for name in files if ".dist-info/" in name)
    record = [f"{name},sha256={record_digest(content)},{len(content)}\n" for name, content in files.items()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {**files, f"{info}/RECORD": "".join([*record, f"{info}/RECORD,,\n"]).encode()}.items():
            archive.writestr(zip_member(name), content, zipfile.ZIP_DEFLATED)
    return path


def record_digest(content: bytes) -> str:
    """SHA-256 as a wheel's RECORD has it."""
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
