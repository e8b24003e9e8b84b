"""The steps of a long benchmark: each in a process of its own, within a time limit, and done once.

A step leaves one line of JSON in the file of results: its name, its seconds, and either the figures that it printed as
its last line of JSON, or `error`. The next call runs the steps that have no line without an error.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from pairclf.files import open_to_append
from pairclf.signals import ENDING, answering

Figures = dict[str, Any]


class Step(NamedTuple):
    """A command that prints its figures as one line of JSON, and the seconds after which it is ended."""

    name: str
    command: Sequence[str]
    seconds: float


class StepError(Exception):
    """A step ended without figures."""


LEFT: Figures = {"error": "left for the next call"}
"""The line of a step that was not run."""

Run = Callable[[Step, float, Path], Figures]
"""Runs a step within so many seconds, with a file for its output; raises `StepError`."""


def read_results(path: Path) -> dict[str, Figures]:
    """The last line of each step, by name."""
    found: dict[str, Figures] = {}
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with suppress(ValueError):  # a full disk or a kill left a part of the line: the step is not done
            line = json.loads(text)
            found[line["name"]] = line
    return found


def run_steps(
    steps: Sequence[Step],
    results: Path,
    *,
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
    run: Run | None = None,
) -> dict[str, Figures]:
    """Run the steps that are not done, and return the line of each step, by name; `LEFT` for one that was not run.

    Args:
        steps: in the order in which they run.
        results: the file of lines; what the steps print goes to `NAME.log` beside it.
        seconds: for all of them; a step that would begin later is left for the next call.
        clock: measures them.
        run: runs a step; None: `run_process`.
    """
    results.parent.mkdir(parents=True, exist_ok=True)
    end, found = clock() + seconds, read_results(results)
    for step in steps:
        if "error" not in found.get(step.name, LEFT):
            print(f"{step.name}: done before", flush=True)
            continue
        start = clock()
        if start >= end:
            print(f"{step.name}: left for the next call, as the time is up", flush=True)
            continue
        try:
            figures = (run or run_process)(step, min(step.seconds, end - start), results.parent / f"{step.name}.log")
        except StepError as error:
            figures = {"error": str(error)}
        found[step.name] = {"name": step.name, "took_s": round(clock() - start, 1), **figures}
        line = json.dumps(found[step.name])
        with open_to_append(results) as file:
            file.write(f"{line}\n".encode())
        print(line, flush=True)
    return {step.name: found.get(step.name, LEFT) for step in steps}


def _end(number: int, _: object) -> None:
    raise SystemExit(128 + number)


def run_process(step: Step, seconds: float, log: Path) -> Figures:
    """Run a step's command, and end it with all its processes after so many seconds, or when this process is to end.

    Raises:
        StepError: it failed, took longer, or printed no line of JSON.
    """
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    with log.open("wb") as output, answering(ENDING, _end):  # the step has a session of its own, and hears nothing
        child = subprocess.Popen(
            step.command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            status = child.wait(seconds)
        except subprocess.TimeoutExpired:
            raise StepError(f"it took more than {seconds:.0f} s ({log})") from None
        finally:
            with suppress(ProcessLookupError):  # nothing of it is left
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    if status:
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
        raise StepError(f"exit code {status}: {last} ({log})")
    for line in reversed(lines):
        with suppress(ValueError):
            if isinstance(figures := json.loads(line), dict):
                return figures
    raise StepError(f"it printed no line of JSON ({log})")
