"""Run a command in a new file system, without any right to change it.

It is started by path in the namespaces that `unshare` made (see `sandbox.namespaces`), so it imports nothing of ours.
It builds a root from read-only system folders, the folders of a `View` and empty ones, makes it the only file system,
drops all capabilities, and executes the command.
"""

from __future__ import annotations

import ctypes
import fcntl
import glob
import json
import os
import socket
import struct
import sys
from typing import TypedDict

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/opt", "/nix/store", "/gnu/store", "/sys")
ETC = (
    "alternatives", "ca-certificates", "fonts", "group", "hosts", "ld.so.cache", "ld.so.conf", "ld.so.conf.d",
    "localtime", "mime.types", "nsswitch.conf", "OpenCL", "passwd", "pki", "ssl", "timezone", "vulkan",
)  # fmt: skip
DEVICES = ("null", "zero", "full", "random", "urandom", "nvidia*", "dri", "kfd", "dxg")

_RDONLY, _NOSUID, _NODEV, _NOEXEC, _BIND, _REC, _DETACH = 1, 2, 4, 8, 4096, 16384, 2  # of mount(2) and umount2(2)
_SETATTR, _HERE, _RECURSIVE = 442, -100, 0x8000  # mount_setattr(2), Linux 5.12
_NO_NEW_PRIVS, _DROP, _AMBIENT, _CLEAR_AMBIENT = 38, 24, 47, 4  # of prctl(2)
_CAPABILITIES = 0x20080522  # version 3 of capset(2)
_GET_FLAGS, _SET_FLAGS, _UP = 0x8913, 0x8914, 1  # ioctls and flag of netdevice(7)

_libc = ctypes.CDLL(None, use_errno=True)


class View(TypedDict):
    """What the command can see.

    Attributes:
        root: an empty folder, where its file system is put together.
        readable: files and folders that it can read, under their own paths.
        writable: folders that it can write to as well.
        working: its working folder, an empty file system in memory.
        disk: bytes that it takes; /tmp takes as many.
    """

    root: str
    readable: list[str]
    writable: list[str]
    working: str
    disk: int


def _call(name: str, *arguments: object) -> None:
    """Call a function of the C library; raises `OSError` if it fails."""
    if getattr(_libc, name)(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}{arguments}: {os.strerror(number)}")


def _mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    kind_bytes = None if kind is None else kind.encode()
    _call("mount", os.fsencode(source), os.fsencode(target), kind_bytes, ctypes.c_ulong(flags), options.encode())


def _restrict(target: str, attributes: int, *, below: bool = True) -> None:
    """Add attributes to a mount, and to those below it; its other attributes stay."""
    mount_attr = struct.pack("QQQQ", attributes, 0, 0, 0)
    _call("syscall", _SETATTR, _HERE, os.fsencode(target), _RECURSIVE if below else 0, mount_attr, len(mount_attr))


def _bind(root: str, path: str, attributes: int) -> None:
    """Show what is at `path` in the new root. Bind before a mount above it becomes read-only."""
    source, target = os.path.realpath(path), root + path
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    elif not os.path.exists(target):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_EXCL, 0o600))
    _mount(source, target, None, _BIND | _REC)
    _restrict(target, attributes)


def _build_system(root: str, disk: int) -> None:
    for path in SYSTEM:
        if os.path.islink(path):
            os.symlink(os.readlink(path), root + path)
        elif os.path.exists(path):
            _bind(root, path, _RDONLY | _NOSUID | _NODEV)
    for name in ETC:
        if os.path.exists(f"/etc/{name}"):
            _bind(root, f"/etc/{name}", _RDONLY | _NOSUID | _NODEV)
    for name in ("proc", "run", "tmp", "var"):
        os.mkdir(f"{root}/{name}")
    os.symlink("../run", f"{root}/var/run")
    os.symlink("../tmp", f"{root}/var/tmp")
    _mount("proc", f"{root}/proc", "proc", _NOSUID | _NODEV | _NOEXEC)
    _restrict(f"{root}/proc", _RDONLY)  # without capabilities root may still write to the system's settings in there
    _mount("tmpfs", f"{root}/tmp", "tmpfs", _NOSUID | _NODEV, f"size={disk},mode=1777")


def _build_devices(root: str) -> None:
    """Make the devices that hold no data, the GPUs, and new terminals."""
    top = f"{root}/dev"
    os.mkdir(top)
    _mount("tmpfs", top, "tmpfs", _NOSUID, "mode=755")
    for name in DEVICES:
        for path in glob.glob(f"/dev/{name}"):
            _bind(root, path, _NOSUID)
    for name in ("shm", "pts"):
        os.mkdir(f"{top}/{name}")
    _mount("tmpfs", f"{top}/shm", "tmpfs", _NOSUID | _NODEV, "mode=1777")
    _mount("devpts", f"{top}/pts", "devpts", _NOSUID | _NOEXEC, "newinstance,ptmxmode=0666,mode=620")
    for name, target in (("ptmx", "pts/ptmx"), ("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1")):
        os.symlink(target, f"{top}/{name}")
    os.symlink("fd/2", f"{top}/stderr")
    _restrict(top, _RDONLY, below=False)


def enter(view: View) -> None:
    """Build the new root and leave the old one for good."""
    root = view["root"]
    _mount("tmpfs", root, "tmpfs", _NOSUID | _NODEV, "mode=755")
    _build_system(root, view["disk"])
    _build_devices(root)
    for path in sorted(view["readable"]):
        _bind(root, path, _RDONLY | _NOSUID | _NODEV)
    for path in view["writable"]:
        _bind(root, path, _NOSUID | _NODEV)
    os.makedirs(root + view["working"], exist_ok=True)
    _mount("tmpfs", root + view["working"], "tmpfs", _NOSUID | _NODEV, f"size={view['disk']}")
    _restrict(root, _RDONLY, below=False)
    os.chdir(root)
    _call("pivot_root", b".", b".")  # the old root then lies over the new one, and is taken away
    _call("umount2", b".", _DETACH)
    os.chdir(view["working"])


def raise_loopback() -> None:
    """Bring `lo` up, which is down in a new network namespace; the notebook's kernel needs it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as channel:
        answer = fcntl.ioctl(channel, _GET_FLAGS, struct.pack("16sh14x", b"lo", 0))
        flags = struct.unpack("16sh14x", answer)[1]
        fcntl.ioctl(channel, _SET_FLAGS, struct.pack("16sh14x", b"lo", flags | _UP))


def last_capability() -> int:
    """The number of the last capability that this system knows."""
    with open("/proc/sys/kernel/cap_last_cap", encoding="ascii") as stream:
        return int(stream.read())


def give_up_rights(last: int) -> None:
    """Drop all capabilities up to `last`, so that no program that is executed can get one back."""
    _call("prctl", _NO_NEW_PRIVS, 1, 0, 0, 0)
    _call("prctl", _AMBIENT, _CLEAR_AMBIENT, 0, 0, 0)
    for capability in range(last + 1):
        _call("prctl", _DROP, capability, 0, 0, 0)
    _call("capset", struct.pack("II", _CAPABILITIES, 0), bytes(24))


def main(source: str, *command: str) -> None:
    with open(source, encoding="utf-8") as stream:
        view: View = json.load(stream)
    last = last_capability()
    raise_loopback()
    enter(view)
    give_up_rights(last)  # nothing is imported from here on: this interpreter's library may be gone
    os.execv(command[0], command)


if __name__ == "__main__":
    main(*sys.argv[1:])
