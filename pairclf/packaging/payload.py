"""Payloads: what is uploaded beside the kernel, in parts that Kaggle takes, each with a marker file.

Kaggle mounts one dataset at `/kaggle/input/SLUG` today and `/kaggle/input/datasets/OWNER/SLUG` tomorrow, so the kernel
knows no path. It searches its inputs for the markers by the names and hashes that it was built with, and finds every
file of a part, and its hash, in the part's marker:

    pairclf-bundle-0123456789ab.json    {"payload": "bundle", "part": 1, "files": {posix path: sha256}}

A name holds the content's hash wherever one could clash: versions of a dataset only add files, and an older kernel
still finds its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from pairclf.errors import PackagingError
from pairclf.files import refuse_special_files, sha256_file, sha256_tree, write_json
from pairclf.packaging.metadata import (
    KERNEL,
    KERNEL_METADATA,
    LIMITS,
    Limits,
    folder_of,
    kernel_metadata,
    part_metadata,
)
from pairclf.packaging.record import (
    BUILD,
    Build,
    Part,
    Payload,
    identity_of,
    marker_name,
    parse_json,
    read_marker,
)


def divide(sizes: Mapping[str, int], limits: Limits) -> list[list[str]]:
    """Lay whole files into parts: each into the first one that has room, in the order of their names.

    >>> divide({"a/1": 6, "a/2": 6, "b/1": 4}, Limits(size=10, top=9))
    [['a/1', 'b/1'], ['a/2']]

    Args:
        sizes: `{path in the payload: bytes}`.
        limits: of a part; its marker takes a place at the top.

    Raises:
        PackagingError: one file alone is too large.
    """
    parts: list[list[str]] = []
    for name, size in sorted(sizes.items()):
        if size > limits.size:
            raise PackagingError(
                f"{name} has {size:,} bytes, and one dataset takes {limits.size:,}",
                remedy="save the model in shards, or export it quantised (docs/export.md)",
            )
        room = (part for part in parts if _fits(sizes, [*part, name], limits))
        if (found := next(room, None)) is None:
            parts.append([name])
        else:
            found.append(name)
    return parts


def _fits(sizes: Mapping[str, int], names: Sequence[str], limits: Limits) -> bool:
    tops = {PurePosixPath(name).parts[0] for name in names}
    return sum(sizes[name] for name in names) <= limits.size and len(tops) < limits.top


def split(folder: Path, payload: Payload, limits: Limits = LIMITS) -> list[Path]:
    """Divide a payload's folder; what does not fit in there moves to folders beside it: `bundle-2`, `bundle-3`, ...

    Returns:
        The parts' folders.

    Raises:
        PackagingError: one file alone is too large.
    """
    files = (path for path in folder.rglob("*") if path.is_file())
    parts = divide({path.relative_to(folder).as_posix(): path.stat().st_size for path in files}, limits)
    folders = [folder.with_name(folder_of(payload, number)) for number in range(1, len(parts) + 1)]
    for part, names in zip(folders[1:], parts[1:], strict=True):
        _move(folder, part, names)
    return folders


def _move(source: Path, target: Path, names: Iterable[str]) -> None:
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        os.rename(source / name, target / name)


def seal(folder: Path, payload: Payload, number: int) -> tuple[Path, str]:
    """Write the marker of a part that holds all its files, and no metadata yet; returns it and its hex SHA-256."""
    unnamed = folder / "marker.json"
    files = sha256_tree(folder)
    write_json(unnamed, {"payload": payload, "part": number, "files": files})
    digest = sha256_file(unnamed)
    marker = folder / marker_name(payload, digest)
    os.rename(unnamed, marker)
    return marker, digest


def prove(folder: Path, build: Build) -> None:
    """See that all that would be uploaded is what `package` made: kernel, metadata, markers, every file of every part.

    Args:
        folder: of the package.
        build: its record.

    Raises:
        PackagingError: names the first file that was changed, added or removed.
    """
    kernel = folder / KERNEL
    expected = kernel_metadata(build.package, build.code_file, build.parts)
    _prove_metadata(folder, {f"{KERNEL}/{KERNEL_METADATA}": expected})
    for part in build.parts:
        _prove_part(folder, part, build)
    _refuse_others(folder, kernel, {build.code_file, KERNEL_METADATA})
    code = kernel / build.code_file
    if not code.is_file() or identity_of(folder, build.code_file, build.parts) != build.identity:
        raise _changed(f"{KERNEL}/{build.code_file}", "was changed" if code.is_file() else "is gone")


def _prove_part(folder: Path, part: Part, build: Build) -> None:
    marker = folder / part.folder / part.marker
    if not marker.is_file() or sha256_file(marker) != part.sha256:
        raise _changed(f"{part.folder}/{part.marker}", "was changed or removed")
    files = read_marker(marker)
    for name, digest in files.items():
        path = folder / part.folder / name
        if not path.is_file() or sha256_file(path) != digest:
            raise _changed(f"{part.folder}/{name}", "was changed" if path.is_file() else "is gone")
    metadata = part_metadata(build.package, part.payload, part.source)
    _prove_metadata(folder, {f"{part.folder}/{name}": tree for name, tree in metadata.items()})
    _refuse_others(folder, folder / part.folder, {part.marker, *files, *metadata})


def _prove_metadata(folder: Path, expected: Mapping[str, object]) -> None:
    for name, tree in expected.items():
        if not (folder / name).is_file() or parse_json(folder / name) != tree:
            raise _changed(name, f"is not what the settings in {BUILD} give")


def _refuse_others(top: Path, folder: Path, known: set[str]) -> None:
    for name in refuse_special_files(folder):
        if name not in known:
            raise _changed((folder / name).relative_to(top).as_posix(), "was added")


def _changed(name: str, how: str) -> PackagingError:
    return PackagingError(
        f"{name} {how} since this was packaged", remedy="change it where it comes from, then package and rehearse again"
    )
