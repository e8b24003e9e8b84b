"""A function in a process of its own, forked where torch is imported: a new interpreter takes seconds for that."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from multiprocessing import forkserver, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest


def preload(patch: pytest.MonkeyPatch) -> None:
    """Have the server that forks workers import more of what tests need, when it is started."""
    start = forkserver.ensure_running

    def start_preloaded() -> None:
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("PYTHONPATH", os.pathsep.join(map(str, Path(__file__).parents[1:3])))
            forkserver.set_forkserver_preload(["support.preloaded"])
            start()

    patch.setattr(forkserver, "ensure_running", start_preloaded)


def forked(function: Callable[..., None], *arguments: object, output: Path) -> BaseProcess:
    """Start `function(*arguments)`; what the process prints goes to `output`.

    The process answers signals as a new interpreter does. Its own workers come from the same server.

    Args:
        function: one that a new process can import.
        arguments: what it is called with; they are pickled.
        output: a file.
    """
    forkserver.ensure_running()
    process = get_context("forkserver").Process(target=_run, args=(function, arguments, output))
    process.start()
    return process


def _run(function: Callable[..., None], arguments: tuple[object, ...], output: Path) -> None:
    with output.open("wb") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    server = forkserver._forkserver  # type: ignore[attr-defined]
    server.ensure_running = forkserver.ensure_running = lambda: None  # it would start another one
    function(*arguments)


def command(*arguments: str) -> None:
    """`pairclf ARGUMENTS`."""
    from pairclf.cli import main

    sys.argv = ["pairclf", *arguments]
    main()
