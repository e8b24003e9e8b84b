"""Run a kernel inside the sandbox, cell by cell.

It is started by path with the stand-in's interpreter, where pairclf is not installed, so it imports nothing of ours. It
reads a `Plan`, checks that the sandbox is closed, and prints one line of JSON for each event:

    {"python": "3.12.1", "blocked": {"network": why, "input": why, "files": why}}
    {"begun": id}
    {"cell": id, "seconds": 1.2, "failed": false, "output": text}
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

EXECUTED, PRINTED = "executed.ipynb", "executed.log"  # what a notebook leaves, and a script
_REMOUNT = 0x1020  # MS_REMOUNT and MS_BIND of mount(2): with no other flag, the mount can be written to
_LOOK = 0.5  # seconds between two looks whether the rehearsal lives
_ADOPT = 36  # PR_SET_CHILD_SUBREAPER of prctl(2)
_OUTSIDE = (("192.0.2.1", socket.AF_INET), ("2001:db8::1", socket.AF_INET6))  # reserved for documentation, RFC 5737
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
HEAD = re.compile(r"^# %% ([a-z][a-z0-9-]*)$", re.MULTILINE)
_SIGN = "\x1e"  # record separator: nothing else prints it


class Plan(TypedDict):
    """What to run.

    Attributes:
        code: the .ipynb, or the .py of a script in percent format.
        inputs: folder that can't be written to.
        results_folder: folder for results, which survives the working folder, where the runner starts.
        results: names of files that are copied there after each cell.
        prelude: code that runs before the first cell.
        cells: how many are run; None: all.
        hidden: a file that must not be found; empty: files are not hidden.
    """

    code: str
    inputs: str
    results_folder: str
    results: list[str]
    prelude: str
    cells: int | None
    hidden: str


def say(**event: Any) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


def end_with(parent: int) -> None:
    """When the rehearsal is killed, kill all processes below this one: a notebook's kernel has its own session."""
    while os.getppid() == parent:
        time.sleep(_LOOK)
    while below := children(os.getpid()):
        for process in below:  # what these started is then ours, see `_ADOPT`
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-1, 0)
    os._exit(1)


def children(process: int) -> list[int]:
    """The children of all threads of a process."""
    lists = Path("/proc", str(process), "task").glob("*/children")
    return [int(number) for path in lists for number in path.read_text().split()]


def why_no_network() -> str | None:
    """The system's message when a route to the outside is opened; `None` if there is one. Nothing is sent."""
    reason = None
    for host, family in _OUTSIDE:
        with socket.socket(family, socket.SOCK_DGRAM) as channel:
            try:
                channel.connect((host, 9))
            except OSError as error:
                reason = error.strerror or str(error)
            else:
                return None
    return reason


def why_no_writing(inputs: Path) -> str | None:
    """The system's message when a file of the input is opened for writing; `None` if that, or a new mount, succeeds."""
    reason = None
    if ctypes.CDLL(None).mount(None, os.fsencode(inputs), None, ctypes.c_ulong(_REMOUNT), None) == 0:
        return None
    for path in (inputs / ".probe", *(entry for entry in inputs.rglob("*") if entry.is_file())):
        try:
            path.open("ab").close()
        except OSError as error:
            reason = error.strerror or str(error)
        else:
            return None
    return reason


def why_not_found(hidden: str) -> str | None:
    """The system's message when a hidden file of this machine is looked up; `None` if it is there."""
    if not hidden:
        return ""
    try:
        os.lstat(hidden)
    except OSError as error:
        return error.strerror or str(error)
    return None


