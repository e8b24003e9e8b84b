"""What the person at the command permits of files that a stranger may have made. No file that is loaded can grant it.

The command line sets it once for its process; a process that scores gets it with its work (`worker.Assignment`).
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
    """Let this process have these permissions, and no others."""
    global _granted
    _granted = trust


def granted() -> Trust:
    """The permissions of this process."""
    return _granted
