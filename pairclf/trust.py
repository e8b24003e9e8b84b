"""Permissions for files of other people: `--trust-remote-code` and `--linked-files`. No file can grant them.

The command line sets them once for its process; a worker receives them in its `Assignment`.
"""

from __future__ import annotations

from dataclasses import dataclass

REMOTE_CODE, LINKED_FILES = "--trust-remote-code", "--linked-files"
"""The flags, as messages name them."""


@dataclass(frozen=True, slots=True)
class Trust:
    """Permissions, none by default.

    Attributes:
        remote_code: Python files that come with a model may be run.
        linked_files: a bundle's files may be symbolic links to regular files, as in Kaggle's kernel or the hub's cache.
    """

    remote_code: bool = False
    linked_files: bool = False


_granted = Trust()


def grant(trust: Trust) -> None:
    """Set the permissions of this process."""
    global _granted
    _granted = trust


def granted() -> Trust:
    """The permissions of this process."""
    return _granted
