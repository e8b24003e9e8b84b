"""No network, a read-only input and a small disk: by namespaces where the kernel lets us, by weaker means elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

_NAMESPACES = ("--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
# $0: the input, $1: the working folder, $2: its size. The shell still stands in what the new file system covers.
_MOUNT = (
    'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && mount -t tmpfs -o size="$2" tmpfs "$1" && '
    'cd "$1" && shift 2 && exec "$@"'
)
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
    """How a command is kept from the network, from its input and from filling the disk; the words are for the report.

    Attributes:
        prefix: of the command.
        network, input, working: by which means.
        guarded: by permissions, which have to be set again when files are added to the input.
    """

    prefix: tuple[str, ...]
    network: str
    input: str
    working: str
    guarded: bool


def namespaces(inputs: Path, working: Path, disk: int) -> Sandbox | None:
    """Own network and mount namespaces; `None` where this machine does not allow them.

    The working folder is a file system in memory of `disk` bytes, so that what is written past it fails with the very
    error that Kaggle's disk gives. Outside root, a user namespace maps this user to root, which owns the others.
    """
    if shutil.which("unshare") is None or shutil.which("mount") is None:
        return None
    for user in ((), ("--map-root-user",)):
        head = (*_ends_with_us(), "unshare", *user, *_NAMESPACES, "--", "sh", "-c", _MOUNT)
        prefix = (*head, str(inputs), str(working), str(disk))
        if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0:
            return Sandbox(prefix, "namespace of its own", "read-only mount", "file system of its own", guarded=False)
    return None


def _ends_with_us() -> tuple[str, ...]:
    """A killed rehearsal takes what made the namespaces with it, and that all that is in them."""
    return ("setpriv", "--pdeathsig", "KILL", "--") if shutil.which("setpriv") else ()


def guards(site_packages: Path) -> Sandbox:
    """Where namespaces are not allowed: an audit hook on Python's sockets, and no write permission on the input.

    Native code that opens sockets of its own is not held back by it. Root passes over permissions, so root starts
    without the capability that lets it. The size of the working folder is watched.
    """
    (site_packages / f"{_GUARD_MODULE}.py").write_text(_GUARD, encoding="utf-8")
    (site_packages / f"{_GUARD_MODULE}.pth").write_text(f"import {_GUARD_MODULE}\n", encoding="utf-8")
    prefix = (
        ("setpriv", "--bounding-set", "-dac_override", "--") if os.geteuid() == 0 and shutil.which("setpriv") else ()
    )
    return Sandbox(prefix, "guard on Python's sockets", "no permission to write", "watched", guarded=True)


def protect(inputs: Path) -> None:
    """Take the right to write away."""
    for root, _, names in os.walk(inputs):
        for name in names:
            os.chmod(Path(root, name), 0o444)
        os.chmod(root, 0o555)


def release(inputs: Path) -> None:
    """Give the right to write back, so that files can be added and the folder removed."""
    for root, _, _ in os.walk(inputs):
        os.chmod(root, 0o755)
