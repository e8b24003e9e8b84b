"""What every payload carries: a marker file with hashes; and what none may carry: a path of this machine.

Kaggle mounts one dataset at `/kaggle/input/SLUG` today and `/kaggle/input/datasets/OWNER/SLUG` tomorrow, so the
notebook knows no path. It searches its inputs for `pairclf-bundle.json` and `pairclf-wheels.json`, takes the one whose
SHA-256 it was built with, and finds the files and their hashes in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pairclf.errors import PackagingError
from pairclf.files import sha256_file, sha256_tree, write_json
from pairclf.packaging.metadata import Payload
from pairclf.packaging.sources import checkout

DATASET_METADATA, KERNEL_METADATA = "dataset-metadata.json", "kernel-metadata.json"
_READ_BY_PEOPLE = (".ipynb", ".json", ".md", ".txt", ".yaml")


def marker_name(payload: Payload) -> str:
    return f"pairclf-{payload}.json"


def seal(folder: Path, payload: Payload) -> str:
    """Write the marker of a dataset folder that is otherwise complete, and return the marker's hex SHA-256.

    dataset-metadata.json is left out of it: Kaggle's client reads that file and does not upload it.
    """
    marker = folder / marker_name(payload)
    files = sha256_tree(folder, without=frozenset({DATASET_METADATA, marker.name}))
    write_json(marker, {"payload": payload, "files": files})
    return sha256_file(marker)


def refuse_own_paths(folder: Path) -> None:
    """Refuse a folder in which a text names a path of this machine.

    A tokenizer's vocabulary is not read: its pieces may look like anything.

    Raises:
        PackagingError: names the files and the path.
    """
    own = {str(path) for path in (Path.home(), Path.cwd(), checkout()) if path is not None and len(path.parts) > 1}
    for text, name in _texts(folder):
        for path in sorted(own):
            if f"{path}/" in text or f'{path}"' in text:
                raise PackagingError(
                    f"{name} names {path}, a path of this machine, and would be published with it",
                    where=folder,
                    remedy="give data, output and base model by relative paths and train again",
                )


def _texts(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.rglob("*")):
        if path.suffix in _READ_BY_PEOPLE and path.is_file() and path.parent.name != "tokenizer":
            yield path.read_text(encoding="utf-8"), path.relative_to(folder).as_posix()
