"""Run a kernel in its sandbox: late mounts, limits, and the events that it reports."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Timer
from typing import Any

import psutil

from pairclf.console import Advance
from pairclf.errors import PackagingError
from pairclf.packaging.commands import tail
from pairclf.rehearsal import cell_runner
from pairclf.rehearsal.report import RehearsalReport
from pairclf.rehearsal.resource_monitor import ResourceMonitor, bytes_below, with_descendants
from pairclf.rehearsal.sandbox import Sandbox
from pairclf.rehearsal.workspace import LayoutDirs

SUBMISSION, SCORES, VERIFIED, SERVED = "submission.csv", "scores.parquet", "verify.json", "served.json"

_TAIL = 25
"""Lines kept of the output of a failed cell."""


@dataclass(frozen=True, slots=True)
class KernelRun:
    """The code of a kernel, and how many of its cells run (None: all).

    `prelude` runs before the first cell; `fill` fills the late mounts, `late` seconds after the first cell's start.
    """

    code: Path
    prelude: str
    cells: int | None
    late: float
    fill: Callable[[], None]


def run_kernel(run: KernelRun, dirs: LayoutDirs, sandbox: Sandbox, report: RehearsalReport, advance: Advance) -> None:
    """Run the kernel and fill in the report as cells end.

    Raises:
        PackagingError: the kernel could not be started, or the sandbox is open.
    """
    workspace = dirs.workspace
    code = workspace.job / run.code.name
    shutil.copyfile(run.code, code)
    plan = cell_runner.Plan(
        code=str(code),
        inputs=str(dirs.input),
        results_folder=str(workspace.results_folder),
        results=[SUBMISSION, SCORES, VERIFIED, SERVED],
        prelude=run.prelude,
        cells=run.cells,
        hidden="" if sandbox.guarded else str(workspace.canary),
    )
    # Not in the home folder: a kernel that ran in another layout may have left a link there.
    plan_path = workspace.job / "plan.json"
    plan_path.write_text(json.dumps(plan), encoding="utf-8")
    python = workspace.image / "bin" / "python"
    command = [*sandbox.prefix, str(python), "-I", str(Path(cell_runner.__file__)), str(plan_path)]
    log = workspace.top / "runner.log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            command,
            cwd=dirs.working,
            env=dirs.environment(rerun=report.rerun, speed=report.speed),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
        _collect_events(process, run, dirs, sandbox, report, advance)
    if not report.failed and not report.killed and process.returncode != 0:
        raise PackagingError(f"the kernel could not be run:\n{tail(log.read_text(), _TAIL)}", where=run.code)


def _collect_events(
    process: subprocess.Popen[str],
    run: KernelRun,
    dirs: LayoutDirs,
    sandbox: Sandbox,
    report: RehearsalReport,
    advance: Advance,
) -> None:
    """Collect the kernel's events until it ends. It is killed if this function raises."""
    timer = Timer(run.late, run.fill)
    own_processes = 1 if sandbox.guarded else 2  # the runner and, with namespaces, `unshare` above it
    monitor = ResourceMonitor(
        process.pid, own_processes, report.memory_limit, dirs.working, report.disk_limit, enforced=sandbox.guarded
    )
    try:
        with monitor:
            for event in map(json.loads, process.stdout or ()):
                _record_event(event, sandbox, report)
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
            for started in with_descendants(process.pid):  # a notebook's kernel has its own session
                with suppress(psutil.NoSuchProcess):
                    started.kill()
            process.wait()
    report.memory_peak = max(report.memory_peak, monitor.peak)
    report.disk_peak = max(report.disk_peak, monitor.disk, bytes_below(dirs.workspace.results_folder))
    report.killed += monitor.killed


def _record_event(event: Mapping[str, Any], sandbox: Sandbox, report: RehearsalReport) -> None:
    """Record one event of the runner in the report.

    Raises:
        PackagingError: the sandbox is open.
    """
    if "blocked" in event:
        report.python, report.working = event["python"], sandbox.working
        report.files = sandbox.files
        for name, measure in (("network", sandbox.network), ("input", sandbox.input), ("files", sandbox.files)):
            reason = event["blocked"][name]
            if reason is None:
                raise PackagingError(f"the sandbox is open: {name} is not blocked by: {measure}")
            if reason:
                setattr(report, name, f"{measure} ({reason})")
    elif "cell" in event:
        report.seconds[f"cell {event['cell']}"] = event["seconds"]
        if event["failed"]:
            report.failed, report.last_output = event["cell"], tail(event["output"], _TAIL)
