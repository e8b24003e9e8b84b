"""The sandbox of a kernel: no network, a read-only input, a small disk, no other files of this machine.

It uses namespaces if the system has them. Otherwise weaker means prevent harm by mistake, but not by intent.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from pairclf.console import console
from pairclf.rehearsal import isolated_root

_NAMESPACES = ("--net", "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child")
_GUARD_MODULE = "pairclf_network_guard"
_GUARD = '''
"""Refuses, in every Python process of this environment, to reach beyond this machine."""
import ipaddress
import sys


def _is_local(host):
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in ("", "localhost")


def _refuse(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = arguments[1]
    elif event == "socket.getaddrinfo":
        address = arguments[:1]
    else:
        return
    host = address[0] if isinstance(address, tuple) else None
    host = host.decode() if isinstance(host, bytes) else host
    if host is not None and not _is_local(host):
        raise PermissionError(f"no network in a rehearsal: {event} to {host}")


sys.addaudithook(_refuse)
'''


@dataclass(frozen=True, slots=True)
class Sandbox:
    """How a command is kept from the network, the input, other files and a full disk; the texts are for the report.

    Attributes:
        prefix: of the command.
        network, input, working, files: by which means; `files` are all others of this machine.
        guarded: by permissions, which have to be set again when files are added to the input.
    """

    prefix: tuple[str, ...]
    network: str
    input: str
    working: str
    files: str
    guarded: bool


def namespaces(view: isolated_root.View, folder: Path, python: Path) -> Sandbox | None:
    """New namespaces and a new file system, see `isolated_root`; `None` if this machine does not allow them.

    The working folder is a file system in memory, so that what is written past its size fails with the very error that
    Kaggle's disk gives. Outside root, a user namespace maps this user to root, which owns the others.

    Args:
        view: what can be seen.
        folder: for the note that says so; not in the view.
        python: must start in there.
    """
    if shutil.which("unshare") is None:
        return None
    note = folder / "view.json"
    note.write_text(json.dumps(view), encoding="utf-8")
    said = ""
    # A killed rehearsal takes what made the namespaces with it, and that all that is in them.
    ends_with_us = ("setpriv", "--pdeathsig", "KILL", "--") if shutil.which("setpriv") else ()
    for user in ((), ("--map-root-user",)):
        launcher = (sys.executable, "-I", "-S", str(Path(isolated_root.__file__)), str(note))
        prefix = (*ends_with_us, "unshare", *user, *_NAMESPACES, "--", *launcher)
        probe = [*prefix, str(python), "-I", "-c", "pass"]
        done = subprocess.run(probe, capture_output=True, text=True, check=False, cwd="/", stdin=subprocess.DEVNULL)
        if done.returncode == 0:
            means = "namespace of its own", "read-only mount", "file system of its own", "not there"
            return Sandbox(prefix, *means, guarded=False)
        said = next(reversed(done.stderr.strip().splitlines()), "")
    console.print(f"note: this machine allows no namespaces, so the sandbox is weaker (docs/kaggle.md): {said}")
    return None


def guards(site_packages: Path) -> Sandbox:
    """The weaker sandbox: an audit hook on Python's sockets, and no permission to write to the input.

    Native code that opens sockets of its own is not held back by it. Root passes over permissions, so root starts
    without its capabilities, and nobody can get new ones. The size of the working folder is watched. All that this
    user can read and write elsewhere, the kernel can.
    """
    (site_packages / f"{_GUARD_MODULE}.py").write_text(_GUARD, encoding="utf-8")
    (site_packages / f"{_GUARD_MODULE}.pth").write_text(f"import {_GUARD_MODULE}\n", encoding="utf-8")
    prefix: tuple[str, ...] = ()
    if shutil.which("setpriv"):
        root = ("--bounding-set", "-all", "--inh-caps", "-all") if os.geteuid() == 0 else ()
        prefix = ("setpriv", "--no-new-privs", *root, "--")
    means = "guard on Python's sockets", "no permission to write", "watched", "not hidden"
    return Sandbox(prefix, *means, guarded=True)


def protect(inputs: Path) -> None:
    """Remove write permission."""
    for _, _, names, folder in os.fwalk(inputs, follow_symlinks=False):
        for name in names:
            os.chmod(name, 0o444, dir_fd=folder)
        os.fchmod(folder, 0o555)


def release(inputs: Path) -> None:
    """Restore write permission, so that files can be added and the folder can be removed. No link is followed."""
    for _, _, _, folder in os.fwalk(inputs, follow_symlinks=False):
        os.fchmod(folder, 0o755)
