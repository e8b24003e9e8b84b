"""A kernel's run: the process in its sandbox, the mounts that fill behind its back, its limits, and what it tells."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Timer
from typing import IO, Any

from pairclf.console import Advance
from pairclf.errors import PackagingError
from pairclf.rehearsal import runner
from pairclf.rehearsal.meter import Meter, descendants, size_of
from pairclf.rehearsal.report import Report
from pairclf.rehearsal.sandbox import Sandbox
from pairclf.rehearsal.stage import Scene

SUBMISSION, SCORES, VERIFIED, SERVED = "submission.csv", "scores.parquet", "verify.json", "served.json"

_TAIL = 25
"""Lines kept of a cell that failed."""


@dataclass(frozen=True, slots=True)
class Play:
    """What is run, and how.

    Attributes:
        code: the kernel's file.
        prelude: code that runs before its first cell.
        cells: how many are run; None: all.
        late: seconds from the first cell on until `fill` is called.
        fill: what then happens to the input.
    """

    code: Path
    prelude: str
    cells: int | None
    late: float
    fill: Callable[[], None]


def play(what: Play, scene: Scene, sandbox: Sandbox, report: Report, advance: Advance) -> None:
    """Run it, and fill in the report as its cells end.

    Raises:
        PackagingError: it could not be started, or the sandbox did not hold.
    """
    stage = scene.stage
    code = stage.job / what.code.name
    shutil.copyfile(what.code, code)
    plan = runner.Plan(
        code=str(code),
        inputs=str(scene.input),
        kept=str(stage.kept),
        results=[SUBMISSION, SCORES, VERIFIED, SERVED],
        prelude=what.prelude,
        cells=what.cells,
        hidden="" if sandbox.guarded else str(stage.canary),
    )
    # Not in the stage's home: a kernel that ran in another layout may have put a link there.
    written = stage.job / "plan.json"
    written.write_text(json.dumps(plan), encoding="utf-8")
    command = [*sandbox.prefix, str(stage.python), "-I", str(Path(runner.__file__)), str(written)]
    log = stage.top / "runner.log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            command,
            cwd=scene.working,
            env=scene.environment(rerun=report.rerun, speed=report.speed),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
        _attend(process, what, scene, sandbox, report, advance)
    if not report.failed and not report.killed and process.returncode != 0:
        raise PackagingError(f"the kernel could not be run:\n{tail(log.read_text())}", where=what.code)


def _attend(
    process: subprocess.Popen[str], what: Play, scene: Scene, sandbox: Sandbox, report: Report, advance: Advance
) -> None:
    """Listen until it ends; it does not outlive this function."""
    timer = Timer(what.late, what.fill)
    ours = 1 if sandbox.guarded else 2  # the runner, and above it what made the namespaces
    meter = Meter(process.pid, ours, report.memory_limit, scene.working, report.disk_limit, enforced=sandbox.guarded)
    try:
        with meter:
            for event in _events(process.stdout):
                _note(event, sandbox, report)
                if "begun" in event and timer.ident is None:
                    timer.start()
                if "cell" in event:
                    advance(note=event["cell"])
            process.wait()
    finally:
        timer.cancel()
        if timer.ident is not None:
            timer.join()
        if process.poll() is None:
            for started in descendants(process.pid):  # a notebook's kernel has a session of its own
                with suppress(ProcessLookupError):
                    os.kill(started, signal.SIGKILL)
            process.wait()
    report.memory_peak = max(report.memory_peak, meter.peak)
    report.disk_peak = max(report.disk_peak, meter.disk, size_of(scene.stage.kept))
    report.killed += meter.killed


def _events(lines: IO[str] | None) -> Iterator[dict[str, Any]]:
    yield from map(json.loads, lines or ())


def _note(event: Mapping[str, Any], sandbox: Sandbox, report: Report) -> None:
    """Take one line of the runner into the report.

    Raises:
        PackagingError: the sandbox is open.
    """
    if "blocked" in event:
        report.python, report.working = event["python"], sandbox.working
        report.files = sandbox.files
        for name, means in (("network", sandbox.network), ("input", sandbox.input), ("files", sandbox.files)):
            reason = event["blocked"][name]
            if reason is None:
                raise PackagingError(f"the sandbox does not hold: {name} is open in spite of: {means}")
            if reason:
                setattr(report, name, f"{means} ({reason})")
    elif "cell" in event:
        report.seconds[f"cell {event['cell']}"] = event["seconds"]
        if event["failed"]:
            report.failed, report.said = event["cell"], tail(event["output"])


def tail(text: str) -> str:
    """The last lines that say something."""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return "\n".join(f"  {line}" for line in lines[-_TAIL:])
