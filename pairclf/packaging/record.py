"""`build.json`: what a package is made of. It lies at the top of the folder, where nothing is uploaded from.

`rehearse`, `push`, `submit` and the ledger read it, so that none of them guesses from folder names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from pairclf.config import Package, Section, checked
from pairclf.errors import PackagingError
from pairclf.files import sha256_file, write_text
from pairclf.packaging.metadata import KERNEL, KERNEL_METADATA
from pairclf.task import Task

BUILD = "build.json"

Payload = Literal["bundle", "wheels"]
"""What is uploaded beside the kernel: trained bundles, and what the kernel installs."""

PAYLOADS: tuple[Payload, ...] = ("bundle", "wheels")


class Part(Section):
    """A folder that becomes one dataset, or one model, on Kaggle."""

    payload: Payload = Field(description="what it holds")
    kind: Literal["dataset", "model"] = Field(description="what it becomes")
    folder: str = Field(description="its folder below the package's: bundle, bundle-2, wheels")
    source: str = Field(description="owner/slug of a dataset, owner/model/framework/instance of a model")
    marker: str = Field(description="name of its marker file: pairclf-PAYLOAD-HASH.json")
    sha256: str = Field(description="of the marker file, in hex")
    bytes: int = Field(description="of all its files")


class PackedBundle(Section):
    """A bundle inside the payload."""

    folder: str = Field(description="its folder in the payload: NAME-SEAL")
    name: str = Field(description="as its manifest says")
    seal: str = Field(description="of its manifest: SHA-256 in hex")
    fold: int | None = Field(description="held out in its training; null: none")
    metrics: dict[str, float] = Field(description="on the rows that were held out")
    base: str = Field(description="base model, as its manifest says")


class Build(Section):
    """All of a package."""

    pairclf: str = Field(description="version that built it")
    identity: str = Field(
        description="SHA-256 over the kernel's file and metadata and the markers: one build, one identity"
    )
    package: Package = Field(description="the settings")
    task: Task = Field(description="what the bundles answer")
    kernel: str = Field(description="owner/slug")
    code_file: str = Field(description="name of the kernel's file in kernel/")
    parts: list[Part] = Field(description="in the order in which the kernel attaches them")
    bundles: list[PackedBundle] = Field(description="in the order of the ensemble")
    requirements: dict[str, list[str]] = Field(description="project==version that is installed, by Python")
    config: str = Field(description="name of the run: its folder below runs/; or of the bundles' folders")
    out_of_fold: float | None = Field(None, description="the task's metric over the rows of all folds; null: not known")
    test: Path | None = Field(None, description="test file to rehearse with; null: not known")
    sample: Path | None = Field(None, description="its sample submission")

    def of(self, payload: Payload) -> list[Part]:
        return [part for part in self.parts if part.payload == payload]


def write_build(folder: Path, build: Build) -> None:
    write_text(folder / BUILD, build.model_dump_json(indent=2) + "\n")


def read_build(folder: Path) -> Build:
    """What `package` wrote into `folder`.

    Raises:
        PackagingError: the folder is no package.
        ConfigError: its record is of another version of pairclf, or was changed.
    """
    path = folder / BUILD
    if not path.is_file():
        raise PackagingError(
            f"{folder} is no package: it has no {BUILD}", remedy="give the folder that `pairclf package` made"
        )
    tree = parse_json(path)
    return checked(Build, tree, path, "package again")


def identity_of(folder: Path, kernel_file: str, parts: Sequence[Part]) -> str:
    """A build's identity, in hex, of the files as they lie in `folder` now.

    Args:
        folder: of the package.
        kernel_file: name of the kernel's file in kernel/.
        parts: their markers stand for their files, see `payload.prove`.

    Raises:
        OSError: a file is missing.
    """
    kernel = [folder / KERNEL / kernel_file, folder / KERNEL / KERNEL_METADATA]
    hashes = map(sha256_file, [*kernel, *(folder / part.folder / part.marker for part in parts)])
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def parse_json(path: Path) -> object:
    """Raises `PackagingError` where `path` holds no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PackagingError(f"{path} is not JSON: {error}", remedy="package again") from error
