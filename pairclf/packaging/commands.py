"""Other programs that packaging and rehearsals run: their failures, and the end of their output."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from pairclf.errors import PackagingError


def run_command(
    command: Sequence[str],
    what: str,
    remedy: str,
    *,
    where: Path | None = None,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Run a command to its end, and return its standard output.

    Raises:
        PackagingError: it failed: `what`, the last lines that it printed, and the remedy.
    """
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise PackagingError(f"{what}:\n{tail(done.stdout + done.stderr, 12)}", where=where, remedy=remedy)
    return done.stdout


def tail(text: str, lines: int) -> str:
    """The last lines that are not empty, indented."""
    kept = [line.rstrip() for line in text.splitlines() if line.strip()]
    return "\n".join(f"  {line}" for line in kept[-lines:])
