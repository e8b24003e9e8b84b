"""Where the files of a base model are, and the fingerprint that tells one base from another."""

from __future__ import annotations

import hashlib
import os
from importlib.resources import files
from pathlib import Path

from pairclf.bundles.model_files import check_model_folder
from pairclf.errors import ModelError

EMBEDDED = "embedded:"
_FILES = ("config.json", "*.safetensors")
_BLOCK = 1 << 20  # bytes sampled at once
_BLOCKS = 64  # samples a file


def resolve_base(base: str, override: Path | None = None) -> str:
    """Where the base model's files are: a folder, or a hub id left as it is.

    Args:
        base: the setting `model.base`.
        override: a folder that holds the same model on this machine (an attached Kaggle model, say).

    Raises:
        ModelError: the folder or the embedded model does not exist, or a file in the folder asks for what the person at
            the command has not permitted.
    """
    if override is not None:
        if not (override / "config.json").is_file():
            raise ModelError(
                f"base model folder {override} holds no config.json", remedy="give the folder of the model"
            )
        check_model_folder(override)
        return str(override)
    if base.startswith(EMBEDDED):
        folder = Path(str(files("pairclf"))) / "embedded" / base.removeprefix(EMBEDDED)
        if not (folder / "config.json").is_file():
            shipped = sorted(entry.parent.name for entry in folder.parent.glob("*/config.json"))
            raise ModelError(f"model.base={base} is not shipped with pairclf", remedy=f"one of {shipped}")
        return str(folder)
    folder = Path(os.path.expanduser(base))  # Path's own raises for a user who is not there
    if folder.is_dir():
        check_model_folder(folder)
        return str(folder)
    if not base.startswith((".", "/", "~")) and base.count("/") <= 1:
        return str(folder)
    raise ModelError(f"model.base={base} is no folder here", remedy="give an existing folder, or a hub id owner/name")


def fingerprint(folder: Path) -> str:
    """Hex SHA-256 that tells one base model from another.

    Reads config.json and weights: files up to 64 MiB whole, larger ones by their size and 64 evenly spaced blocks of
    1 MiB, so that a 9B model takes seconds and not minutes of a notebook's time.
    """
    digest = hashlib.sha256()
    for path in sorted(entry for pattern in _FILES for entry in folder.glob(pattern)):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        step = max(_BLOCK, size // _BLOCKS)
        with path.open("rb") as stream:
            for start in range(0, size, step):
                stream.seek(start)
                digest.update(stream.read(_BLOCK))
    return digest.hexdigest()
