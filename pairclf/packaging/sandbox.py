"""No network and a read-only input: by namespaces where the kernel lets us, by weaker means elsewhere; always said."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

_NAMESPACES = ("--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
_BIND = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
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
    """How a command is kept from the network and from writing to its input; the words go into the report."""

    prefix: tuple[str, ...]
    network: str
    input: str


def namespaces(inputs: Path) -> Sandbox | None:
    """Own network and mount namespaces; `None` where this machine does not allow them.

    Outside root, a user namespace maps this user to root, which owns the two others.
    """
    if shutil.which("unshare") is None or shutil.which("mount") is None:
        return None
    for user in ((), ("--map-root-user",)):
        prefix = ("unshare", *user, *_NAMESPACES, "--", "sh", "-c", _BIND, str(inputs))
        if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0:
            return Sandbox(prefix, "namespace of its own", "read-only mount")
    return None


def guards(inputs: Path, site_packages: Path) -> Sandbox:
    """Where namespaces are not allowed: an audit hook on Python's sockets, and no write permission on the input.

    Native code that opens sockets of its own is not held back by it. Root passes over permissions, so root starts
    without the capability that lets it.
    """
    (site_packages / f"{_GUARD_MODULE}.py").write_text(_GUARD, encoding="utf-8")
    (site_packages / f"{_GUARD_MODULE}.pth").write_text(f"import {_GUARD_MODULE}\n", encoding="utf-8")
    for root, _, names in os.walk(inputs):
        for name in names:
            os.chmod(Path(root, name), 0o444)
        os.chmod(root, 0o555)
    prefix = (
        ("setpriv", "--bounding-set", "-dac_override", "--") if os.geteuid() == 0 and shutil.which("setpriv") else ()
    )
    return Sandbox(prefix, "guard on Python's sockets", "no permission to write")


def release(inputs: Path) -> None:
    """Give the right to write back, so that the folder can be removed."""
    for root, _, _ in os.walk(inputs):
        os.chmod(root, 0o755)
