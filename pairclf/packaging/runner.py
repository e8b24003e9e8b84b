"""Runs a notebook inside the sandbox, cell by cell.

Started by path with the stand-in's interpreter, where pairclf is not installed: it imports nothing of ours. It first
proves that the sandbox holds, and then prints one line of JSON for each thing that happens:

    {"blocked": {"network": why, "input": why}}
    {"cell": id, "seconds": 1.2, "failed": false, "output": text}
    {"peak_mb": 512.0}
"""

from __future__ import annotations

import fcntl
import json
import re
import resource
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

_GET_FLAGS, _SET_FLAGS, _UP = 0x8913, 0x8914, 1  # ioctls and flag of Linux' netdevice(7)
_OUTSIDE = (("192.0.2.1", socket.AF_INET), ("2001:db8::1", socket.AF_INET6))  # reserved for documentation, RFC 5737
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def say(**event: Any) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


def raise_loopback() -> None:
    """Bring `lo` up, which is down in a new network namespace; the notebook's kernel talks over it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as channel:
        answer = fcntl.ioctl(channel, _GET_FLAGS, struct.pack("16sh14x", b"lo", 0))
        flags = struct.unpack("16sh14x", answer)[1]
        if not flags & _UP:
            fcntl.ioctl(channel, _SET_FLAGS, struct.pack("16sh14x", b"lo", flags | _UP))


def why_no_network() -> str | None:
    """The system's word when a route to the outside is asked for; `None` if there is one. Nothing is sent."""
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
    """The system's word when a file is made, or one is opened for writing, in the input; `None` if either went."""
    reason = None
    for path in (inputs / ".probe", *(entry for entry in inputs.rglob("*") if entry.is_file())):
        try:
            path.open("ab").close()
        except OSError as error:
            reason = error.strerror or str(error)
        else:
            return None
    return reason


def run(notebook: Any) -> bool:
    """Execute the code cells in order; whether all went well."""
    manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    client = NotebookClient(notebook, km=manager, timeout=None)
    # The kernel echoes what its subprocesses print, and our standard output is for events.
    with client.setup_kernel(cleanup_kc=True, stdout=sys.stderr):
        for index, cell in enumerate(notebook.cells):
            if cell.cell_type != "code":
                continue
            start, failed = time.perf_counter(), False
            try:
                client.execute_cell(cell, index)
            except (CellExecutionError, DeadKernelError) as error:
                failed = True
                cell.outputs = cell.outputs or [nbformat.v4.new_output("stream", name="stderr", text=str(error))]
            say(cell=cell.id, seconds=time.perf_counter() - start, failed=failed, output=text_of(cell.outputs))
            if failed:
                return False
    return True


def text_of(outputs: Any) -> str:
    """What a cell printed, as plain text; of an error its last line alone."""
    texts = []
    for output in outputs:
        if output.output_type == "stream":
            texts.append(output.text)
        elif output.output_type == "error":
            texts.append(f"\n{output.ename}: {output.evalue}\n")
        else:
            texts.append(output.data.get("text/plain", "") + "\n")
    return _ANSI.sub("", "".join(texts))


def main(source: str, executed: str, inputs: str) -> int:
    raise_loopback()
    blocked = {"network": why_no_network(), "input": why_no_writing(Path(inputs))}
    say(blocked=blocked)
    if None in blocked.values():
        return 1
    notebook = nbformat.read(source, as_version=4)
    done = run(notebook)
    nbformat.write(notebook, executed)
    say(peak_mb=resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
