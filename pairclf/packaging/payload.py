"""Payloads: what is uploaded besides the kernel, in parts within Kaggle's limits, each with a marker file.

Kaggle has changed its mount paths (`/kaggle/input/SLUG`, `/kaggle/input/datasets/OWNER/SLUG`), so the kernel relies on
no path. It searches its inputs for its markers, whose names and hashes it knows. A marker lists the hash of every file
of its part:

    pairclf-bundle-0123456789ab.json    {"payload": "bundle", "part": 1, "files": {posix path: sha256}}

Names that could clash contain a hash: new versions of a dataset only add files, and older kernels still find theirs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from pairclf.errors import PackagingError
from pairclf.files import refuse_special_files, sha256_file, sha256_tree, write_json
from pairclf.packaging.build_record import BUILD, Build, identity_of, parse_json, read_marker
from pairclf.packaging.metadata import (
    KERNEL,
    KERNEL_METADATA,
    LIMITS,
    Limits,
    PackagePart,
    Payload,
    folder_of,
    kernel_metadata,
    marker_name,
    part_metadata,
)


def divide(sizes: Mapping[str, int], limits: Limits) -> list[list[str]]:
    """Distribute files over parts: each into the first part with room, in the order of names.

    >>> divide({"a/1": 6, "a/2": 6, "b/1": 4}, Limits(size=10, top=9))
    [['a/1', 'b/1'], ['a/2']]

    `sizes`: `{path in the payload: bytes}`. A part's marker is one of its entries at the top.

    Raises:
        PackagingError: one file alone is too large.
    """

    def fits(names: Sequence[str]) -> bool:
        tops = {PurePosixPath(name).parts[0] for name in names}
        return sum(sizes[name] for name in names) <= limits.size and len(tops) < limits.top

    parts: list[list[str]] = []
    for name, size in sorted(sizes.items()):
        if size > limits.size:
            raise PackagingError(
                f"{name} has {size:,} bytes, and one dataset takes {limits.size:,}",
                remedy="save the model in shards, or export it quantised (docs/export.md)",
            )
        part = next((part for part in parts if fits([*part, name])), None)
        if part is None:
            parts.append(part := [])
        part.append(name)
    return parts


def split(folder: Path, payload: Payload, limits: Limits = LIMITS) -> list[Path]:
    """Split a payload's folder: files beyond the limits move to sibling folders `bundle-2`, ...; returns all folders.

    Raises:
        PackagingError: one file alone is too large.
    """
    files = (path for path in folder.rglob("*") if path.is_file())
    parts = divide({path.relative_to(folder).as_posix(): path.stat().st_size for path in files}, limits)
    folders = [folder.with_name(folder_of(payload, number)) for number in range(1, len(parts) + 1)]
    for part, names in zip(folders[1:], parts[1:], strict=True):
        for name in names:
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            os.rename(folder / name, part / name)
    return folders


def seal(folder: Path, payload: Payload, number: int) -> tuple[Path, str]:
    """Write a part's marker, before its metadata is added; returns the marker and its hex SHA-256."""
    unnamed = folder / "marker.json"
    files = sha256_tree(folder)
    write_json(unnamed, {"payload": payload, "part": number, "files": files})
    digest = sha256_file(unnamed)
    marker = folder / marker_name(payload, digest)
    os.rename(unnamed, marker)
    return marker, digest


def verify_package(folder: Path, build: Build) -> None:
    """Verify that all files to be uploaded are unchanged since `package`: kernel, metadata, markers and payloads.

    Raises:
        PackagingError: names the first file that was changed, added or removed.
    """
    kernel = folder / KERNEL
    expected = kernel_metadata(build.package, build.code_file, build.parts)
    _verify_metadata(folder, {f"{KERNEL}/{KERNEL_METADATA}": expected})
    for part in build.parts:
        _verify_part(folder, part, build)
    _refuse_others(folder, kernel, {build.code_file, KERNEL_METADATA})
    code = kernel / build.code_file
    if not code.is_file() or identity_of(folder, build.code_file, build.parts) != build.identity:
        raise _changed(f"{KERNEL}/{build.code_file}", "was changed" if code.is_file() else "is gone")


def _verify_part(folder: Path, part: PackagePart, build: Build) -> None:
    marker = folder / part.folder / part.marker
    if not marker.is_file() or sha256_file(marker) != part.sha256:
        raise _changed(f"{part.folder}/{part.marker}", "was changed or removed")
    files = read_marker(marker)
    for name, digest in files.items():
        path = folder / part.folder / name
        if not path.is_file() or sha256_file(path) != digest:
            raise _changed(f"{part.folder}/{name}", "was changed" if path.is_file() else "is gone")
    metadata = part_metadata(build.package, part.payload, part.source)
    _verify_metadata(folder, {f"{part.folder}/{name}": tree for name, tree in metadata.items()})
    _refuse_others(folder, folder / part.folder, {part.marker, *files, *metadata})


def _verify_metadata(folder: Path, expected: Mapping[str, object]) -> None:
    for name, tree in expected.items():
        if not (folder / name).is_file() or parse_json(folder / name) != tree:
            raise _changed(name, f"is not what the settings in {BUILD} give")


def _refuse_others(top: Path, folder: Path, expected: set[str]) -> None:
    for name in refuse_special_files(folder):
        if name not in expected:
            raise _changed((folder / name).relative_to(top).as_posix(), "was added")


def _changed(name: str, how: str) -> PackagingError:
    return PackagingError(
        f"{name} {how} since this was packaged", remedy="change it at its source, then package and rehearse again"
    )