def run_notebook(plan: Plan) -> bool:
    """Execute the code cells in order; returns whether all succeeded."""
    import nbformat  # Jupyter's packages take a moment, which scripts need not wait for
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, DeadKernelError

    notebook = nbformat.read(plan["code"], as_version=4)
    manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    client = NotebookClient(notebook, km=manager, timeout=None)
    cells = [(index, cell) for index, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
    # The kernel echoes what its subprocesses print, and our standard output is for events.
    with client.setup_kernel(cleanup_kc=True, stdout=sys.stderr):
        if plan["prelude"]:
            first = notebook.cells[0]
            client.execute_cell(nbformat.v4.new_code_cell(plan["prelude"]), 0)
            notebook.cells[0] = first  # the client puts what it executed there
        for index, cell in cells[: plan["cells"]]:
            say(begun=cell.id)
            start, failed = time.perf_counter(), False
            try:
                client.execute_cell(cell, index)
            except (CellExecutionError, DeadKernelError) as error:
                failed = True
                cell.outputs = cell.outputs or [nbformat.v4.new_output("stream", name="stderr", text=str(error))]
            keep(plan)
            nbformat.write(notebook, Path(plan["results_folder"], EXECUTED))
            seconds = time.perf_counter() - start
            say(cell=cell.id, seconds=seconds, failed=failed, output=text_of(cell.outputs))
            if failed:
                return False
    return True


def run_script(plan: Plan) -> bool:
    """Execute a script as one process, whose cells report their start; returns whether it succeeded.

    The line that opens a cell is a comment: a statement in its place leaves all others where they are.
    """
    text = Path(plan["code"]).read_text(encoding="utf-8")
    heads = list(HEAD.finditer(text))
    if plan["cells"] is not None and len(heads) > plan["cells"]:
        text = text[: heads[plan["cells"]].start()]
    prelude = "".join(f"{line}; " for line in plan["prelude"].splitlines())
    marked = HEAD.sub(lambda head: f"{prelude * (head.start() == heads[0].start())}print('{_SIGN}{head[1]}')", text)
    script = Path(os.environ["HOME"], Path(plan["code"]).name)
    script.write_text(marked, encoding="utf-8")
    command = [sys.executable, "-u", str(script)]
    with (
        Path(plan["results_folder"], PRINTED).open("w", encoding="utf-8") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process,
    ):
        cell, start, printed = "", time.perf_counter(), ""

        def end(*, failed: bool) -> None:
            keep(plan)
            say(cell=cell, seconds=time.perf_counter() - start, failed=failed, output=_ANSI.sub("", printed))

        for line in process.stdout or ():
            if not line.startswith(_SIGN):
                printed += line
                log.write(_ANSI.sub("", line))
                continue
            if cell:
                end(failed=False)
            cell, start, printed = line[1:].strip(), time.perf_counter(), ""
            say(begun=cell)
        failed = process.wait() != 0
        end(failed=failed)
    return not failed


def keep(plan: Plan) -> None:
    """Copy the results, as the working folder vanishes with the sandbox; what the kernel deleted is not kept."""
    for name in plan["results"]:
        if Path(name).is_file():
            shutil.copyfile(name, Path(plan["results_folder"], name))
        else:
            Path(plan["results_folder"], name).unlink(missing_ok=True)


def text_of(outputs: Any) -> str:
    """The output of a cell as plain text; of an error, only its last line."""
    return _ANSI.sub("", "".join(_texts(outputs)))


def _texts(outputs: Any) -> Iterator[str]:
    for output in outputs:
        if output.output_type == "stream":
            yield output.text
        elif output.output_type == "error":
            yield f"\n{output.ename}: {output.evalue}\n"
        else:
            yield output.data.get("text/plain", "") + "\n"


def main(source: str) -> int:
    plan: Plan = json.loads(Path(source).read_text(encoding="utf-8"))
    ctypes.CDLL(None).prctl(_ADOPT, 1)  # what outlives its parent is still found below this process
    threading.Thread(target=end_with, args=[os.getppid()], daemon=True).start()
    inputs = Path(plan["inputs"])
    blocked = {"network": why_no_network(), "input": why_no_writing(inputs), "files": why_not_found(plan["hidden"])}
    say(python=platform.python_version(), blocked=blocked)
    if None in blocked.values():
        return 1
    done = run_script(plan) if plan["code"].endswith(".py") else run_notebook(plan)
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
