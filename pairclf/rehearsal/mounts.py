"""What Kaggle mounts for a kernel, and the layouts of /kaggle/input that have been seen.

flat    SLUG/                       MODEL/FRAMEWORK/INSTANCE/VERSION/
typed   datasets/OWNER/SLUG/        competitions/SLUG/       models/OWNER/MODEL/FRAMEWORK/INSTANCE/VERSION/
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from pairclf.errors import PackagingError
from pairclf.files import copy_file, link_or_copy
from pairclf.packaging.build_record import Build
from pairclf.packaging.metadata import READ_BY_THE_CLIENT

Kind = Literal["dataset", "competition", "model"]


@dataclass(frozen=True, slots=True)
class Mount:
    """A dataset, competition or model that a kernel attaches.

    Attributes:
        kind: of it.
        source: `owner/slug` of a dataset, `slug` of a competition, `owner/model/framework/instance/version`.
        files: `{path in it: file here}`.
        role: what it is to the kernel: `bundle`, `wheels`, `base` or `competition`.
    """

    kind: Kind
    source: str
    files: Mapping[str, Path]
    role: str


LAYOUTS: dict[str, Callable[[Mount], str]] = {
    "flat": lambda mount: mount.source if mount.kind == "competition" else mount.source.partition("/")[2],
    "typed": lambda mount: f"{mount.kind}s/{mount.source}",
}
"""Where a mount lies below the input."""


def mounts_of(folder: Path, build: Build, competition: Mapping[str, Path], base: Path | None) -> list[Mount]:
    """All mounts of a package's kernel: payloads, competition, base model, in this order.

    Args:
        folder: of the package.
        competition: `{name: file}` of the competition's data.
        base: folder of the base model, if one is attached.

    Raises:
        PackagingError: something is missing.
    """
    mounts = []
    for part in build.parts:
        if not (folder / part.folder / part.marker).is_file():
            raise PackagingError(f"{part.folder}/{part.marker} is missing", where=folder, remedy="package again")
        files = {name: path for name, path in _files(folder / part.folder) if name not in READ_BY_THE_CLIENT}
        source = part.source if part.kind == "dataset" else f"{part.source}/1"
        mounts.append(Mount(part.kind, source, files, part.payload))
    mounts.append(Mount("competition", build.package.competition, competition, "competition"))
    if attached := build.package.base_model_source:
        if base is None or not (base / "config.json").is_file():
            raise PackagingError(
                f"the kernel attaches the base model {attached}, and "
                f"{'no folder was given for it' if base is None else f'{base} has no config.json'}",
                remedy="give the folder of the base model, with its config.json, as --base",
            )
        kind: Kind = "model" if attached.count("/") == 4 else "dataset"
        mounts.append(Mount(kind, attached, dict(_files(base)), "base"))
    return mounts


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), path.resolve()


def lay_out(inputs: Path, mounts: Sequence[Mount], layout: str) -> None:
    """Make the folders of the mounts, still empty."""
    for mount in mounts:
        (inputs / LAYOUTS[layout](mount)).mkdir(parents=True, exist_ok=True)


def fill(inputs: Path, mount: Mount, layout: str, *, copies: bool) -> None:
    """Put a mount's files into its folder below `inputs`.

    `copies`: no hard links, as the kernel could write to the package's files through them.
    """
    place(mount.files, inputs / LAYOUTS[layout](mount), copies=copies)


def place(files: Mapping[str, Path], folder: Path, *, copies: bool = False) -> None:
    """Link or copy files to their paths below a folder."""
    for name, source in files.items():
        target = folder / PurePosixPath(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        if copies or source.stat().st_uid != os.geteuid():  # another's may not be readable without root's rights
            copy_file(source, target)
        else:
            link_or_copy(source, target)
