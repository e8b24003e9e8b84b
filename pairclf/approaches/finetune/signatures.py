"""Signatures of checkpoints, with a key that only this user has, stored outside of run folders.

DeepSpeed, FSDP and Accelerate load checkpoints with pickle, which can run any code. So only files with a valid
signature are loaded, unless the user trusts the checkpoint by a flag.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path

from pairclf.console import console
from pairclf.errors import CheckpointError, ConfigError
from pairclf.files import atomic_file, locked, state_folder

_SIZE = 32  # bytes


def key_path() -> Path:
    """The file with the key: `$XDG_STATE_HOME/pairclf/checkpoint.key`, by default below `~/.local/state`."""
    return state_folder() / "checkpoint.key"


def signature(digests: Mapping[str, str]) -> str | None:
    """Sign files for this user; None, with a note, if no key can be stored.

    Args:
        digests: `{relative path: SHA-256}` of the files.
    """
    try:
        key = _key() or _make_key()
    except OSError as error:
        console.print(f"note: checkpoints are not signed, as {key_path()} can't be written ({error})")
        return None
    except ConfigError as error:
        console.print(f"note: checkpoints are not signed: {error.what}")
        return None
    return _sign(key, digests)


def is_signed(digests: Mapping[str, str], candidate: object) -> bool:
    """Whether `candidate` is the signature that this user's key gives to these files."""
    key = _key()
    return key is not None and isinstance(candidate, str) and hmac.compare_digest(_sign(key, digests), candidate)


def _sign(key: bytes, digests: Mapping[str, str]) -> str:
    return hmac.digest(key, json.dumps(dict(digests), sort_keys=True).encode(), "sha256").hex()


def _key() -> bytes | None:
    """The key; None if there is none yet.

    Raises:
        CheckpointError: others can read or write it, or it is damaged.
    """
    path = key_path()
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    with os.fdopen(descriptor, "rb") as stream:
        status, key = os.fstat(descriptor), stream.read(_SIZE + 1)
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise CheckpointError("others can read or write the key of checkpoints", where=path, remedy="delete it")
    if len(key) != _SIZE:
        raise CheckpointError(f"the key of checkpoints does not have {_SIZE} bytes", where=path, remedy="delete it")
    return key


def _make_key() -> bytes:
    path = key_path()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked(path.with_name(".lock")):
        if (existing := _key()) is not None:  # another process has made it meanwhile
            return existing
        with atomic_file(path) as temporary:
            temporary.touch(mode=0o600)
            temporary.write_bytes(key := secrets.token_bytes(_SIZE))
    return key
