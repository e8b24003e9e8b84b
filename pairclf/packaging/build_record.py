"""`build.json`: the record of a package, which the later commands read. It is not uploaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from pairclf.config import Package, Section, Submission, checked
from pairclf.errors import PackagingError
from pairclf.files import (
    MAX_JSON,
    check_name,
    check_path,
    is_regular,
    parsed,
    read_plain,
    refuse_special_files,
    sha256_file,
    state_folder,
    write_private,
    write_text,
)
from pairclf.inference.ensemble import NestedFigures
from pairclf.packaging.metadata import (
    KERNEL,
    KERNEL_METADATA,
    PAYLOADS,
    PackagePart,
    Payload,
    check_package,
    package_part,
)
from pairclf.task import Task

BUILD = "build.json"


class PackedBundle(Section):
    """A bundle inside the payload."""

    folder: str = Field(description="its folder in the payload: NAME-SEAL")
    name: str = Field(description="as its manifest says")
    seal: str = Field(description="of its manifest: SHA-256 in hex")
    fold: int | None = Field(description="held out in its training; null: none")
    metrics: dict[str, float] = Field(description="on the rows that were held out")
    orders: Literal[1, 2] = Field(description="orders of a row that its model sees differently")
    base: str | None = Field(description="base model, as its manifest says; null: it has no language model")


class Build(Section):
    """The record of a package."""

    pairclf: str = Field(description="version that built it")
    identity: str = Field(
        pattern=r"^[0-9a-f]{64}$",
        description="SHA-256 over names and hashes of the kernel's file and metadata and the markers: one build, one "
        "identity",
    )
    package: Package = Field(description="the settings")
    task: Task = Field(description="what the bundles answer")
    kernel: str = Field(description="owner/slug")
    code_file: str = Field(description="name of the kernel's file in kernel/")
    parts: list[PackagePart] = Field(description="in the order in which the kernel attaches them")
    bundles: list[PackedBundle] = Field(description="in the order of the ensemble")
    requirements: dict[str, list[str]] = Field(description="project==version that is installed, by Python")
    config: str = Field(description="name of the run: its folder below runs/; or of the bundles' folders")
    out_of_fold: float | None = Field(None, description="the task's metric over the rows of all folds; null: not known")
    nested: NestedFigures | None = Field(None, description="what calibration or blend gain; null: not known")
    test: Path | None = Field(None, description="test file to rehearse with; null: not known")
    sample: Path | None = Field(None, description="its sample submission")
    columns: dict[str, str | None] = Field({}, description="data.test.columns of the bundles")
    submission: Submission = Field(default_factory=Submission, description="data.submission of the bundles")

    @property
    def orders(self) -> int:
        """Orders of a row that is scored in full: the fewest of any model, as `PredictionState.num_orders` counts."""
        return min(bundle.orders for bundle in self.bundles)

    def of(self, payload: Payload) -> list[PackagePart]:
        return [part for part in self.parts if part.payload == payload]


def write_build(folder: Path, build: Build) -> None:
    """Write the record, and note on this machine which files outside the package it names."""
    write_text(folder / BUILD, build.model_dump_json(indent=2) + "\n")
    write_private(own_note("packages", build.identity), _outside(build))


def is_own(build: Build) -> bool:
    """Whether this machine made this package, and its record still names the same files outside of it."""
    path = own_note("packages", build.identity)
    return is_regular(path) and path.read_text(encoding="utf-8") == _outside(build)


def own_note(kind: Literal["packages", "rehearsals", "pushed"], identity: str) -> Path:
    """The file in which this machine notes what it did with a build: `$XDG_STATE_HOME/pairclf/KIND/IDENTITY.json`."""
    return state_folder() / kind / f"{identity}.json"


def _outside(build: Build) -> str:
    paths = {"test": build.test, "sample": build.sample, "images": build.package.image_freezes}
    return json.dumps({name: None if path is None else str(path) for name, path in paths.items()}) + "\n"


def read_build(folder: Path) -> Build:
    """Read the record that `package` wrote into `folder`.

    The folder may come from somebody else. So all names in the record must be those that `package` writes, and
    links, pipes and devices are refused.

    Raises:
        PackagingError: the folder is no package, or one of its record's names is not what `package` gives.
        PairclfError: something that is neither a file nor a folder lies in it.
        ConfigError: its record is of another version of pairclf, or was changed.
    """
    path = folder / BUILD
    if folder.is_dir():
        refuse_special_files(folder)
    if not path.is_file():
        raise PackagingError(
            f"{folder} is no package: it has no {BUILD}", remedy="give the folder that `pairclf package` made"
        )
    tree = parse_json(path)
    build = checked(Build, tree, path, "package again")
    _check_names(build, path)
    return build


def _check_names(build: Build, where: Path) -> None:
    """Check that all names in the record follow from its settings.

    Raises:
        PackagingError: names the first that does not, and the expected one.
    """
    check_package(build.package)
    package = build.package
    suffix = "py" if package.kernel_type == "script" else "ipynb"
    checks = [
        ("kernel", build.kernel, f"{package.owner}/{package.name}"),
        ("code_file", build.code_file, f"{package.name}.{suffix}"),
    ]
    for payload in PAYLOADS:
        for number, part in enumerate(build.of(payload), 1):
            expected_part = package_part(package, payload, number, sha256=part.sha256, size=part.bytes)
            checks += [(f"parts.{name}", value, getattr(expected_part, name)) for name, value in part]
    for name, actual, expected in checks:
        if actual != expected:
            raise PackagingError(
                f"{name}={actual[:100]!r} in the record is not what `package` writes there, {expected!r}",
                where=where,
                remedy="package again; do not use a package that is not yours",
            )
    for bundle in build.bundles:
        check_name(bundle.folder, f"a bundle in {where}")


def read_marker(path: Path) -> dict[str, str]:
    """Read a marker: `{posix path: hex SHA-256}` of the files of its part, all inside the marker's folder.

    Raises:
        PackagingError: it is not a marker.
        PairclfError: a path leads out of the folder.
    """
    tree = parse_json(path)
    files = tree.get("files") if isinstance(tree, dict) else None
    if not isinstance(files, dict):
        raise PackagingError(f"{path.name} is no marker of a package", where=path, remedy="package again")
    return {check_path(str(name), f"a file in {path.name}"): str(digest) for name, digest in files.items()}


def identity_of(folder: Path, kernel_file: str, parts: Sequence[PackagePart]) -> str:
    """A build's identity, in hex: a hash of the names and contents of its files.

    Each part is represented by its marker, see `payload.verify_package`.
    """
    names = [f"{KERNEL}/{kernel_file}", f"{KERNEL}/{KERNEL_METADATA}"]
    names += [f"{part.folder}/{part.marker}" for part in parts]
    places = ["", "", *(f" {part.kind} {part.source}" for part in parts)]
    lines = [f"{sha256_file(folder / name)} {name}{place}\n" for name, place in zip(names, places, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def parse_json(path: Path) -> object:
    """Parse a JSON file; raises `PackagingError` if it is not JSON."""
    try:
        value: object = parsed(read_plain(path, MAX_JSON))
        return value
    except ValueError as error:
        raise PackagingError(f"{path} is not JSON: {error}", remedy="package again") from error
