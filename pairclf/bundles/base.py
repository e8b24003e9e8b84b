"""Where the files of a base model are, and the fingerprint that tells one base from another."""

from __future__ import annotations

import hashlib
import os
from functools import cache
from importlib.resources import files
from pathlib import Path

from pairclf.bundles.model_files import check_model_folder
from pairclf.config import Config
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
    if base.startswith(EMBEDDED) and override is None:
        folder = Path(str(files("pairclf"))) / "embedded" / base.removeprefix(EMBEDDED)
        if not (folder / "config.json").is_file():
            shipped = sorted(EMBEDDED + entry.parent.name for entry in folder.parent.glob("*/config.json"))
            remedy = f"model.base={' or '.join(shipped)}"
            raise ModelError(f"model.base={base} is not shipped with pairclf", remedy=remedy)
        return str(folder)
    folder = override or Path(os.path.expanduser(base))  # Path's own raises for a user who is not there
    if override or folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"base model folder {folder} holds no config.json", remedy="give the folder of the model")
        check_model_folder(folder)
        return str(folder)
    if not base.startswith((".", "/", "~")) and base.count("/") <= 1:
        return str(folder)
    raise ModelError(f"model.base={base} is no folder here", remedy="give an existing folder, or a hub id owner/name")


@cache
def ask_hub(model: str) -> None:
    """Ask the hub once whether it gives this user the model, where transformers would ask it a dozen times.

    Where `HF_HUB_OFFLINE` is set, the cache is asked instead.

    Raises:
        ModelError: the model is gated, private or unknown, is not in the cache, or the hub can't be reached.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HTTPError, RepositoryNotFoundError  # type: ignore[attr-defined]

    page, token = f"https://huggingface.co/{model}", "set HF_TOKEN to a token of your account (or run `hf auth login`)"
    if constants.HF_HUB_OFFLINE:
        if not isinstance(try_to_load_from_cache(model, "config.json"), str):
            raise ModelError(
                f"the model {model} is no folder and not in the cache of the hub, which is not asked (HF_HUB_OFFLINE)",
                remedy=f"run `hf download {model}` before, or give the folder of the model",
            )
        return
    try:
        HfApi().auth_check(model)
    except GatedRepoError as error:
        raise ModelError(f"the model {model} is gated", remedy=f"accept its terms on {page}, and {token}") from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"the hub has no public model {model}", remedy=f"check {page}; if it is private, {token}"
        ) from error
    except (HTTPError, OSError) as error:
        raise ModelError(
            f"the hub can't be reached for the model {model}: {error}",
            remedy="connect this machine; or, if the model was fetched before, set HF_HUB_OFFLINE=1",
        ) from error


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


def base_fingerprint(config: Config, base: Path | None = None) -> str:
    """Fingerprint of the base model where its files are at hand; a hub id stands for itself."""
    source = resolve_base(config.model.base, base)
    return fingerprint(Path(source)) if Path(source).is_dir() else f"hub:{source}"
